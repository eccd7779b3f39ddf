"""A sweep over stages: which NPC plays in which, when a stage is passed, and the file that remembers it."""
