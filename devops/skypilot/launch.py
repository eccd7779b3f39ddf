#!/usr/bin/env python3
"""`dual-policy launch sky` of this checkout: ./devops/skypilot/launch.py train --gpus=1 run=my_experiment ..."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

root = Path(__file__).resolve().parents[2]
python = root / ".venv" / "bin" / "python"
if find_spec("hydra") is None and python.is_file():  # another Python than that of `make setup`
    os.execv(python, [str(python), *sys.argv])
sys.path.insert(0, str(root))

from dual_policy_plugin.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["launch", "sky", *sys.argv[1:]]))
