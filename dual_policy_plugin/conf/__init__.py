"""The config groups that the search-path plugin adds to every Hydra app (`+dual_policy=checkpoint`)."""
