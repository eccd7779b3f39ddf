"""A run's mirror: what is sent in which order, what is fetched, who may write; on a loopback S3 and in a folder.

    python -m tests.run.test_run_mirror SYNC_URI FOLDER

kills a run again and again, each time with its directory; processes are forked there, and not from the tests' own.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import dual_policy_plugin.train as program
from dual_policy_plugin import files, heartbeat
from dual_policy_plugin.cli import main
from dual_policy_plugin.config import TrainerConfig
from dual_policy_plugin.errors import ConfigError, RunError, StorageError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.mirror import folder_place, listing, s3_place, transfer
from dual_policy_plugin.mirror import lease as lease_module
from dual_policy_plugin.mirror.lease import Lease
from dual_policy_plugin.mirror.listing import LIST_NAME, STATE_NAME, read_list
from dual_policy_plugin.mirror.places import OWNER_NAME, Place
from dual_policy_plugin.mirror.transfer import MAX_HELD, fetch_files, saved_iteration, take_snapshot
from dual_policy_plugin.npc.sources import s3_client
from dual_policy_plugin.npc.sources.http import Retries
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run.mirror import RunMirror, open_place, read_mirrored, read_result
from dual_policy_plugin.run_state import Counters
from dual_policy_plugin.train import train
from tests.services.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[2]
RUN = "team/exp"
PREFIX = "s3://runs/some/prefix/"
MIRRORED = f"runs/some/prefix/{RUN}/"


def save(run: RunDirectory, epoch: int, *, has_checkpoint: bool = True) -> None:
    """What a run does after iteration `epoch`; every byte depends on `epoch` alone."""
    run.append_metrics({"iteration": epoch, "x": epoch / 2})
    run.append_timing({"iteration": epoch})
    if has_checkpoint:
        run.save_checkpoint(epoch, f"weights of {epoch}".encode() * 50, score=float(epoch % 2))
    facts = {"counters": {"iteration": epoch}, "roster": None}
    state = safetensors.numpy.save({"x": np.full(100, epoch)}, metadata={"run": json.dumps(facts)})
    run.save_state("training.safetensors", state)


def open_run(folder: Path, keep: int = 2) -> RunDirectory:
    return RunDirectory.open(folder / RUN, config_yaml="seed: 1", keep_checkpoints=keep)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a run directory or of a mirror, without lock and lease."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in named.items() if not name.startswith("mirror/")}


def objects(server: S3Server) -> dict[str, bytes]:
    """The mirror's objects in S3, without its own two."""
    client = s3_client.client()
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="runs").get("Contents", ())]
    named = {key: client.get_object(Bucket="runs", Key=key)["Body"].read() for key in keys}
    prefix = MIRRORED.removeprefix("runs/")
    assert all(key.startswith(prefix) for key in named)
    return {key.removeprefix(prefix): data for key, data in named.items() if "/mirror/" not in key}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """One for all tests, since each new one needs a new client."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An empty bucket, and a client that gives up at once."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(s3_place, "RETRIES", Retries(attempts=2, first_wait_s=0.01))
    client = s3_client.client()
    client.create_bucket(Bucket="runs")
    yield server
    server.faults.clear()
    server.exchanges.clear()
    server.faults.fired.clear()
    for entry in client.list_objects_v2(Bucket="runs").get("Contents", ()):
        client.delete_object(Bucket="runs", Key=entry["Key"])


@pytest.fixture(params=["s3", "folder"])
def sync_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each kind of place."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return PREFIX
    (tmp_path / "mount").mkdir()
    return f"file://{tmp_path}/mount"


def mirror_of(folder: Path, sync_uri: str = PREFIX) -> RunMirror:
    """Opens the mirror of the run in `folder`, as a machine does that has that folder."""
    return RunMirror.open(sync_uri, RUN, folder / RUN)


def send(mirror: RunMirror) -> bool:
    mirror.advance()
    return mirror.wait()


def write(place: Place, name: str, data: bytes) -> None:
    """Writes an object, whatever stands there and whoever has the lease."""
    found = place.get(name)
    assert place.swap(name, data, found.version if found else None) is not None


def owner(sync_uri: str, **note: Any) -> None:
    """Puts a lease there, as a process of another machine has it."""
    other = {"id": "other", "host": "far", "pid": 7, "process": "boot ns 7 1", "length_s": 90.0, "is_held": True}
    write(open_place(sync_uri, RUN), OWNER_NAME, json.dumps(other | note).encode())


def owner_note(sync_uri: str) -> dict[str, Any]:
    found = open_place(sync_uri, RUN).get(OWNER_NAME)
    assert found is not None
    note: dict[str, Any] = json.loads(found.data)
    return note


# what is sent


def test_the_mirror_is_a_run_directory(tmp_path: Path, sync_uri: str) -> None:
    with mirror_of(tmp_path / "a", sync_uri) as mirror, open_run(tmp_path / "a") as run:
        for epoch in range(6):
            save(run, epoch)
            assert send(mirror)
        run.write_result({"objective": 1.5})
        mirror.finish()
        here = bytes_of(run.path)
    assert {"config.yaml", "metrics.jsonl", "timing.jsonl", "result.json", STATE_NAME, "state/checkpoints.json"} < set(
        here
    )
    numbers = [0, 1, 4, 5]  # the first, the best, the newest two
    assert sorted(name for name in here if "model_" in name) == [
        f"checkpoints/model_000{i}.safetensors" for i in numbers
    ]
    there = tmp_path / "mount" / RUN
    if sync_uri != PREFIX:
        assert bytes_of(there) == here
    with mirror_of(tmp_path / "b", sync_uri), open_run(tmp_path / "b") as other:
        assert bytes_of(other.path) == here
        assert other.best_checkpoint() == (1, 1.0)


def test_s3_has_the_same_names_and_bytes(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        for epoch in range(4):
            save(run, epoch)
            assert send(mirror)
            assert objects(bucket) == bytes_of(run.path)


def writes(server: S3Server, first: int) -> list[str]:
    """Names that were written or removed from exchange `first` on, without the lease."""
    done = [
        f"{'-' if exchange.method == 'DELETE' else ''}{exchange.path.removeprefix(f'/{MIRRORED}')}"
        for exchange in server.exchanges[first:]
        if exchange.method in ("PUT", "DELETE")
    ]
    return [name for name in done if name != OWNER_NAME]


def test_the_state_comes_after_all_that_it_needs_and_removals_last(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path, keep=1) as run:
        for epoch in (0, 1):
            save(run, epoch)
            assert send(mirror)
        first = len(bucket.exchanges)
        save(run, 3)
        run.write_result({"objective": 1})
        assert send(mirror)
        assert writes(bucket, first) == [
            LIST_NAME, "checkpoints/model_0003.safetensors", "checkpoints/latest.safetensors",
            "metrics.jsonl", "state/checkpoints.json", "timing.jsonl", STATE_NAME, "result.json", LIST_NAME,
        ]  # fmt: skip
        first = len(bucket.exchanges)
        save(run, 4)
        assert send(mirror)
        assert writes(bucket, first) == [
            LIST_NAME, "checkpoints/model_0004.safetensors", "checkpoints/latest.safetensors", "metrics.jsonl",
            "state/checkpoints.json", "timing.jsonl", STATE_NAME, LIST_NAME, "-checkpoints/model_0003.safetensors",
        ]  # fmt: skip


def test_what_is_there_is_not_sent_again(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        assert send(mirror)
        first = len(bucket.exchanges)
        assert send(mirror)
        assert writes(bucket, first) == []
        (run.path / "config.yaml").write_bytes((run.path / "config.yaml").read_bytes())  # touched
        assert send(mirror)
        assert writes(bucket, first) == []
    with mirror_of(tmp_path) as mirror:  # another process
        first = len(bucket.exchanges)
        assert send(mirror)
        assert writes(bucket, first) == []
    with mirror_of(tmp_path / "b") as mirror, open_run(tmp_path / "b"):  # another machine
        first = len(bucket.exchanges)
        assert send(mirror)
        assert writes(bucket, first) == []


# broken off


def whole_run(folder: Path, epochs: range) -> None:
    """The run up to the last of `epochs`, as it is without interruptions."""
    with open_run(folder) as run:
        run.truncate_metrics(saved_iteration(run.path / STATE_NAME))
        for epoch in epochs:
            save(run, epoch)


@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_broken_off_between_any_two_writes(
    tmp_path: Path, bucket: S3Server, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it stops, another machine continues from a state that was saved, and ends as if there had been none."""
    whole_run(tmp_path / "whole", range(6))
    wanted = bytes_of(tmp_path / "whole" / RUN)
    states = []
    for number in (0, 1, 3, 5, 6, 7, 8, 9, 10):
        sync_uri = f"s3://runs/{number}"
        with mirror_of(tmp_path / f"{number}a", sync_uri) as mirror, open_run(tmp_path / f"{number}a") as run:
            for epoch in range(4):
                save(run, epoch)
            assert send(mirror)
            save(run, 4)
            bucket.faults.add(f"/{number}/{RUN}/", kind, times=None, after=number)
            is_sent = send(mirror)
            bucket.faults.clear()
        open_place(sync_uri, RUN).delete(OWNER_NAME)  # its machine is gone for long
        with mirror_of(tmp_path / f"{number}b", sync_uri) as mirror:
            state = saved_iteration(tmp_path / f"{number}b" / RUN / STATE_NAME)
            states.append((is_sent, state))
            whole_run(tmp_path / f"{number}b", range(state + 1, 6))
            there = bytes_of(tmp_path / f"{number}b" / RUN)
            timing = there.pop("timing.jsonl")
            assert timing.count(b"\n") >= wanted["timing.jsonl"].count(b"\n")
            assert there == {name: data for name, data in wanted.items() if name != "timing.jsonl"}
            assert send(mirror)
            read_list(open_place(sync_uri, RUN))
    assert (False, 3) in states
    assert (False, 4) in states  # the state had arrived, what is removed after it had not
    assert states[-1] == (True, 4)
    assert states == sorted(states)


