"""Vectorised envs behind one protocol: the torch-native arena, and foreign envs in worker processes."""
