"""What a person watches: the terminal panel, W&B, the report."""
