"""Whole sweeps with real, tiny runs through the real program."""

from __future__ import annotations

import json
import logging
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin import train as train_module
from dual_policy_plugin.cli import main
from dual_policy_plugin.curriculum import batches, gates, stages, sweep_files
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.npc.lock import read_lock
from dual_policy_plugin.run.lock import check_unlocked, lock_run, unlock_run
from tests.curriculum.sweeps import (
    FORAGER,
    RANDOM,
    SMALL,
    Killed,
    comparable,
    kill_before,
    kill_cases,
    state_of,
    sweep_words,
)
from tests.harness import logging_as_it_was
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were


def test_a_sweep_walks_through_its_stages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two jobs a stage; the first stage is passed, the second is tried twice and left."""
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]", "seed=3,4", "hydra.sweeper.on_fail=advance")
    caplog.set_level(logging.INFO)
    assert main(words) == 0
    state = state_of(tmp_path)
    assert [rung["uri"] for rung in state["rungs"]] == [RANDOM, FORAGER]
    assert [(gate["stage"], gate["attempt"], gate["decision"]) for gate in state["gates"]] == [
        (1, 1, "promote"), (2, 1, "repeat"), (2, 2, "advance"),
    ]  # fmt: skip
    jobs = state["jobs"]
    assert [(job["num"], job["stage"], job["attempt"]) for job in jobs] == [
        (0, 1, 1), (1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2),
    ]  # fmt: skip
    assert {job["status"] for job in jobs} == {"finished"}
    _check_jobs(tmp_path, jobs, state)

    # the best of a stage is the job with the highest objective, the first of the newest attempt of equals
    for gate in state["gates"]:
        rivals = [job for job in jobs if job["stage"] == gate["stage"] and job["attempt"] <= gate["attempt"]]
        best = max(rivals, key=lambda job: (job["objective"], job["attempt"], -job["num"]))
        assert gate["job"] == best["num"]
        assert gate["episodes"] == 64
        assert gate["passed"] == (gate["low"] > 0.2)
    assert (state["status"], state["stage"], state["attempt"]) == ("finished", 2, 2)
    final = jobs[state["gates"][-1]["job"]]
    assert state["policy"] == {
        "path": final["checkpoint"], "sha256": final["sha256"], "job": final["num"], "stage": 2,
    }  # fmt: skip
    assert caplog.messages[-1] == f"{tmp_path}/s is finished: policy {tmp_path}/s/{final['checkpoint']}"


def _check_jobs(folder: Path, jobs: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Each job has its NPC by digest, its seed, and begins with the policy that the sweep had come to."""
    digests = {rung["uri"]: rung["sha256"] for rung in state["rungs"]}
    starts = {1: None, 2: state["gates"][0]["job"], 3: state["gates"][1]["job"]}
    for job in jobs:
        path = folder / "s" / str(job["num"])
        assert f'trainer.dual_policy.lock="{folder}/s/npc.lock.json"' in job["overrides"]
        uri = RANDOM if job["stage"] == 1 else FORAGER
        lock = {entry.role: entry for entry in read_lock(path / "npc.lock.json")}
        assert (lock["npc"].uri, lock["npc"].sha256) == (uri, digests[uri])
        start = starts[job["stage"] + job["attempt"] - 1]
        if start is None:
            assert "initial" not in lock
        else:
            assert lock["initial"].sha256 == jobs[start]["sha256"]
        seed = 3 + job["num"] % 2 + 1000 * (job["attempt"] - 1)
        assert re.search(rf"^seed: {seed}$", (path / "config.yaml").read_text(), re.MULTILINE)
        result = json.loads((path / "result.json").read_text())
        assert (result["objective"], result["agent_step"]) == (job["objective"], job["agent_step"])


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final state of a sweep of two stages, the second tried twice, that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unkilled")
    with logging_as_it_was():  # a fixture of the whole module is made before those of a test
        assert main(sweep_words(folder, f"[{RANDOM},{FORAGER}]")) == 1
    return comparable(state_of(folder), folder)


# before which call: of 10 states (begun; planned, finished, decided, three times), 3 gates and 3 results of jobs
KILLS = [(sweep_files, "write_state", number) for number in (1, 2, 3, 4, 6, 7, 10)]
KILLS += [(gates, "evaluate_pinned", number) for number in (1, 2, 3)]
KILLS += [(train_module, "run_result", number) for number in (1, 2, 3)]
FAST = [(sweep_files, "write_state", 3)]


