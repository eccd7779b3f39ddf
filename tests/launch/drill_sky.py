"""A node's whole life on this machine: a real installation, a second one that does nothing, a run.

    python -m tests.launch.drill_sky

The last lines give the times and the result. Settings of uv, pip and the network are handed to the node; without
UV_TORCH_BACKEND the package index's own torch is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from dual_policy_plugin.launch.sky_task import read_template
from tests.launch.node import ROOT, start_script
from tests.launch.test_sky_scripts import SMALL

_NOT_SENT = shutil.ignore_patterns(".*", "train_dir", "outputs", "multirun", "__pycache__", "dist", "build")
_NETWORK = ("UV_", "PIP_", "SSL_CERT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def main() -> int:
    task = read_template("train")
    indexes = {key: value for key, value in os.environ.items() if key.upper().startswith(_NETWORK)}
    envs = {"UV_TORCH_BACKEND": "", "DUAL_POLICY_VENV": "", "OVERRIDES": " ".join(SMALL)} | indexes
    with tempfile.TemporaryDirectory(prefix="drill-sky-") as folder:
        home = Path(folder)
        shutil.copytree(ROOT, home / "sky_workdir", ignore=_NOT_SENT)
        (home / "synced").mkdir()
        envs |= {"SYNC_URI": str(home / "synced"), "RUN": "drill", "TOTAL_TIMESTEPS": "2000"}
        for name, script in (("setup", "setup"), ("setup again", "setup"), ("run", "run")):
            start = time.monotonic()
            with start_script(task[script], home, task, **envs) as node:
                output = node.communicate()[0]
            took_s, last = time.monotonic() - start, output.splitlines()[-1]
            print(f"{name}: exit code {node.returncode} after {took_s:.2f} s; {last}", flush=True)
            if node.returncode != 0:
                print(output, file=sys.stderr)
                return 1
        result = json.loads((home / "synced/drill/result.json").read_text())
    print(f"result: {result['agent_step']} learner steps, objective {result['objective']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
