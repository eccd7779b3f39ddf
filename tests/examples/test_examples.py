"""The examples as a newcomer runs them: copied elsewhere, the commands of their READMEs, in small sizes."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dual_policy_plugin
from dual_policy_plugin.checkpoint import decode_policy

EXAMPLES = Path(dual_policy_plugin.__file__).parent.parent / "examples"
OURS = ("foreign_hydra_app", "mettagrid", "pettingzoo_ppo")
SMALL = {
    "app.py": "trainer.iterations=2 num_envs=4",
    "ppo.py": "--iterations 2 --num-envs 2 --num-steps 25",
    "ppo_dual_policy.py": "--iterations 2 --num-envs 2 --num-steps 25",
    "hearts.py": "--timesteps 512 --num-envs 2 --episode-steps 16 --episodes 2",
}


def run_readme(name: str, folder: Path) -> list[str]:
    """What each `python ...` of an example's README prints, run in a copy of the example."""
    copy = shutil.copytree(EXAMPLES / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (block,) = re.findall(r"```sh\n(.*?)```", (copy / "README.md").read_text(), re.DOTALL)
    printed = []
    for line in block.splitlines():
        words = shlex.split(line)
        if words[0] == "python":
            command = [sys.executable, *words[1:], *SMALL[words[1]].split()]
            done = subprocess.run(
                command,
                cwd=copy,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stdout
            printed.append(done.stdout)
    assert printed
    return printed


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def description(path: Path) -> dict[str, Any]:
    return decode_policy(path.read_bytes(), str(path)).metadata


@pytest.mark.slow
def test_an_app_that_is_not_ours_trains_against_its_own_checkpoint(tmp_path: Path) -> None:
    alone, against, measured = run_readme("foreign_hydra_app", tmp_path)
    folder = tmp_path / "foreign_hydra_app"
    first = folder / "first" / "policy.safetensors"
    assert "win_rate" not in alone
    assert not (folder / "first" / "npc.lock.json").exists()
    assert re.search(r"learner seats \(0, 1\), NPC seats \(2, 3\)", against)
    assert re.search(r"'dual_policy/win_rate': (0|1|0\.\d+)", against)
    (locked,) = json.loads((folder / "second" / "npc.lock.json").read_text())["npcs"]
    assert (locked["uri"], locked["sha256"]) == (f"file://{first}", digest(first))
    second = description(folder / "second" / "policy.safetensors")
    assert (second["epoch"], second["npcs"][0]["sha256"]) == (2, digest(first))
    assert second["step"] == 2 * 40 * 4 * 2  # iterations, steps, envs, learners
    assert description(first)["step"] == 2 * 40 * 4 * 4
    assert re.search(rf"win rate [01]\.\d\d against file://{re.escape(str(first))}\n", measured)


def test_ten_lines_make_a_plain_ppo_dual_policy(tmp_path: Path) -> None:
    folder = EXAMPLES / "pettingzoo_ppo"
    plain, dual = ((folder / name).read_text().splitlines() for name in ("ppo.py", "ppo_dual_policy.py"))
    diff = [line for line in difflib.unified_diff(plain, dual, n=0) if not line.startswith(("---", "+++", "@@"))]
    assert "dual_policy" not in "\n".join(plain)
    assert 0 < sum(line.startswith("-") for line in diff) <= sum(line.startswith("+") for line in diff) <= 10


@pytest.mark.slow
def test_the_hunters_train_against_the_runner_of_the_plain_ppo(tmp_path: Path) -> None:
    first_run, second_run = run_readme("pettingzoo_ppo", tmp_path)
    assert first_run.count("iteration") == second_run.count("iteration") == 2
    wins = [float(word) for word in re.findall(r"'dual_policy/win_rate': ([\d.]+)", second_run)]
    assert len(wins) == 2
    assert all(0 <= share <= 1 for share in wins)
    first, second = (
        torch.load(tmp_path / "pettingzoo_ppo" / f"{name}.pt", weights_only=True) for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert not torch.equal(first["actor.0.weight"], second["actor.0.weight"])


@pytest.mark.slow
def test_a_frozen_policy_meets_a_new_one_in_mettagrid(tmp_path: Path) -> None:
    (printed,) = run_readme("mettagrid", tmp_path)
    runs = tmp_path / "mettagrid" / "train_dir"
    result = json.loads((runs / "hearts_2" / "result.json").read_text())
    (npc,) = result["npcs"]
    assert npc["sha256"] == digest(runs / "hearts_1" / "checkpoints" / "latest.safetensors")
    assert f"win rate {result['evals'][0]['win_rate']:.2f}" in printed
    assert re.search(r"new \d\.\d+, frozen \d\.\d+", printed)


@pytest.mark.parametrize("name", OURS)
def test_examples_use_public_names_alone(name: str) -> None:
    public = {"dual_policy_plugin": set(dual_policy_plugin.__all__), "dual_policy_plugin.config": None}
    public["dual_policy_plugin.train"] = {"train"}
    seen = 0
    for path in (EXAMPLES / name).glob("*.py"):
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("dual_policy_plugin"):
                names = public[statement.module or ""]
                assert names is None or {alias.name for alias in statement.names} <= names, path
                seen += 1
            assert not (isinstance(statement, ast.Import) and "dual_policy" in statement.names[0].name), path
    assert seen > 0
