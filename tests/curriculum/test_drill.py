"""A killed curriculum sweep ends as one that was not; here with three kills, with twenty in `make drill-curriculum`.

The fast tests show that the drill's witnesses see what they are there for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.files import publish_json
from tests.curriculum.drill import changed_results, differences, draw_moments, drill, ended_twice, phase_of

PID = 77


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path: Path) -> None:
    found = drill(tmp_path, kills=3, seed=1)
    assert found.faults == []
    assert len(found.hits) == 3  # what they hit is a matter of the clock
    assert found.num_jobs == 6  # two jobs against random, which they pass, and two attempts at the forager


def sweep(folder: Path, **changes: Any) -> Path:
    """A sweep's folder with one job."""
    (folder / "0/checkpoints").mkdir(parents=True)
    (folder / "0/checkpoints/model_0001.safetensors").write_bytes(b"bits")
    (folder / "0/metrics.jsonl").write_bytes(b"{}\n")
    job = {"num": 0, "stage": 1, "attempt": 1, "elapsed_s": 1.5, "objective": 0.5}
    state = {"status": "running", "stage": 1, "attempt": 1, "rungs": [{"rating": 0.0}], "jobs": [job], **changes}
    (folder / "curriculum.json").write_text(json.dumps(state))
    return folder


def test_only_times_may_differ(tmp_path: Path) -> None:
    one = sweep(tmp_path / "one")
    late = {"num": 0, "stage": 1, "attempt": 1, "elapsed_s": 99.0, "objective": 0.5}
    other = sweep(tmp_path / "other", jobs=[late])
    assert differences(one, other) == []
    (other / "0/checkpoints/model_0001.safetensors").write_bytes(b"bitz")
    (other / "0/metrics.jsonl").unlink()
    assert differences(one, other) == [
        "0/checkpoints/model_0001.safetensors is not the same",
        "0/metrics.jsonl is not the same",
    ]
    third = sweep(tmp_path / "third", stage=2)
    assert differences(one, third) == ["curriculum.json: stage is 2, in peace 1"]


def test_a_result_that_is_written_again_is_seen_though_it_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "train_dir/toy/0/result.json"
    path.parent.mkdir(parents=True)
    seen: dict[Path, tuple[int, int]] = {}
    publish_json(path, {"objective": 0.5})
    assert changed_results(tmp_path, seen) == []
    assert changed_results(tmp_path, seen) == []
    publish_json(path, {"objective": 0.5})
    assert changed_results(tmp_path, seen) == [
        "train_dir/toy/0/result.json was written again: its job ran twice to its end"
    ]


def test_a_job_that_says_twice_that_it_is_done_is_seen_over_all_starts(tmp_path: Path) -> None:
    done = "toy/{}: 100 %\nresult: train_dir/toy/{}/result.json\n"
    (tmp_path / "peace.log").write_text(done.format(1, 1))
    (tmp_path / "start_01.log").write_text(done.format(1, 1) + done.format(10, 10))
    assert ended_twice(tmp_path) == []
    (tmp_path / "last.log").write_text(done.format(10, 10))
    assert ended_twice(tmp_path) == ["job 10 said 2 times that it is done"]


def test_the_phase_is_told_from_files(tmp_path: Path) -> None:
    def hold(folder: Path, pid: int) -> None:
        (folder / "run.lock").write_text(json.dumps({"pid": pid}))

    folder = tmp_path / "toy"
    assert phase_of(folder, PID) == "start"
    sweep(folder, rungs=[{"rating": None}])
    hold(folder, PID - 1)
    assert phase_of(folder, PID) == "start"
    hold(folder, PID)
    assert phase_of(folder, PID) == "rate"
    sweep(tmp_path / "rated", jobs=[])
    hold(tmp_path / "rated", PID)
    assert phase_of(tmp_path / "rated", PID) == "plan 1.1"
    rated = sweep(tmp_path / "planned")
    hold(rated, PID)
    assert phase_of(rated, PID) == "launch 0"
    hold(rated / "0", PID)
    assert phase_of(rated, PID) == "train 0"
    (rated / "0/result.json").write_text("{}")
    assert phase_of(rated, PID) == "gate 1.1"


def test_moments_are_seeded_sorted_and_hit_a_training_and_a_gate() -> None:
    phases = [("start", 1.0), ("train 0", 5.0), ("gate 1.1", 0.5), ("train 1", 5.0)]
    for seed in range(20):
        moments = draw_moments(phases, 6, random.Random(seed))
        assert moments == draw_moments(phases, 6, random.Random(seed))
        order = [[name for name, _ in phases].index(phase) for phase, _ in moments]
        assert order == sorted(order)
        assert all(0 <= offset_s < dict(phases)[phase] for phase, offset_s in moments)
        kinds = {phase.split()[0] for phase, _ in moments}
        assert {"train", "gate"} <= kinds
    assert draw_moments(phases, 6, random.Random(1)) != draw_moments(phases, 6, random.Random(2))
