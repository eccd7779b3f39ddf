"""What stands between a command line here and a run on other machines: checks, tasks, clusters."""
