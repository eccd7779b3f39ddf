"""configs/sweep: one line starts a curriculum, what the user says wins, and what is missing is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dual_policy_plugin.cli import main
from dual_policy_plugin.curriculum.config import CurriculumConfig, load_settings
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR
from tests.test_bad_input import SMALL, _clean, messages

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were

NAMES = ("curriculum_builtin", "curriculum_wandb", "curriculum_self_play")
DRY = [*SMALL, "trainer.total_timesteps=4096", "env.episode_steps=16", "evals.episodes=8", "--dry-run"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, which a dry run leaves empty."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def composed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The whole config as `--cfg all` prints it."""
    assert main(["train", *words, "--cfg", "all"]) == 0
    return OmegaConf.create(capsys.readouterr().out)


def settings_of(cfg: Any) -> CurriculumConfig:
    return load_settings(OmegaConf.to_container(cfg.hydra.sweeper, resolve=True))  # type: ignore[arg-type]


def error_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["train", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = messages(said.err)
    assert len(lines) == 1, lines
    return lines[0]


def test_there_are_just_these_configs() -> None:
    others = ["optuna_example"]  # tests/test_optuna.py
    assert sorted(path.stem for path in (CONFIG_DIR / "sweep").iterdir()) == sorted([*NAMES, *others])


@pytest.mark.parametrize("name", NAMES)
def test_each_selects_the_sweeper_and_needs_no_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(capsys, f"+sweep={name}", *(["hydra.sweeper.ladder.uri=x"] if name == "curriculum_wandb" else []))
    assert cfg.hydra.runtime.choices["hydra/sweeper"] == "dual_policy_curriculum"
    assert cfg.hydra.mode == "MULTIRUN"
    assert cfg.run == name
    assert settings_of(cfg).ladder is not None


def test_the_builtin_ladder_is_weak_medium_strong(capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(composed(capsys, "+sweep=curriculum_builtin"))
    assert settings.ladder is not None
    assert [one.uri for one in settings.ladder] == [f"builtin://arena/{name}" for name in ("weak", "medium", "strong")]


def test_the_wandb_ladder_is_every_version_weakest_first(capsys: pytest.CaptureFixture[str]) -> None:
    uri = "wandb://team/project/model/name"
    settings = settings_of(composed(capsys, "+sweep=curriculum_wandb", f"hydra.sweeper.ladder.uri={uri}"))
    assert settings.ladder is not None
    assert [(one.uri, one.type) for one in settings.ladder] == [(uri, "all")]
    assert settings.order == "weakest_first"


def test_what_the_user_says_wins_over_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trainer.total_timesteps=123", "run=mine", "hydra.sweeper.promote_at=0.6", "hydra.sweeper.ladder=[a,b]"]
    cfg = composed(capsys, "+sweep=curriculum_builtin", *words, "agent=mlp", "hydra/launcher=basic")
    assert (cfg.trainer.total_timesteps, cfg.run, cfg.agent.name) == (123, "mine", "mlp")
    settings = settings_of(cfg)
    assert settings.promote_at == 0.6
    assert settings.ladder is not None
    assert [one.uri for one in settings.ladder] == ["a", "b"]


@pytest.mark.parametrize(
    "order", [("+sweep=curriculum_builtin", "+user=demo"), ("+user=demo", "+sweep=curriculum_builtin")]
)
def test_the_later_of_two_files_wins(order: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(capsys, *order)
    assert cfg.run == order[1].partition("=")[2]
    assert cfg.hydra.mode == "MULTIRUN"


def test_a_dry_run_shows_stages_digests_jobs_and_cost_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METTA_HOURLY_COST", "3600000")
    assert main(["train", "+sweep=curriculum_builtin", *DRY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train_dir/curriculum_builtin: 3 stages; nothing was started, nothing written"
    rows = [line.split() for line in lines[3:6]]
    assert [(row[0], row[1], row[3], row[4], row[7]) for row in rows] == [
        ("1", "weak", "2", "8,192", "builtin://arena/weak"),
        ("2", "medium", "2", "8,192", "builtin://arena/medium"),
        ("3", "strong", "2", "8,192", "builtin://arena/strong"),
    ]
    text = "\n".join(lines)
    assert "\n  seed=1: 0:00:" in text
    assert text.endswith(" at $3.6e+06 an hour")


def test_an_override_of_a_swept_value_replaces_the_grid(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "+sweep=curriculum_builtin", "seed=7", *DRY]) == 0
    assert "jobs: one for each attempt at a stage" in capsys.readouterr().out


def test_a_wandb_ladder_without_its_artifact_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--dry-run"]):
        line = error_line(capsys, "+sweep=curriculum_wandb", *words)
        assert "hydra.sweeper.ladder.uri is not set" in line


def test_a_dry_run_without_a_ladder_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["-m", "seed=1,2"], ["hydra/sweeper=dual_policy_curriculum"], ["hydra/sweeper=basic"]):
        assert "+sweep=curriculum_builtin" in error_line(capsys, *words, "--dry-run")


def test_keys_of_the_curriculum_without_its_sweeper_say_how_to_choose_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "hydra.sweeper.ladder=[builtin://arena/weak]", "-m")
    assert "hydra.sweeper.ladder" in line
    assert "add hydra/sweeper=dual_policy_curriculum" in line
    line = error_line(capsys, "+sweep=curriculum_builtin", "hydra.sweeper.promot_at=0.6")
    assert "did you mean hydra.sweeper.promote_at?" in line
