"""Every run writes its report at its end; where it cannot, the run is complete all the same and says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from tests.curriculum.sweeps import FORAGER, RANDOM, state_of, sweep_words

TINY = [
    "env.num_envs=8", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "agent.hidden_size=16", "evals.episodes=8", "device=cpu", "+dual_policy=checkpoint",
    "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/random",
]  # fmt: skip


def train(folder: Path, *more: str, steps: int = 512) -> int:
    return main(["train", *TINY, f"train_dir={folder}", "run=r", f"trainer.total_timesteps={steps}", *more])


def test_a_run_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "t" / "r"
    (tmp_path / "mirror").mkdir()
    assert train(tmp_path / "t", f"trainer.sync_uri={tmp_path}/mirror") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {folder}/report.html"
    assert lines[-2] == f"result: {folder}/result.json"
    page = (folder / "report.html").read_text()
    assert "<b><bdi>finished</bdi></b>" in page
    assert "builtin://arena/random" in page
    assert (tmp_path / "mirror" / "r" / "report.html").read_text() == page


def test_a_run_without_a_report_has_none_and_goes_on_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "report=false") == 0
    assert not (tmp_path / "r" / "report.html").exists()
    assert "report:" not in capsys.readouterr().out
    assert train(tmp_path, steps=768) == 0
    assert "<bdi>768</bdi>" in (tmp_path / "r" / "report.html").read_text()


def test_a_report_that_cannot_be_written_leaves_a_complete_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "t" / "r"
    (folder / "report.html").mkdir(parents=True)
    assert train(tmp_path / "t") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{folder} is complete, but its report is not written ({folder}/report.html could not")
    assert line.endswith(f"`dual-policy report {folder}` writes it")
    assert json.loads((folder / "result.json").read_text())["agent_step"] == 512


@pytest.mark.slow
def test_a_curriculum_sweep_ends_with_its_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]", "hydra.sweeper.max_attempts=1", "report=true")
    assert main(words) == 1  # nobody learns to beat a forager in a second
    page = (tmp_path / "s" / "report.html").read_text()
    assert f"report: {tmp_path}/s/report.html" in caplog.text
    for gate in state_of(tmp_path)["gates"]:
        assert gate["why"] in page
    assert "Stopped at stage 2 of 2." in page
    assert (tmp_path / "s" / "0" / "report.html").exists()
