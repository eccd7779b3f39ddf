"""A node of SkyPilot's, played on this machine: a task's scripts in SkyPilot's own wrapper, in a fresh home."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"


def make_home(folder: Path) -> Path:
    """A home with the workdir as SkyPilot lays it out; of the checkout only what the scripts read."""
    workdir = folder / "sky_workdir"
    workdir.mkdir(parents=True)
    shutil.copytree(ROOT / "sky", workdir / "sky")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, workdir)
    (folder / ".sky").mkdir()
    return folder


def start_script(
    script: str, home: Path, task: Mapping[str, Any], *, rank: int = 0, ips: Sequence[str] = ("127.0.0.1",), **envs: str
) -> subprocess.Popen[str]:
    """Starts `setup` or `run` of a task as SkyPilot does on the node of that rank; output is kept together."""
    from sky.backends.task_codegen import TaskCodeGen
    from sky.skylet.log_lib import make_task_bash_script

    variables = {
        **{key: str(value) for key, value in (task.get("envs", {}) | task.get("secrets", {}) | envs).items()},
        "SKYPILOT_TASK_ID": "sky-managed-test_1-0",
        "SKYPILOT_NUM_NODES": str(len(ips)),
        "SKYPILOT_NODE_IPS": "\n".join(ips),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
    }
    wrapped = make_task_bash_script(TaskCodeGen.build_task_bash_script(script), env_vars=variables)
    path = Path(tempfile.mkdtemp(dir=home)) / "script.sh"
    path.write_text(wrapped)
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "OMP_NUM_THREADS", "TMPDIR") if key in os.environ}
    return subprocess.Popen(
        ["/bin/bash", "-i", path], env=kept | {"HOME": str(home)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
