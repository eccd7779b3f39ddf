"""`python tools/list_wandb_runs.py` is `dual-policy runs`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from dual_policy_plugin.cli import main

    sys.exit(main(["runs", *sys.argv[1:]]))
