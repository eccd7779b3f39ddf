"""Bad sweeps through the real program: one line that names key, value and mend, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.run.lock import lock_run, unlock_run
from tests.curriculum.sweeps import FORAGER, RANDOM, SWEEPER, sweep_words
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were

LADDER = f"[{RANDOM},{FORAGER}]"
NPC = "trainer.dual_policy.checkpoint_npc"
PCT = "trainer.dual_policy.training_agents_pct"


def error_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line on stderr of a command that ends with 2."""
    capsys.readouterr()
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"\d\d:\d\d:\d\d INFO ", line)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


BAD = [
    ("[]", [], ["hydra.sweeper.ladder=[] is empty", "name at least one NPC"]),
    (f"[{RANDOM},builtin://arena/gone,{FORAGER}]", [], ["hydra.sweeper.ladder, rung 2 of 3", "builtin://arena/gone"]),
    (f"[{RANDOM},nowhere/model_0001.safetensors]", [], ["rung 2 of 2: nowhere/model_0001.safetensors"]),
    ("{uri: nowhere, type: all}", [], ["rung 1 of 1: nowhere", "no such file"]),
    ("self", ["hydra.sweeper.stages=2"], ["hydra.sweeper.start is not set", "trainer.initial_policy.uri"]),
    (LADDER, ["hydra.sweeper.promote_at=1.0"], ["promote_at=1 can never be passed", "hydra.sweeper.episodes=64"]),
    (LADDER, ["hydra.sweeper.order=best"], ["hydra.sweeper.order=best", "given or weakest_first"]),
    (LADDER, [f"{NPC}.uri={RANDOM}"], [f"{NPC}.uri={RANDOM} is set beside hydra.sweeper.ladder", "remove it"]),
    (LADDER, [f"{NPC}.uri={RANDOM},{FORAGER}"], [f"{NPC}.uri={RANDOM} is set beside hydra.sweeper.ladder"]),
    (LADDER, [f"{NPC}.policy_uri={RANDOM}"], [f"{NPC}.policy_uri={RANDOM} is set beside hydra.sweeper.ladder"]),
    (LADDER, [f"{NPC}.act=greedy"], [f"{NPC}.act=greedy is set beside hydra.sweeper.ladder"]),
    (LADDER, [f"trainer.dual_policy.pool=[{RANDOM}]"], ["trainer.dual_policy.pool is set beside hydra.sweeper.ladder"]),
    (LADDER, ["trainer.dual_policy.enabled=false"], ["trainer.dual_policy.enabled=false", "switches the NPC off"]),
    (LADDER, [f"{PCT}=1"], [f"{PCT}=1 leaves no seat to the NPCs"]),
    (LADDER, [f"{PCT}=0.5,1"], [f"{PCT}=1 leaves no seat to the NPCs"]),
    (LADDER, [f"{PCT}=0.01"], [f"{PCT}=0.01 leaves no learner among 8 agents"]),
    (LADDER, ["env.num_agents=8,1"], ["num_agents=1"]),
    (LADDER, ["trainer.horizont=8"], ["trainer.horizont is not a known key", "trainer.horizon?"]),
    (LADDER, ["evals.episodes=0", "seed=1,2"], ["evals.episodes=0", "the best of a stage's 2 jobs"]),
    (LADDER, ["run=a,b"], ["hydra.sweep.dir=", "give run= and train_dir= one value"]),
    (LADDER, [f"evals.held_out=[{FORAGER}]"], [f"evals.held_out={FORAGER} is the rung {FORAGER}"]),
]  # fmt: skip


@pytest.mark.parametrize(("ladder", "more", "parts"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_sweep_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ladder: str, more: list[str], parts: list[str]
) -> None:
    line = error_line(capsys, sweep_words(tmp_path, ladder, *more))
    for part in parts:
        assert part in line
    assert not list(tmp_path.iterdir())


def test_a_ladder_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in sweep_words(tmp_path, LADDER) if word != "-m"]
    assert error_line(capsys, words) == (
        "error: hydra.sweeper.ladder is set, but one run walks through no stages; add -m"
    )
    assert not list(tmp_path.rglob("*.json"))


def test_the_folder_of_another_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM}]", "seed=1,2")
    state = tmp_path / "s" / "curriculum.json"
    with pytest.MonkeyPatch.context() as patch:  # the state of a sweep that has only begun
        patch.setattr("dual_policy_plugin.curriculum.stages._run_attempt", _stop)
        assert main(words) == 1
    before = state.read_bytes()

    line = error_line(capsys, [*words, "trainer.gamma=0.9", "hydra.sweeper.promote_at=0.3"])
    assert f"error: {tmp_path}/s was made by another sweep: " in line
    assert "sweeper.promote_at: 0.2 -> 0.3" in line
    assert 'overrides.trainer.gamma: null -> "0.9"' in line
    assert "config.trainer.gamma: 0.99 -> 0.9" in line
    assert 'overrides.seed: "1,2" -> "1"' in error_line(capsys, [*words[:-1], "seed=1"])
    assert "sweeper.ladder" in error_line(capsys, [*words, f"hydra.sweeper.ladder={LADDER}"])
    assert state.read_bytes() == before


def _stop(*args: object) -> None:
    from dual_policy_plugin.errors import CurriculumStopped

    raise CurriculumStopped("here")


def test_two_sweepers_on_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    lock = lock_run(tmp_path / "s", 0.0)
    try:
        line = error_line(capsys, sweep_words(tmp_path, LADDER))
    finally:
        unlock_run(lock)
    assert f"{tmp_path}/s is in use by process" in line
    assert not (tmp_path / "s" / "curriculum.json").exists()


@pytest.mark.parametrize("place", ["checkpoints", "0/checkpoints"])
def test_a_folder_with_runs_of_no_curriculum(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "s" / place).mkdir(parents=True)
    line = error_line(capsys, sweep_words(tmp_path, LADDER))
    assert f"{tmp_path}/s has runs that are of no curriculum" in line
    assert "use another run= name" in line


def test_a_lock_that_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sweep_words(tmp_path, LADDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dual_policy_plugin.curriculum.stages._run_attempt", _stop)
        assert main(words) == 1
    path = tmp_path / "s" / "npc.lock.json"
    lock = json.loads(path.read_text())
    lock["npcs"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(lock))
    assert "pins forager as sha256 000000000000" in error_line(capsys, words)
    path.unlink()
    assert f"{path} cannot be read" in error_line(capsys, words)


def test_the_sweeper_composes() -> None:
    """A plugin that could not be imported would be missing here."""
    config, _ = compose_config([SWEEPER, "hydra.sweeper.ladder=self", "seed=7"])
    assert config.seed == 7
