"""Optuna's sweeper over real trainings: it sees objectives and failures; not installed, one line says so."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from dual_policy_plugin.cli import main
from tests.test_bad_input import ARENA, TOTAL, TOY, TOY_MODULE, URI, _clean, error_line

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs hydra-optuna-sweeper"),
    pytest.mark.filterwarnings("ignore"),  # Optuna 2 is older than what it imports
]
SWEEP = ["-m", "+sweep=optuna_example", "run=o", "report=false"]
SPACE = [f"{TOTAL}=256", "evals.episodes=8", "trainer.learning_rate=interval(0.001,0.01)"]
OPPONENTS = f"{URI}=choice(builtin://arena/random,builtin://arena/forager)"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, where an env of a user is installed."""
    site = tmp_path / "site"
    (site / "toy_game-1.dist-info").mkdir(parents=True)
    (site / "toy_game-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy_game\nVersion: 1\n")
    (site / "toy_game-1.dist-info/entry_points.txt").write_text("[dual_policy.envs]\ntoy_game = toy_game:make\n")
    (site / "toy_game.py").write_text(TOY_MODULE)
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("toy_game", None)


def sweep(*words: str) -> int:
    return main(["train", *SWEEP, *words])


def study(place: Path) -> dict[str, Any]:
    """What the sweeper has written down."""
    return dict(yaml.safe_load((place / "train_dir/o/optimization_results.yaml").read_text()))


def objectives(place: Path) -> dict[int, float | None]:
    """Job -> the objective of its result.json."""
    found = place.glob("train_dir/o/*/result.json")
    return {int(path.parent.name): json.loads(path.read_text())["objective"] for path in found}


def settings(place: Path, job: int) -> dict[str, Any]:
    trainer = yaml.safe_load((place / f"train_dir/o/{job}/config.yaml").read_text())["trainer"]
    keys = ("learning_rate", "ent_coef")
    uri = trainer["dual_policy"]["checkpoint_npc"]["uri"]
    return {f"trainer.{key}": trainer[key] for key in keys} | {URI: uri}


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "better"), [("maximize", max), ("minimize", min)])
def test_the_study_goes_the_right_way_and_the_same_command_repeats_it(place: Path, direction: str, better: Any) -> None:
    words = [*ARENA[:-2], *SPACE, OPPONENTS, "hydra.sweeper.n_trials=5", f"hydra.sweeper.direction={direction}"]
    assert sweep(*words) == 0
    values = objectives(place)
    assert sorted(values) == [0, 1, 2, 3, 4]
    assert max(values.values()) > min(values.values()), "or there would be no direction"
    best = study(place)
    assert best["best_value"] == better(values.values())
    job = next(num for num in sorted(values) if values[num] == best["best_value"])
    assert settings(place, job) == {**best["best_params"], URI: best["best_params"][URI].replace("\\", "")}
    rates = [settings(place, job)["trainer.learning_rate"] for job in values]
    assert len(set(rates)) == 5
    assert all(0.001 <= rate <= 0.01 for rate in rates)

    before = {path: path.read_bytes() for path in place.glob("train_dir/o/*/metrics.jsonl")}
    times = {path: path.stat().st_mtime_ns for path in before}
    assert sweep(*words) == 0
    assert study(place) == best
    assert {path: path.stat().st_mtime_ns for path in before} == times, "nothing was trained again"


def test_a_trial_that_diverges_or_has_no_objective_has_failed_and_the_study_goes_on(
    place: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = [*TOY, "dual_policy=off", f"{TOTAL}=1088", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=3"]
    caplog.set_level(logging.WARNING)
    broken = [*toy, "+env.breaks_at=choice(5,1000)", "evals.episodes=0"]
    assert sweep(*broken) == 0
    failed = [message for message in caplog.messages if "Failed experiment" in message]
    values = objectives(place)
    assert len(failed) + len(values) == 4
    assert failed
    assert values
    assert all("not finite" in message for message in failed)
    assert study(place)["best_params"]["+env.breaks_at"] == 1000
    assert study(place)["best_value"] == max(values.values())
    assert "error: job " in capsys.readouterr().err

    caplog.clear()
    short = ["run=o", f"{TOTAL}=64", "evals.episodes=0", "hydra.sweeper.n_trials=2", "train_dir=short"]
    assert sweep(*TOY, "dual_policy=off", *short) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        line == "error: every trial of the study has failed; the errors above say why, and no best one was written down"
    )
    failed = [message for message in caplog.messages if "Failed experiment" in message]
    assert failed == ["Failed experiment: Return value must be float-castable. Got 'None'."] * 2
    assert json.loads((place / "short/o/0/result.json").read_text())["objective"] is None


def test_a_database_that_it_cannot_use_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(*ARENA[:-2], "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=x") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: hydra.sweeper.storage cannot be used (AssertionError): Optuna 2 needs SQLAlchemy below 2"
    )
    assert not (place / "train_dir/o/0").exists()


def test_without_the_package_it_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweepers: Any = ConfigStore.instance().repo["hydra"]["sweeper"]
    assert main(["train", *SWEEP[1:], *ARENA[:-2], "--cfg", "job"]) == 0  # it is found where it is installed
    monkeypatch.delitem(sweepers, "optuna.yaml")
    wanted = (
        "error: hydra/sweeper=optuna comes with hydra-optuna-sweeper, which is not installed; "
        "pip install 'dual-policy-plugin[optuna]'"
    )
    assert error_line(capsys, *SWEEP, *ARENA[:-2]) == wanted
    assert error_line(capsys, "-m", "hydra/sweeper=optuna", *ARENA) == wanted


@pytest.mark.slow
@pytest.mark.skipif(
    not list(Path(sys.prefix).glob("lib/python*/site-packages/skypilot-*.dist-info")), reason="needs SkyPilot"
)
def test_its_sqlalchemy_is_one_that_skypilot_works_with() -> None:
    program = "import optuna, sky, sky.global_user_state, sqlalchemy; print(hasattr(sky, 'Task'))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
