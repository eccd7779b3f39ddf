"""Tiny curriculum sweeps for the tests: the words of a command, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.cli import main

RANDOM, FORAGER = "builtin://arena/random", "builtin://arena/forager"
SMALL = [
    "env.num_envs=8", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "trainer.total_timesteps=300", "agent.hidden_size=16", "evals.episodes=8", "device=cpu",
    "report=false",
]  # fmt: skip
SWEEPER = "hydra/sweeper=dual_policy_curriculum"


def sweep_words(folder: Path, ladder: str, *more: str, run: str = "s") -> list[str]:
    """The words of `dual-policy` for a sweep under `folder`; against random a win rate is near 0.5, so 0.2 passes."""
    gate = ["hydra.sweeper.episodes=64", "hydra.sweeper.promote_at=0.2"]
    words = ["train", "-m", SWEEPER, f"hydra.sweeper.ladder={ladder}", *gate, *SMALL]
    return [*words, f"train_dir={folder}", f"run={run}", *more]


def state_of(folder: Path, run: str = "s") -> dict[str, Any]:
    """What curriculum.json of a sweep says."""
    state: dict[str, Any] = json.loads((folder / run / "curriculum.json").read_text())
    return state


def comparable(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A state without times, and with another folder's name in place of its own."""
    same: dict[str, Any] = json.loads(json.dumps(state).replace(str(folder), "FOLDER"))
    for job in same["jobs"]:
        del job["elapsed_s"]
    return same


class Killed(BaseException):
    """Stands in for the end of the process."""


def kill_cases(kills: list[tuple[Any, str, int]], fast: list[tuple[Any, str, int]]) -> list[Any]:
    """Parameters (module, name, number) of a test that calls `kill_before`; those not in `fast` are slow."""
    return [
        pytest.param(*kill, marks=[] if kill in fast else [pytest.mark.slow], id=f"{kill[1]}-{kill[2]}")
        for kill in kills
    ]


def kill_before(module: Any, name: str, number: int, words: list[str]) -> None:
    """Runs the command `words` and ends it before the `number`th call of `module.name`."""
    real, calls = getattr(module, name), []

    def kill(*args: Any, **values: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return real(*args, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, kill)
        with pytest.raises(Killed):
            main(words)
