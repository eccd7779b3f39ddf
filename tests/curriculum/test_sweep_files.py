"""A sweep and its mirror, through the real program: machines are lost with all that stood on them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin import train as train_module
from dual_policy_plugin.cli import main
from dual_policy_plugin.curriculum import gates, stages, sweep_files
from dual_policy_plugin.errors import StorageError
from dual_policy_plugin.mirror import lease as lease_module
from dual_policy_plugin.mirror import transfer
from dual_policy_plugin.mirror.folder_place import FolderPlace
from dual_policy_plugin.mirror.places import OWNER_NAME
from dual_policy_plugin.run import mirror as run_mirror
from dual_policy_plugin.run.mirror import open_place
from tests.curriculum.sweeps import FORAGER, RANDOM, Killed, comparable, kill_before, kill_cases, state_of, sweep_words
from tests.curriculum.test_bad_sweeps import error_line
from tests.harness import logging_as_it_was
from tests.run.test_run_mirror import bucket, server, sync_uri
from tests.test_bad_input import _clean

__all__ = ["_clean", "bucket", "server", "sync_uri"]  # fixtures: no variables of the machine's, each kind of place

LADDER = f"[{RANDOM},{FORAGER}]"
ONE_STAGE = ["hydra.sweeper.promote_at=0.8", "hydra.sweeper.max_attempts=1"]


def words_for(folder: Path, place: str, *more: str, ladder: str = LADDER) -> list[str]:
    """A sweep on the machine whose disk is `folder`."""
    return sweep_words(folder, ladder, f"trainer.sync_uri={place}", *more)


def shared_folder(tmp_path: Path) -> tuple[Path, str]:
    """The disk of a machine, and a place that outlives it."""
    (tmp_path / "mount").mkdir()
    return tmp_path / "machine", f"file://{tmp_path}/mount"


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final state of a sweep of two stages, the second tried twice, that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unkilled")
    with logging_as_it_was():  # a fixture of the whole module is made before those of a test
        assert main(sweep_words(folder, LADDER)) == 1
    return played(state_of(folder), folder, "")


def played(state: dict[str, Any], folder: Path, place: str) -> dict[str, Any]:
    """What a sweep did, whether it had a mirror or not."""
    result = comparable(state, folder)
    del result["request"]
    for job in result["jobs"]:
        job["overrides"] = [word for word in job["overrides"] if not word.startswith("trainer.sync_uri=")]
    return result


# before which call, as in test_sweep
KILLS = [(sweep_files, "write_state", number) for number in (2, 4, 7, 10)]
KILLS += [(gates, "evaluate_pinned", 2), (train_module, "run_result", 3)]
FAST = [(sweep_files, "write_state", 7)]


@pytest.mark.parametrize(("module", "name", "number"), kill_cases(KILLS, FAST))
def test_a_lost_machine_leaves_no_trace(
    tmp_path: Path,
    sync_uri: str,
    unkilled: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    module: Any,
    name: str,
    number: int,
) -> None:
    words = words_for(tmp_path / "machine", sync_uri)
    kill_before(module, name, number, words)
    found = open_place(sync_uri, "s").get("curriculum.json")
    assert found is not None
    known = [job["num"] for job in json.loads(found.data)["jobs"] if job["status"] == "finished"]
    shutil.rmtree(tmp_path / "machine")
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert main(words) == 1
    assert played(state_of(tmp_path / "machine"), tmp_path / "machine", sync_uri) == unkilled
    assert not [line for line in caplog.messages for num in known if line.startswith(f"job {num} finished")]
    for path in ("curriculum.json", "npc.lock.json"):
        copy = open_place(sync_uri, "s").get(path)
        assert copy is not None
        assert copy.data == (tmp_path / "machine/s" / path).read_bytes()
    for num in range(3):
        assert (tmp_path / f"machine/s/{num}/result.json").exists()


def test_what_cannot_be_sent_goes_with_a_later_state_or_the_same_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, place = shared_folder(tmp_path)
    words = words_for(folder, place, *ONE_STAGE, ladder=f"[{RANDOM}]")
    real, sent = FolderPlace.put, []

    def put(self: FolderPlace, name: str, data: bytes, guard: Any) -> bool:
        if name == "curriculum.json":
            sent.append(name)
            if len(sent) == 2 or len(sent) > 3:
                raise StorageError(f"{self.where}{name} could not be written: away")
        return real(self, name, data, guard)

    monkeypatch.setattr(FolderPlace, "put", put)
    monkeypatch.setattr(sweep_files.time, "sleep", lambda _: None)
    assert main(words) == 75
    late = "could not be written: away; it will be tried again with the sweep's next state"
    assert sum(line.endswith(late) for line in caplog.messages) == 2
    assert "the sweep is complete here, and the same command sends what is missing there" in capsys.readouterr().err
    assert len(sent) == 4 + 3
    mirrored = tmp_path / "mount/s/curriculum.json"
    assert json.loads(mirrored.read_bytes())["gates"] == []
    monkeypatch.setattr(FolderPlace, "put", real)
    assert main(words) == 1
    assert mirrored.read_bytes() == (folder / "s/curriculum.json").read_bytes()
    assert json.loads(mirrored.read_bytes())["status"] == "stopped"


def test_what_does_not_fit_is_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, place = shared_folder(tmp_path)
    words = words_for(folder, place, *ONE_STAGE, ladder=f"[{RANDOM}]")
    assert main(words) == 1
    mirrored = tmp_path / "mount/s/curriculum.json"
    whole = mirrored.read_bytes()

    elsewhere = words_for(tmp_path / "other", place, *ONE_STAGE, ladder=f"[{RANDOM}]")
    line = error_line(capsys, elsewhere)
    assert f'curriculum.json is of a sweep whose jobs name "{folder}/s/npc.lock.json"' in line
    assert "run the command in a folder of the same path, or use another run= name" in line
    assert not (tmp_path / "other").exists()

    # the same name, another sweep
    shutil.rmtree(folder)
    line = error_line(capsys, [*words, "seed=9"])
    assert f"{mirrored} was made by another sweep: " in line
    assert "overrides.seed: null -> " in line
    assert not folder.exists()
    main(sweep_words(folder, f"[{RANDOM}]", "seed=9", *ONE_STAGE))
    assert f"curriculum.json and {folder}/s/curriculum.json are of two sweeps" in error_line(capsys, words)
    shutil.rmtree(folder / "s")

    for text, part in (("{", "holds no JSON"), ('{"version": 1}', "is not as a curriculum sweep writes it")):
        mirrored.write_text(text)
        assert f"{mirrored} {part}" in error_line(capsys, words)
    mirrored.write_bytes(whole)
    (tmp_path / "mount/s/npc.lock.json").rename(tmp_path / "lock")
    assert "npc.lock.json is missing beside curriculum.json" in error_line(capsys, words)
    (tmp_path / "lock").rename(tmp_path / "mount/s/npc.lock.json")
    assert not (folder / "s").exists()

    # another machine has it, and lives
    monkeypatch.setattr(lease_module, "LEASE_S", 0.5)
    note = {"id": "other", "host": "far", "pid": 7, "process": "boot ns 7 1", "length_s": 0.5, "is_held": True}
    owner, real, looks = tmp_path / "mount/s" / OWNER_NAME, FolderPlace.get, []

    def get(self: FolderPlace, name: str) -> Any:
        if name == OWNER_NAME:
            looks.append(name)
            owner.write_text(json.dumps(note | {"renewals": len(looks)}))
        return real(self, name)

    monkeypatch.setattr(FolderPlace, "get", get)
    assert "s/ is in use by process 7 on far; wait for it, end it" in error_line(capsys, words)
    monkeypatch.setattr(FolderPlace, "get", real)

    # and when it has ended, the sweep comes back whole
    owner.write_text(json.dumps(note | {"is_held": False}))
    assert main(words) == 1
    assert (folder / "s/curriculum.json").read_bytes() == whole
    assert (folder / "s/0/result.json").exists()


def test_a_job_that_could_not_be_sent_goes_with_the_sweep_before_its_state_says_that_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = shared_folder(tmp_path)
    words = words_for(folder, place, *ONE_STAGE, ladder=f"[{RANDOM}]")
    real, is_away, order = FolderPlace.put, [True], []

    def put(self: FolderPlace, name: str, data: bytes, guard: Any) -> bool:
        of_job, state = self.where.endswith("/s/0/"), name == "curriculum.json"
        if state and b'"finished"' in data:
            order.append("state")
        if of_job and name == "result.json":
            order.append("result")
        if of_job and is_away[0] and name != "mirror/files.json" and "0000" not in name:
            raise StorageError(f"{self.where}{name} could not be written: away")
        return real(self, name, data, guard)

    def back(*args: Any) -> Any:
        is_away.clear()
        is_away.append(False)
        return take(*args)

    take = stages.take_result
    monkeypatch.setattr(stages, "take_result", back)
    monkeypatch.setattr(FolderPlace, "put", put)
    monkeypatch.setattr(run_mirror, "_LAST_TRIES", 1)
    monkeypatch.setattr(lease_module, "LEASE_S", 0.5)  # the job has not given its mirror back
    assert main(words) == 1
    assert order[:2] == ["result", "state"]
    names = ("result.json", state_of(folder)["jobs"][0]["checkpoint"].removeprefix("0/"), "state/training.safetensors")
    whole = [(folder / "s/0" / name).read_bytes() for name in names]
    shutil.rmtree(folder)
    assert main(words) == 1
    assert [(folder / "s/0" / name).read_bytes() for name in names] == whole


def test_a_job_that_came_back_in_part_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, place = shared_folder(tmp_path)
    words = words_for(folder, place, *ONE_STAGE, ladder=f"[{RANDOM}]")
    assert main(words) == 1
    whole = sorted(path.name for path in (folder / "s/0").rglob("*"))
    shutil.rmtree(folder)
    real = transfer._publish

    def publish(path: Path, data: bytes | None) -> None:
        if path.name == "result.json":
            raise Killed
        real(path, data)

    monkeypatch.setattr(transfer, "_publish", publish)
    with pytest.raises(Killed):
        main(words)
    assert len(list((folder / "s/0/checkpoints").iterdir())) > 1
    monkeypatch.setattr(transfer, "_publish", real)
    assert main(words) == 1
    fetched = sorted(path.name for path in (folder / "s/0").rglob("*"))
    assert fetched == whole