@pytest.mark.parametrize(("module", "name", "number"), kill_cases(KILLS, FAST))
def test_a_killed_sweep_ends_as_if_it_had_not_been(
    tmp_path: Path, unkilled: dict[str, Any], module: Any, name: str, number: int
) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]")
    kill_before(module, name, number, words)
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert main(words) == 1
    assert comparable(state_of(tmp_path), tmp_path) == unkilled
    assert {path: path.stat().st_mtime_ns for path in results} == results  # no finished job ran again


def test_the_same_command_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM}]", "hydra.sweeper.promote_at=0.8", "hydra.sweeper.max_attempts=1")
    lines = []
    for _ in range(2):
        assert main(words) == 1
        lines.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")])
        made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.lock"}
        lines.append([str(made)])
    assert lines[:2] == lines[2:]
    assert re.fullmatch(
        rf"error: {tmp_path}/s stopped at stage 1: win rate 0\.\d+ .* does not exceed promote_at=0\.8; "
        r"1 of 1 attempts, on_fail=stop; no policy passed stage 1; "
        r"a larger hydra\.sweeper\.max_attempts goes on from here",
        lines[0][0],
    )


def test_a_stopped_sweep_goes_on_with_more_attempts_as_if_it_had_had_them(
    tmp_path: Path, unkilled: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]")
    assert main([*words, "hydra.sweeper.max_attempts=1"]) == 1
    assert [gate["decision"] for gate in state_of(tmp_path)["gates"]] == ["promote", "stop"]
    assert main(words) == 1  # max_attempts=2
    state = comparable(state_of(tmp_path), tmp_path)
    assert [gate["decision"] for gate in state["gates"]] == ["promote", "repeat", "stop"]
    assert state["gates"][1].pop("why").endswith("1 of 1 attempts, on_fail=stop; taken anew: attempt 1 of 2")
    wanted = deepcopy(unkilled)
    del wanted["gates"][1]["why"]
    assert state == wanted

    before, line = (tmp_path / "s/curriculum.json").read_bytes(), ""
    capsys.readouterr()
    assert main([*words, "hydra.sweeper.max_attempts=1"]) == 2  # the repeat would not have been
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "attempt 1 at stage 2 was followed by repeat, and by these settings it is stop" in line
    assert (tmp_path / "s/curriculum.json").read_bytes() == before
    assert main([*words, "hydra.sweeper.on_fail=advance"]) == 0
    state = state_of(tmp_path)
    assert [gate["decision"] for gate in state["gates"]] == ["promote", "repeat", "advance"]
    assert (state["status"], state["policy"]["job"]) == ("finished", state["gates"][2]["job"])


