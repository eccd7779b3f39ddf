"""From experience to better parameters: advantages and PPO."""
