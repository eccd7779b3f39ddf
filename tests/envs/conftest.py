"""Lets the tests, and the env workers they start, import `toy_envs` by its bare name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