def test_a_job_that_outlives_its_sweeper_is_waited_for_and_not_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster: one job is done, the other still runs when the same command is given again."""
    words = sweep_words(tmp_path, f"[{RANDOM}]", "seed=1,2", "hydra.sweeper.max_batch_size=1")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "launch_batch", lambda request, batch: _only_the_first(real, request, batch))
        real = batches.launch_batch
        with pytest.raises(Killed):
            main(words)
    assert [job["status"] for job in state_of(tmp_path)["jobs"]] == ["finished", "planned"]
    (tmp_path / "s/1").mkdir()
    lock = lock_run(tmp_path / "s/1", 0.0)
    looks: list[Path] = []
    for num_blind in (0, 1):  # the second time it takes its folder behind the first look

        def look(folder: Path, num_blind: int = num_blind) -> None:
            looks.append(folder)
            if len(looks) > num_blind:
                check_unlocked(folder)

        looks.clear()
        monkeypatch.setattr(stages, "check_unlocked", look)
        capsys.readouterr()
        assert main(words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{tmp_path}/s/1 is in use by process" in lines[-1]
        assert looks == [tmp_path / "s/1"] * (num_blind + 1)
        assert [job["status"] for job in state_of(tmp_path)["jobs"]] == ["finished", "planned"]
    unlock_run(lock)
    assert main(words) == 0
    assert [job["status"] for job in state_of(tmp_path)["jobs"]] == ["finished", "finished"]


def _only_the_first(real: Any, request: Any, batch: Any) -> Any:
    if batch[0].num > 0:
        raise Killed
    return real(request, batch)


def test_a_spoilt_result_and_a_lost_checkpoint_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM}]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_collect", lambda *args: None)
        assert main(words) == 2  # as where it is killed before it has seen that the job is done
    folder = tmp_path / "s/0"
    checkpoint = folder / json.loads((folder / "result.json").read_text())["checkpoint"]
    content = checkpoint.read_bytes()
    checkpoint.unlink()
    result = (folder / "result.json").read_text()
    for text, said in (
        (result, f"error: {checkpoint}, which job 0 ended with, cannot be read: No such file"),
        ('{"objective": 1}', f"error: {folder}/result.json is not as a run writes it ('checkpoint')"),
    ):
        (folder / "result.json").write_text(text)
        capsys.readouterr()
        assert main(words) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith(said)
    checkpoint.write_bytes(content)
    (folder / "result.json").write_text(result)
    assert main(words) == 0


@pytest.mark.slow
def test_a_job_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM}]", "trainer.num_minibatches=4096,2")
    assert main(words) == 0
    jobs = state_of(tmp_path)["jobs"]
    assert [(job["status"], job["objective"] is None) for job in jobs] == [("failed", True), ("finished", False)]
    assert state_of(tmp_path)["gates"][0]["job"] == 1
    assert "error: job 0" in capsys.readouterr().err


def test_where_all_jobs_fail_the_sweep_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM}]", "seed=1,2", "hydra.sweeper.max_batch_size=1")
    real = train_module.build_parts

    def broken(*args: Any, **values: Any) -> Any:
        raise RunError("the disk is full; free some")

    monkeypatch.setattr(train_module, "build_parts", broken)
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2  # each job's own line
    assert all("the disk is full" in line for line in errors)
    state = state_of(tmp_path)
    assert ([job["status"] for job in state["jobs"]], state["gates"]) == (["failed", "failed"], [])

    monkeypatch.setattr(train_module, "build_parts", real)  # mended: the same command tries them again
    assert main(words) == 0
    assert [job["status"] for job in state_of(tmp_path)["jobs"]] == ["finished", "finished"]


@pytest.mark.slow
def test_a_sweep_that_is_sent_back_comes_again_with_another_policy(tmp_path: Path) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]", "hydra.sweeper.on_fail=demote")
    assert main([*words, "hydra.sweeper.max_attempts=1", "hydra.sweeper.max_demotions=1"]) == 1
    state = state_of(tmp_path)
    assert [(gate["stage"], gate["attempt"], gate["job"], gate["decision"]) for gate in state["gates"]] == [
        (1, 1, 0, "promote"), (2, 1, 1, "demote"), (1, 2, 2, "promote"), (2, 2, 3, "stop"),
    ]  # fmt: skip
    starts = [read_lock(tmp_path / f"s/{job}/npc.lock.json")[-1] for job in (2, 3)]
    assert [one.role for one in starts] == ["initial", "initial"]
    assert [one.sha256 for one in starts] == [state["jobs"][0]["sha256"], state["jobs"][2]["sha256"]]


def test_self_play_over_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sweep_words(tmp_path, "self", "hydra.sweeper.stages=2", f"hydra.sweeper.start={RANDOM}")
    words += ["hydra.sweeper.carry=nothing"]
    assert main(words) == 0
    state = state_of(tmp_path)
    first, second = state["jobs"]
    assert [(rung["name"], rung["sha256"]) for rung in state["rungs"]] == [
        ("random", state["rungs"][0]["sha256"]), ("stage_1", first["sha256"]),
    ]  # fmt: skip
    assert state["rungs"][1]["uri"] == f"file://{tmp_path}/s/{first['checkpoint']}"
    (entry,) = read_lock(tmp_path / "s/1/npc.lock.json")  # carry=nothing: no policy to start from
    assert entry.sha256 == first["sha256"]
    assert not any("initial_policy" in word for word in second["overrides"])
    assert [one["opponent"] for one in state["gates"][1]["forgotten"]] == ["random"]

    checkpoint = tmp_path / "s" / first["checkpoint"]  # the same command notices that an NPC has changed
    checkpoint.write_bytes((tmp_path / "s" / second["checkpoint"]).read_bytes())
    capsys.readouterr()
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(checkpoint) in line
    assert "bring the pinned file back" in line


@pytest.mark.slow
def test_weakest_first_orders_by_games(tmp_path: Path) -> None:
    words = sweep_words(
        tmp_path, f"[{FORAGER},{RANDOM}]", "hydra.sweeper.order=weakest_first", "hydra.sweeper.rating_episodes=32",
        "hydra.sweeper.max_attempts=1", "env.episode_steps=64",
    )  # fmt: skip
    assert main(words) == 1
    random, forager = state_of(tmp_path)["rungs"]
    assert (random["name"], forager["name"]) == ("random", "forager")
    assert random["rating"] == 0  # the anchor
    assert forager["low"] < forager["rating"] < forager["high"]
    assert forager["rating"] > 200
    assert state_of(tmp_path)["gates"][0]["opponent"] == "random"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with three checkpoints or more."""
    folder = tmp_path_factory.mktemp("old")
    words = [f"train_dir={folder}", "run=old", "trainer.total_timesteps=600", "trainer.checkpoint_interval=1"]
    with logging_as_it_was():
        assert main(["train", *SMALL, *words]) == 0
    return folder / "old"


