"""Hydra's submitit launcher on Slurm: how its jobs are watched, and what its errors become (docs/slurm.md)."""