def test_what_did_not_arrive_is_sent_with_the_next_state(
    tmp_path: Path, bucket: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        assert send(mirror)
        save(run, 1)
        bucket.faults.add(f"PUT /{MIRRORED}metrics", "status:503", times=2)
        assert not send(mirror)
        assert saved_iteration_there() == 0
        line = (
            f"s3://{MIRRORED}metrics.jsonl could not be written: S3 answered 503 (status 503); gave up after 2 attempts"
        )
        assert f"{line}; it will be tried again with the next state" in caplog.messages
        save(run, 2)
        assert send(mirror)
        assert saved_iteration_there() == 2
        assert objects(bucket) == bytes_of(run.path)


def saved_iteration_there() -> int:
    state = open_place(PREFIX, RUN).get(STATE_NAME)
    assert state is not None
    return int(safetensors.numpy.load(state.data)["x"][0])


def test_the_end_waits_for_what_failed_and_says_what_is_missing(
    tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        monkeypatch.setattr("dual_policy_plugin.run.mirror.time.sleep", waits.append)
        bucket.faults.add(f"PUT /{MIRRORED}{STATE_NAME}", "reset", times=3)
        mirror.finish()
        assert objects(bucket) == bytes_of(run.path)
        save(run, 1)
        bucket.faults.add(f"PUT /{MIRRORED}{STATE_NAME}", "reset", times=None)
        with pytest.raises(
            StorageError, match=r"state/training\.safetensors could not be written.*sends what is"
        ) as info:
            mirror.finish()
        assert info.value.exit_code == 75
        bucket.faults.clear()
        bucket.faults.add(f"PUT /{MIRRORED}{STATE_NAME}", "status:403", times=None)
        with pytest.raises(RunError, match="no access") as refused:
            mirror.finish()
        assert refused.value.exit_code == 2
        bucket.faults.clear()
    assert {2.0, 4.0} <= set(waits)


def test_sending_takes_no_time_of_the_run_and_sends_what_was_there_then(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path, keep=1) as run:
        save(run, 0)
        save(run, 2)
        then = bytes_of(run.path)
        bucket.faults.add(f"/{MIRRORED}", "slow:0.1", times=None)
        begun = time.monotonic()
        mirror.advance()
        assert time.monotonic() - begun < 0.1
        save(run, 4)  # replaces latest, index, state, and removes the checkpoint of 2
        assert not run.checkpoint_path(2).exists()
        assert mirror.wait()
        bucket.faults.clear()
        assert objects(bucket) == then
        assert then != bytes_of(run.path)


def test_of_two_states_that_wait_the_newer_is_sent(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        bucket.faults.add(f"/{MIRRORED}", "slow:0.1", times=None)
        for epoch in range(4):
            save(run, epoch)
            mirror.advance()
        assert mirror.wait()
        bucket.faults.clear()
        assert bucket.count(f"PUT /{MIRRORED}{STATE_NAME}") == 2
        assert objects(bucket) == bytes_of(run.path)


def test_a_snapshot_of_many_files_holds_those_that_change(tmp_path: Path) -> None:
    with open_run(tmp_path, keep=1000) as run:
        for epoch in range(MAX_HELD):
            run.checkpoint_path(epoch).write_bytes(b"x")
        save(run, MAX_HELD)
        snapshot = take_snapshot(run.path, {})
        held = [file.name for file in snapshot.changed if file.file is not None]
        assert len(held) == MAX_HELD
        assert held[-1] == STATE_NAME
        assert "checkpoints/model_0000.safetensors" not in held
        snapshot.close()


def test_a_stop_waits_for_the_state_as_long_as_it_may(
    tmp_path: Path, bucket: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mirror = mirror_of(tmp_path)
    with open_run(tmp_path) as run:
        save(run, 0)
        mirror.advance()
        mirror.settle(20.0)
        assert caplog.messages[-1] == f"s3://{MIRRORED} has the newest state"
        save(run, 1)
        bucket.faults.add(f"/{MIRRORED}", "slow:1.5", times=1)
        mirror.advance()
        begun = time.monotonic()
        mirror.settle(0.2)
        assert 0.2 <= time.monotonic() - begun < 1.0
        assert "does not have the newest state, 0.2 s were too short for it" in caplog.messages[-1]
    mirror.__exit__(SystemExit, SystemExit(143), None)
    assert owner_note(PREFIX)["is_held"]  # something was on its way
    mirror._thread.join()


# what is fetched


def test_the_side_with_more_iterations_wins(tmp_path: Path, sync_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with mirror_of(tmp_path / "a", sync_uri) as mirror, open_run(tmp_path / "a") as run:
        for epoch in range(3):
            save(run, epoch)
        assert send(mirror)
        save(run, 3)  # of this and the next the mirror knows nothing
        save(run, 4)
    with mirror_of(tmp_path / "a", sync_uri) as mirror:
        assert saved_iteration(tmp_path / "a" / RUN / STATE_NAME) == 4
        assert "has all that its mirror" in caplog.messages[-1]
        assert send(mirror)
    whole_run(tmp_path / "b", range(3))
    with mirror_of(tmp_path / "b", sync_uri), open_run(tmp_path / "b") as run:
        assert "iteration 4" in caplog.messages[-1]
        assert bytes_of(run.path) == bytes_of(tmp_path / "a" / RUN)


def test_two_runs_are_not_mixed(tmp_path: Path, sync_uri: str) -> None:
    with mirror_of(tmp_path / "a", sync_uri) as mirror:
        whole_run(tmp_path / "a", range(3))
        assert send(mirror)
    for epochs in (range(2), range(5)):
        other = tmp_path / f"b{len(epochs)}"
        whole_run(other, epochs)
        (other / RUN / "checkpoints/model_0000.safetensors").write_bytes(b"of another seed")
        before = bytes_of(other)
        with pytest.raises(RunError, match="hold two different runs"):
            mirror_of(other, sync_uri)
        assert bytes_of(other) == before
        assert not owner_note(sync_uri)["is_held"]


HARMED = ["checkpoints/model_0002.safetensors", "metrics.jsonl", STATE_NAME, LIST_NAME]


def test_harm_in_the_mirror_is_one_line_and_nothing_is_trained(tmp_path: Path, sync_uri: str) -> None:
    with mirror_of(tmp_path / "a", sync_uri) as mirror:
        whole_run(tmp_path / "a", range(3))
        assert send(mirror)
    place = open_place(sync_uri, RUN)
    for name in HARMED:
        for harm in ("damaged", "missing"):
            check_harm(tmp_path, sync_uri, place, name, harm)


def check_harm(tmp_path: Path, sync_uri: str, place: Place, name: str, harm: str) -> None:
    found = place.get(name)
    assert found is not None
    place.delete(name)
    if harm == "damaged":
        write(place, name, found.data[:-3] + b"bad")
    with pytest.raises(RunError, match=f"{name} is {harm}") as info:
        mirror_of(tmp_path / "b", sync_uri)
    assert info.value.exit_code == 2
    assert "\n" not in str(info.value)
    assert saved_iteration(tmp_path / "b" / RUN / STATE_NAME) == -1
    assert not owner_note(sync_uri)["is_held"]
    write(place, name, found.data)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "state/../../evil", ".evil", "run.lock", "a/b", ""])
def test_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    sync_uri = str(tmp_path)
    with mirror_of(tmp_path / "a", sync_uri) as mirror:
        whole_run(tmp_path / "a", range(1))
        assert send(mirror)
    place = open_place(sync_uri, RUN)
    listed = json.loads(place.get(LIST_NAME).data)  # type: ignore[union-attr]
    listed["contents"][name] = listed["contents"]["metrics.jsonl"]
    write(place, LIST_NAME, json.dumps(listed).encode())
    with pytest.raises(RunError, match=r"files\.json is damaged"):
        mirror_of(tmp_path / "b", sync_uri)


def test_bytes_that_are_damaged_on_their_way_are_read_again(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path / "a") as mirror:
        whole_run(tmp_path / "a", range(3))
        assert send(mirror)
    bucket.faults.add(f"GET /{MIRRORED}metrics", "bitflip", times=1)
    bucket.faults.add(f"GET /{MIRRORED}timing", "truncate", times=1)
    with mirror_of(tmp_path / "b"):
        assert (
            bytes_of(tmp_path / "b" / RUN).items()
            >= {
                name: data
                for name, data in bytes_of(tmp_path / "a" / RUN).items()
                if "latest" not in name and "best" not in name
            }.items()
        )
    assert len(bucket.faults.fired) == 2


# who may write


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> float:
    """Leases of 1.5 s; gives that."""
    monkeypatch.setattr(lease_module, "LEASE_S", 1.5)
    return 1.5


def test_a_live_owner_keeps_the_run(tmp_path: Path, sync_uri: str, short: float) -> None:
    with mirror_of(tmp_path / "a", sync_uri):
        begun = time.monotonic()
        with pytest.raises(RunError, match=rf"{RUN}/ is in use by process {os.getpid()} on .*; wait for it, end it"):
            mirror_of(tmp_path / "b", sync_uri)
        assert time.monotonic() - begun < short + 1
    begun = time.monotonic()
    with mirror_of(tmp_path / "b", sync_uri):
        assert time.monotonic() - begun < short  # it was given back, so nobody waits


def test_a_silent_owner_is_waited_for_and_replaced(
    tmp_path: Path, sync_uri: str, short: float, caplog: pytest.LogCaptureFixture
) -> None:
    owner(sync_uri, length_s=2.5)
    begun = time.monotonic()
    with mirror_of(tmp_path, sync_uri):
        assert 1.0 < time.monotonic() - begun < 5.0  # the clock of S3 has whole seconds
        assert owner_note(sync_uri)["pid"] == os.getpid()
    waiting, replaced = [one.getMessage() for one in caplog.records if "mirror" in one.name]
    assert "was in use by process 7 on far" in waiting
    assert "waiting up to" in waiting
    assert "is taken over from process 7 on far" in replaced
    owner(sync_uri, length_s=-1)
    begun = time.monotonic()
    with mirror_of(tmp_path, sync_uri):  # long ago: no waiting
        assert time.monotonic() - begun < 1.0


def test_an_owner_that_died_on_this_machine_is_not_waited_for(tmp_path: Path, sync_uri: str) -> None:
    code = (
        f"from dual_policy_plugin.mirror.lease import _process; print(_process({os.getpid()}), _process(1), sep='\\n')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".").stdout
    alive = shown.splitlines()[0]
    *machine, pid, born = alive.split()
    for process in (f"{' '.join(machine)} {pid} {int(born) + 1}", f"{' '.join(machine)} 4194303 {born}"):
        owner(sync_uri, process=process)
        begun = time.monotonic()
        with mirror_of(tmp_path, sync_uri):
            assert time.monotonic() - begun < 5.0
    assert lease_module._is_dead(process)
    assert not lease_module._is_dead(alive)
    assert not lease_module._is_dead(f"other-boot {alive.split(' ', 1)[1]}")
    assert not lease_module._is_dead("")


def test_an_owner_that_was_replaced_writes_no_more(tmp_path: Path, sync_uri: str, short: float) -> None:
    with mirror_of(tmp_path / "a", sync_uri) as mirror, open_run(tmp_path / "a") as run:
        save(run, 0)
        assert send(mirror)
        owner(sync_uri)
        time.sleep(short / 5 + 0.5)
        before = contents_of(open_place(sync_uri, RUN))
        save(run, 1)
        with pytest.raises(RunError, match="was taken over by process 7 on far") as info:
            mirror.advance()
        assert info.value.exit_code == 2
        with pytest.raises(RunError, match="was taken over"):
            mirror.finish()
    assert contents_of(open_place(sync_uri, RUN)) == before
    assert owner_note(sync_uri)["id"] == "other"


def contents_of(place: Place) -> dict[str, bytes]:
    names = [STATE_NAME, LIST_NAME, "metrics.jsonl", OWNER_NAME]
    return {name: found.data for name in names if (found := place.get(name)) is not None}


def test_a_process_that_slept_looks_before_it_writes(tmp_path: Path, sync_uri: str) -> None:
    """A machine that stood still for longer than its lease renews it first, and finds the other one there."""
    with mirror_of(tmp_path, sync_uri) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        assert send(mirror)
        before = contents_of(open_place(sync_uri, RUN))
        owner(sync_uri)
        mirror._lease._written -= 2 * lease_module.LEASE_S
        save(run, 1)
        mirror.advance()
        with pytest.raises(RunError, match="was taken over by process 7 on far"):
            mirror.wait()
    after = contents_of(open_place(sync_uri, RUN))
    assert after.pop(OWNER_NAME) != before.pop(OWNER_NAME)
    assert after == before


def test_a_renewal_whose_answer_is_lost_is_ours(tmp_path: Path, bucket: S3Server) -> None:
    lease = Lease(open_place(PREFIX, RUN))
    bucket.faults.add(f"PUT /{MIRRORED}{OWNER_NAME}", "lost")
    lease.take()
    bucket.faults.add(f"PUT /{MIRRORED}{OWNER_NAME}", "lost", times=2)  # both attempts
    with pytest.raises(StorageError):
        lease._renew()
    lease._renew()
    lease.check()
    assert not lease.lost
    lease.release()
    assert not owner_note(PREFIX)["is_held"]
    assert len(bucket.faults.fired) == 3


def test_of_two_that_want_it_at_once_one_gets_it(sync_uri: str, short: float) -> None:
    first, second = Lease(open_place(sync_uri, RUN)), Lease(open_place(sync_uri, RUN))
    version = first._replaceable()
    assert version is None
    assert second._write(version, is_held=True)
    assert not first._write(version, is_held=True)


class Hang:
    """Holds up one write of the process that has the mirror now, until it is let go."""

    def __init__(self, sync_uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_met, self.go_on = threading.Event(), threading.Event()
        client = s3_client.client()
        real = client.put_object if sync_uri == PREFIX else files.publish

        def held(*args: Any, **words: Any) -> Any:
            where = str(args[0]) if args else f"/mount/{words['Key']}"
            if "/mount/" in where and where.endswith(f"/{name}") and not self.is_met.is_set():
                self.is_met.set()
                assert self.go_on.wait(20.0)
            return real(*args, **words)

        if sync_uri == PREFIX:
            monkeypatch.setattr(client, "put_object", held)
        else:
            monkeypatch.setattr(folder_place.files, "publish", held)


@pytest.mark.parametrize("name", [LIST_NAME, "checkpoints/model_0001.safetensors", "metrics.jsonl", STATE_NAME])
def test_a_write_that_comes_too_late_is_refused(
    tmp_path: Path, sync_uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hangs in a write that it may do when it begins it; B takes over; what A writes then must not land."""
    with mirror_of(tmp_path / "a", sync_uri) as mirror, open_run(tmp_path / "a") as run:
        save(run, 0)
        assert send(mirror)
        hang = Hang(sync_uri, name, monkeypatch)
        save(run, 1)
        mirror.advance()
        assert hang.is_met.wait(10.0)
        open_place(sync_uri, RUN).delete(OWNER_NAME)  # it has been silent for long
        with mirror_of(tmp_path / "b", sync_uri) as other, open_run(tmp_path / "b") as second:
            second.append_timing({"iteration": "other"})
            save(second, 1)
            second.append_metrics({"iteration": 2, "x": "other"})
            second.save_checkpoint(1, b"other weights", score=1.0)
            save(second, 2)
            assert send(other)
            here = bytes_of(second.path)
            hang.go_on.set()
            with pytest.raises(RunError, match=r"was taken over by process .* nothing more is written there"):
                mirror.wait()
    with mirror_of(tmp_path / "c", sync_uri), open_run(tmp_path / "c") as third:
        assert bytes_of(third.path) == here
    if sync_uri != PREFIX:
        assert not list((tmp_path / "mount").rglob("*.tmp"))


@pytest.mark.parametrize("name", [LIST_NAME, "checkpoints/model_0001.safetensors", "metrics.jsonl", STATE_NAME])
def test_a_late_write_before_the_next_owner_writes_is_one_of_the_possible(
    tmp_path: Path, bucket: S3Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 lets it land, as nobody has replaced what it replaces; whoever reads it then knows it from the list."""
    with mirror_of(tmp_path / "a") as mirror, open_run(tmp_path / "a") as run:
        save(run, 0)
        assert send(mirror)
        hang = Hang(PREFIX, name, monkeypatch)
        save(run, 1)
        mirror.advance()
        assert hang.is_met.wait(10.0)
        open_place(PREFIX, RUN).delete(OWNER_NAME)
        with mirror_of(tmp_path / "b") as other, open_run(tmp_path / "b") as second:
            (second.path / "npc.lock.json").write_bytes(b"{}")
            assert send(other)  # it has all but this, so nothing of the rest has other bytes
            hang.go_on.set()
            with pytest.raises(RunError, match="was taken over by process"):
                mirror.wait()
            read_all(tmp_path / "between")
            save(second, 1)
            save(second, 2)
            assert send(other)
            assert objects(bucket) == bytes_of(second.path)
    with mirror_of(tmp_path / "c"), open_run(tmp_path / "c") as third:
        assert bytes_of(third.path) == bytes_of(tmp_path / "b" / RUN)


def read_all(folder: Path) -> None:
    """Fetches the run, as a third machine would, while another one has it."""
    place = open_place(PREFIX, RUN)
    assert fetch_files(place, read_list(place), folder)


def test_the_lease_is_looked_at_before_every_attempt(
    tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        assert send(mirror)
        save(run, 1)

        def sleep(_: float) -> None:  # between two attempts
            owner(PREFIX)
            mirror._lease._written -= 2 * lease_module.LEASE_S

        monkeypatch.setattr(s3_place.time, "sleep", sleep)
        bucket.faults.add(f"PUT /{MIRRORED}metrics", "status:503", times=1)
        mirror.advance()
        with pytest.raises(RunError, match="was taken over by process 7 on far"):
            mirror.wait()
        assert bucket.count(f"PUT /{MIRRORED}metrics") == 2  # of state 0, and the one that failed


def test_a_write_whose_answer_is_lost_is_ours(tmp_path: Path, bucket: S3Server) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        for epoch in range(3):
            save(run, epoch)
            bucket.faults.add(f"PUT /{MIRRORED}metrics", "lost", times=1)
            bucket.faults.add(f"PUT /{MIRRORED}mirror/files", "lost", times=1)
            assert send(mirror)
        assert objects(bucket) == bytes_of(run.path)
        listed = read_list(open_place(PREFIX, RUN))
        assert all(listed.sure(name) for name in listed.contents)
    assert len(bucket.faults.fired) == 6


def test_a_machine_that_sleeps_knows_how_long(tmp_path: Path, sync_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """time.monotonic stands still meanwhile."""
    slept, real = [0.0], time.clock_gettime

    def clock(which: int) -> float:
        return real(which) + (slept[0] if which == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", clock)
    lease = Lease(open_place(sync_uri, RUN))
    lease.take()
    owner(sync_uri)
    lease.check()  # renewed a moment ago
    slept[0] = lease_module.LEASE_S + 1
    with pytest.raises(RunError, match="was taken over by process 7 on far"):
        lease.check()
    lease.end()


def test_waiting_for_a_write_that_hangs_is_no_sign_of_life(
    tmp_path: Path, sync_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_EVERY_S", 0.0)
    with mirror_of(tmp_path, sync_uri) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        hang = Hang(sync_uri, "metrics.jsonl", monkeypatch)
        mirror.advance()
        assert hang.is_met.wait(10.0)
        before = heartbeat.last_beat()
        assert not mirror.wait(1.5)
        assert heartbeat.last_beat() == before
        hang.go_on.set()
        assert mirror.wait()
        assert heartbeat.last_beat() > before


def test_each_part_of_a_large_file_that_has_gone_is_a_sign_of_life(
    tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[float] = []
    monkeypatch.setattr(s3_place, "beat", lambda: beats.append(time.monotonic()))
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        assert send(mirror)
        num = len(beats)
        run.save_checkpoint(1, bytes(8 << 20))
        assert send(mirror)
    assert len(beats) - num > 50


# files that grow


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of 100 bytes; gives that."""
    monkeypatch.setattr(listing, "PIECE_BYTES", 100)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 100)
    return 100


def test_of_a_long_file_only_the_end_is_sent(tmp_path: Path, bucket: S3Server, pieces: int) -> None:
    with mirror_of(tmp_path) as mirror, open_run(tmp_path) as run:
        for epoch in range(30):
            save(run, epoch, has_checkpoint=epoch == 0)
        assert send(mirror)
        metrics = (run.path / "metrics.jsonl").read_bytes()
        num = len(metrics) // pieces
        assert num == 8
        there = objects(bucket)
        names = ["metrics.jsonl", *(f"metrics.jsonl.{number:04d}" for number in range(1, num + 1))]
        assert sorted(name for name in there if "metrics" in name) == names
        assert [len(there[name]) for name in names] == [pieces] * num + [len(metrics) % pieces]
        assert b"".join(there[name] for name in names) == metrics
        first = len(bucket.exchanges)
        save(run, 30, has_checkpoint=False)
        assert send(mirror)
        assert [name for name in writes(bucket, first) if "metrics" in name] == names[-1:]
        assert read_mirrored(PREFIX, RUN, "metrics.jsonl") == (run.path / "metrics.jsonl").read_bytes()
        first = len(bucket.exchanges)
        run.append_timing({"iteration": 31})
        assert send(mirror)
        assert not [name for name in writes(bucket, first) if "metrics" in name]


def test_the_pieces_come_back_as_one_file(tmp_path: Path, sync_uri: str, pieces: int) -> None:
    with mirror_of(tmp_path / "a", sync_uri) as mirror, open_run(tmp_path / "a") as run:
        for epoch in range(40):
            save(run, epoch, has_checkpoint=epoch % 20 == 0)
        assert send(mirror)
        here = bytes_of(run.path)
    with mirror_of(tmp_path / "b", sync_uri) as mirror, open_run(tmp_path / "b") as run:
        assert bytes_of(run.path) == here
        assert run.truncate_metrics(10) == 29  # cut back beyond pieces
        assert send(mirror)
        kept = (run.path / "metrics.jsonl").read_bytes()
        assert len(kept) == 11 * len('{"iteration": 1, "x": 0.5}\n') + 1
        assert read_mirrored(sync_uri, RUN, "metrics.jsonl") == kept
        assert open_place(sync_uri, RUN).get("metrics.jsonl.0004") is None
        for epoch in range(11, 41):
            save(run, epoch, has_checkpoint=False)
        (run.path / "metrics.jsonl.0001").write_bytes(b"a copy of a mirror has such a file; it is no part of a run")
        assert send(mirror)
        here = bytes_of(run.path)
        del here["metrics.jsonl.0001"]
    with mirror_of(tmp_path / "c", sync_uri), open_run(tmp_path / "c") as run:
        assert bytes_of(run.path) == here


def test_a_piece_counts_where_the_one_before_it_is_full(tmp_path: Path, bucket: S3Server, pieces: int) -> None:
    """Cut back, and broken off before the pieces behind it were removed."""
    with mirror_of(tmp_path / "a") as mirror, open_run(tmp_path / "a") as run:
        save(run, 0)
        save(run, 1)
        for iteration in range(2, 12):
            run.append_metrics({"iteration": iteration, "x": 0.5})
        assert send(mirror)
        assert run.truncate_metrics(1) == 10
        save(run, 2, has_checkpoint=False)
        kept = (run.path / "metrics.jsonl").read_bytes()
        bucket.faults.add(f"PUT /{MIRRORED}{STATE_NAME}", "reset", times=None)
        assert not send(mirror)
        bucket.faults.clear()
        assert open_place(PREFIX, RUN).get("metrics.jsonl.0001") is not None
    open_place(PREFIX, RUN).delete(OWNER_NAME)
    with mirror_of(tmp_path / "b"), open_run(tmp_path / "b") as run:
        assert (run.path / "metrics.jsonl").read_bytes() == kept


# what cannot be


def test_a_storage_that_cannot_be_had_is_one_line(
    tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RunError, match=r"^s3://nothing/team/exp/mirror/owner\.json .* there is no bucket nothing; mend"
    ):
        mirror_of(tmp_path, "s3://nothing")
    bucket.faults.add("GET /runs", "status:403", times=1)
    with pytest.raises(RunError, match="no access, S3 answered 403") as refused:
        mirror_of(tmp_path)
    assert refused.value.exit_code == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"could not be read: no network, or S3 cannot be reached .*2 attempts$"
    ) as lost:
        mirror_of(tmp_path)
    assert lost.value.exit_code == 75
    with pytest.raises(RunError, match="is no folder; mount it or make it"):
        mirror_of(tmp_path, f"{tmp_path}/unmounted")
    assert not (tmp_path / RUN).exists()


def test_what_a_killed_owner_left_half_written_is_removed(tmp_path: Path) -> None:
    """Or a folder fills up: a run that is often lost leaves a state each time."""
    sync_uri, mirror = f"{tmp_path}/mount", tmp_path / "mount" / RUN
    (tmp_path / "mount").mkdir()
    with mirror_of(tmp_path, sync_uri) as one, open_run(tmp_path) as run:
        save(run, 0)
        assert send(one)
    before = bytes_of(mirror)
    for name in ("config.yaml", "checkpoints/model_0001.safetensors", "state/training.safetensors"):
        path = mirror / name
        path.with_name(f".{path.name}.0123456789ab.tmp").write_bytes(b"half")
    mirror_of(tmp_path, sync_uri).close()
    assert bytes_of(mirror) == before


def test_a_folder_that_goes_away_is_not_made_again(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    with mirror_of(tmp_path / "a", str(mount)) as mirror, open_run(tmp_path / "a") as run:
        save(run, 0)
        mount.rename(tmp_path / "elsewhere")
        assert not send(mirror)
        assert not mount.exists()
        (tmp_path / "elsewhere").rename(mount)
        assert send(mirror)
    assert bytes_of(mount / RUN) == bytes_of(tmp_path / "a" / RUN)


def test_the_mirror_is_not_the_run_itself(tmp_path: Path) -> None:
    for sync_uri in (tmp_path, tmp_path / RUN):
        sync_uri.mkdir(parents=True, exist_ok=True)
        with pytest.raises(RunError, match="overlap"):
            mirror_of(tmp_path, str(sync_uri))


def test_a_launcher_reads_results(tmp_path: Path, sync_uri: str) -> None:
    assert read_result(sync_uri, RUN) is None
    with mirror_of(tmp_path, sync_uri) as mirror, open_run(tmp_path) as run:
        save(run, 0)
        run.write_result({"objective": 0.25})
        mirror.finish()
    assert read_result(sync_uri, RUN) == {"objective": 0.25}
    assert read_mirrored(sync_uri, RUN, "timing.jsonl") == b'{"iteration": 0}\n'
    write(open_place(sync_uri, RUN), "result.json", b"[1")
    with pytest.raises(RunError, match=r"result\.json of team/exp .* is damaged"):
        read_result(sync_uri, RUN)


# whole runs


DUAL = "trainer.dual_policy"
WORDS = (
    "run=pool", "device=cpu", "wandb=off", "agent.hidden_size=16", "env.num_envs=8", "env.episode_steps=12",
    "evals.episodes=8", "trainer.horizon=8", "trainer.threads=1", "trainer.num_minibatches=2",
    "trainer.checkpoint_interval=3", "trainer.state_interval_s=0", "trainer.keep_checkpoints=1",
    f"trainer.total_timesteps={18 * 8 * 8 * 4}", "+dual_policy=self_play", f"{DUAL}.self_play.window=1",
    "report=false",
    f"{DUAL}.self_play.snapshot_interval=3", f"{DUAL}.pool=[builtin://arena/weak]", f"{DUAL}.matchmaking=pfsp",
)  # fmt: skip
"""18 iterations against an NPC and snapshots that leave the pool again; a state after each."""


def train_here(folder: Path, *words: str) -> None:
    """Trains or continues folder/pool to its end."""
    config, text = compose_config([*WORDS, f"train_dir={folder}", *words])
    train(config, resolved_yaml=text)


def lose_machines(sync_uri: str, folder: Path) -> None:
    """Kills the run at five random moments, each time with all that stood on its disk; prints where it went on."""
    order = random.Random(5)
    for number in range(5):
        machine = folder / f"machine{number}"
        child = os.fork()
        if child == 0:
            train_here(machine, f"trainer.sync_uri={sync_uri}")
            os._exit(0)
        state, num_more = machine / "pool" / STATE_NAME, order.randint(1, 5)
        while (before := saved_iteration(state)) < 0:
            time.sleep(0.005)
        has_ended = False
        while saved_iteration(state) < before + num_more and not has_ended:
            time.sleep(0.005)
            has_ended = os.waitpid(child, os.WNOHANG) != (0, 0)
        time.sleep(order.random() * 0.05)
        if not has_ended:  # the last one may have done all that was left
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print("LOST", before, saved_iteration(state), flush=True)
        shutil.rmtree(machine)
    train_here(folder / "last", f"trainer.sync_uri={sync_uri}")
    train_here(folder / "whole")


@pytest.mark.slow
def test_five_lost_machines_leave_no_trace(tmp_path: Path, sync_uri: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.run.test_run_mirror", sync_uri, tmp_path],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lost = [[int(word) for word in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("LOST")]
    assert len(lost) == 5
    assert sum(before > 0 for before, _ in lost) >= 2, lost  # they went on from the mirror
    last, whole = bytes_of(tmp_path / "last/pool"), bytes_of(tmp_path / "whole/pool")
    assert sorted(last) == sorted(whole)
    assert sum(last[name] == whole[name] for name in whole) >= 9
    differing = {name for name in whole if last[name] != whole[name]}
    assert differing <= {
        "timing.jsonl",
        "config.yaml",
        "result.json",
        "npc.lock.json",
    }
    results = [json.loads(one["result.json"]) | {"elapsed_s": 0} for one in (last, whole)]
    assert results[0] == results[1]
    place = open_place(sync_uri, "pool")
    for name, data in last.items():
        found = place.get(name)
        assert found is not None
        assert found.data == data
    assert read_result(sync_uri, "pool") == json.loads((tmp_path / "last/pool/result.json").read_bytes())


def test_an_index_of_checkpoints_that_is_newer_than_the_state_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may be lost when the one has arrived in the mirror and the other has not."""
    whole, state = program.iteration_figures, tmp_path / "pool" / STATE_NAME
    older: dict[int, bytes] = {}

    def noting(counters: Counters, *args: Any) -> Any:
        older[counters.iteration] = state.read_bytes()
        return whole(counters, *args)

    monkeypatch.setattr(program, "iteration_figures", noting)
    train_here(tmp_path)
    ended = bytes_of(tmp_path / "pool")
    assert "checkpoints/model_0012.safetensors" in ended  # of a snapshot that has left the pool since iteration 15
    for iteration in (17, 16):
        state.write_bytes(older[iteration])
        train_here(tmp_path)
        again = bytes_of(tmp_path / "pool")
        assert again.keys() == ended.keys()
        assert {name for name in ended if again[name] != ended[name]} <= {"timing.jsonl", "result.json"}


def test_a_stop_is_answered_when_the_state_has_arrived(
    tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = program.iteration_figures
    arrived: list[int] = []

    def noting(counters: Counters, *args: Any) -> Any:
        if counters.iteration == 4:
            bucket.faults.add(f"PUT /runs/pool/{STATE_NAME}", "slow:0.4", times=None)
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(counters, *args)

    def leave(*_: object) -> None:
        contents = read_list(open_place("s3://runs", "pool")).sure(STATE_NAME)
        arrived.append(-1 if contents is None or contents.iteration is None else contents.iteration)
        raise SystemExit(138)

    monkeypatch.setattr(program, "iteration_figures", noting)
    before = signal.signal(signal.SIGUSR1, leave)
    try:
        with pytest.raises(SystemExit):
            train_here(tmp_path, "trainer.sync_uri=s3://runs")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert arrived == [5]
    assert saved_iteration(tmp_path / "pool" / STATE_NAME) == 5
    owner = open_place("s3://runs", "pool").get(OWNER_NAME)
    assert owner is not None
    assert not json.loads(owner.data)["is_held"]


def test_errors_come_before_training_as_one_line(
    tmp_path: Path, bucket: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"train_dir={tmp_path}"]
    assert main(["train", *words, "trainer.sync_uri=s3://nothing/x"]) == 2
    bucket.faults.add("GET /runs", "reset", times=None)
    assert main(["train", *words, "trainer.sync_uri=s3://runs/x"]) == 75
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(" could ")[0] for line in lines] == [
        "error: s3://nothing/x/pool/mirror/owner.json", "error: s3://runs/x/pool/mirror/owner.json"
    ]  # fmt: skip
    assert not (tmp_path / "pool/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://B/x", "s3://B/x"),
        ("relative/folder", "relative/folder"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("s3://key:password@bucket/x", "s3://...@bucket/x"),
        ("s3://bucket/x?X-Amz-Signature=abc", "s3://bucket/x"),
        ("file://relative", "file://relative"),
    ],
)
def test_a_wrong_sync_uri_is_one_line_without_its_login(uri: str, shown: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^trainer\.sync_uri={re.escape(shown)} is not possible; use s3://bucket/pre"
    ):
        TrainerConfig(sync_uri=uri)


if __name__ == "__main__":
    lose_machines(sys.argv[1], Path(sys.argv[2]))