@pytest.mark.slow
def test_a_folder_may_be_a_ladder(tmp_path: Path, old_run: Path) -> None:
    words = sweep_words(tmp_path, f"{{uri: {old_run}, type: all}}", "hydra.sweeper.promote_at=0.01")
    assert main(words) == 0
    state = state_of(tmp_path)
    assert [Path(rung["uri"]).name for rung in state["rungs"]] == [
        f"model_000{epoch}.safetensors" for epoch in range(len(state["rungs"]))
    ]
    assert len(state["rungs"]) >= 3
    assert [gate["decision"] for gate in state["gates"]] == ["promote"] * len(state["rungs"])
    assert [one["opponent"] for one in state["gates"][-1]["forgotten"]] == [
        rung["name"] for rung in state["rungs"][:-1]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["type: latest", "type: top, metric: epoch"])
def test_the_newest_or_best_of_a_folder_are_climbed_upwards(tmp_path: Path, old_run: Path, selector: str) -> None:
    words = sweep_words(tmp_path, f"{{uri: {old_run}, {selector}, range: 3}}", "hydra.sweeper.promote_at=0.01")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_run_attempt", _kill)
        with pytest.raises(Killed):
            main(words)
    names = sorted(path.name for path in (old_run / "checkpoints").glob("model_*"))
    assert [Path(rung["uri"]).name for rung in state_of(tmp_path)["rungs"]] == names[-3:]


@pytest.mark.slow
def test_whom_the_jobs_start_from_and_are_measured_by_stays_the_same(tmp_path: Path, old_run: Path) -> None:
    """A folder means its newest file; for the jobs of a sweep that has begun, the one that was the newest then."""
    folder = tmp_path / "copy"
    shutil.copytree(old_run, folder)
    words = sweep_words(tmp_path, f"[{RANDOM},{RANDOM}]", "hydra.sweeper.carry=nothing")
    words += [f"trainer.initial_policy.uri={folder}", f"evals.opponents=[{folder}]", f"evals.held_out=[{folder}]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_run_attempt", _kill)
        with pytest.raises(Killed):
            main(words)
    lock = {entry.role: entry for entry in read_lock(tmp_path / "s/npc.lock.json")}
    assert lock.keys() == {"npc", "initial", "opponent", "held_out"}
    shutil.copy(folder / "checkpoints/model_0000.safetensors", folder / "checkpoints/model_0099.safetensors")
    assert main(words) == 0
    for job in (0, 1):
        theirs = {entry.role: entry for entry in read_lock(tmp_path / f"s/{job}/npc.lock.json")}
        assert theirs == lock | {"npc": theirs["npc"]}


def _kill(*args: object) -> None:
    raise Killed


@pytest.mark.slow
def test_jobs_run_in_processes_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Through submitit, with a grid of two jobs of which one fails: its error comes back, and the other goes on."""
    pytest.importorskip("submitit")
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]", "trainer.num_minibatches=4096,2")
    words += ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "hydra.sweeper.max_attempts=1"]
    words += [f"hydra.launcher.submitit_folder={tmp_path}/submitit"]
    assert main(words) == 1
    state = state_of(tmp_path)
    assert [job["status"] for job in state["jobs"]] == ["failed", "finished", "failed", "finished"]
    assert [(gate["job"], gate["decision"]) for gate in state["gates"]] == [(1, "promote"), (3, "stop")]
    assert "job 0 failed: trainer.num_minibatches=4096 is more than the 32 learner rows; use fewer" in caplog.messages
    lock = {entry.role: entry for entry in read_lock(tmp_path / "s/3/npc.lock.json")}
    assert lock["initial"].sha256 == state["jobs"][1]["sha256"]
