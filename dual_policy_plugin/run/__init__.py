"""A run as a directory: its files, the lock of who writes them, and its mirror that outlives the machine."""
