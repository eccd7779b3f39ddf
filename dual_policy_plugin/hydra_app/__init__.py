"""From the words of a command line and the files of a config group to a `Config`: our Hydra app, and what it reads."""
