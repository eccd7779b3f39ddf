"""`python tools/train.py` is `dual-policy train`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # worker processes import this module too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from dual_policy_plugin.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
