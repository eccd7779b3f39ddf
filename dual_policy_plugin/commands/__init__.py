"""Subcommands of `dual-policy`, one module each: `run(words) -> exit code`. Heavy imports stand inside functions."""
