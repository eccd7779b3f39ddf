"""docs/your_trainer.md, followed by a reader: its files written down, its programs run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Box

import dual_policy_plugin
from dual_policy_plugin import DualPolicy, save_policy

PAGE = (Path(dual_policy_plugin.__file__).parent.parent / "docs" / "your_trainer.md").read_text()
FILES = {text.split("\n", 1)[0][2:]: text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
(COMMANDS,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_every_program_of_the_page_runs(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    run(tmp_path, "save.py")
    figures = run(tmp_path, "loop.py")
    assert "'dual_policy/episodes': 32.0" in figures  # 8 envs, 4 episodes each
    assert "'dual_policy/win_rate': 0." in figures
    assert (tmp_path / "runs" / "second" / "npc.lock.json").exists()
    run(tmp_path, "resume.py")
    assert (tmp_path / "runs" / "third" / "npc.lock.json").exists()
    uri = f"['file://{tmp_path}/first.safetensors']"
    printed = [run(tmp_path, *shlex.split(line)[1:]).splitlines()[-1] for line in COMMANDS.splitlines()]
    assert printed == ["[0, 1, 2, 3] []", f"[0, 1] {uri}", f"[0, 1] {uri}"]


def test_the_recurrent_net_of_the_page_plays(tmp_path: Path) -> None:
    space = {"num_envs": 2, "num_agents": 2, "observation_space": Box(-1, 1, (3,), np.float32), "actions": 4}
    scope: dict[str, type] = {}
    exec(FILES["my_gru.py"], scope)
    spaces = {"observation_space": space["observation_space"], "actions": 4}
    net = scope["Gru"](space["observation_space"], range(4), hidden=5)
    uri = save_policy(tmp_path / "a.safetensors", net, agent="gru", args={"hidden": 5}, **spaces)
    dual = DualPolicy.open(uri, **space, architectures={"gru": scope["Gru"]})
    assert dual.act(np.ones((2, 2, 3))).shape == (2, 1)
    state = dual.state_dict()["tensors"]["npc_state"]
    assert state.shape == (2, 5)
    assert bool((state != 0).all())
