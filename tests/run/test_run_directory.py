from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.run import directory as run_directory
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run.lock import check_unlocked

CONFIG = """
run: first
seed: 1
train_dir: train_dir
trainer:
  total_timesteps: 1000
  horizon: 64
  learning_rate: 0.0025
  dual_policy: {enabled: true, training_agents_pct: 0.5}
env: {name: arena, args: {}}
wandb: {mode: "off", tags: []}
"""


def open_run(path: Path, config_yaml: str = CONFIG, keep_checkpoints: int = 5) -> RunDirectory:
    return RunDirectory.open(path, config_yaml=config_yaml, keep_checkpoints=keep_checkpoints, now=lambda: 0.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def epochs(run: RunDirectory) -> list[int]:
    return [int(name[6:10]) for name in names(run.checkpoints) if name.startswith("model_")]


def test_a_new_run_has_its_layout(tmp_path: Path) -> None:
    with open_run(tmp_path / "train_dir" / "first" / "0") as run:
        assert run.is_new
        assert run.newest_checkpoint() is None
        assert run.best_checkpoint() is None
        assert names(run.path) == ["checkpoints", "config.yaml", "run.lock", "state"]
        assert (run.path / "config.yaml").read_text() == CONFIG
        run.append_metrics({"iteration": 1, "losses/entropy": 1.5})
        run.append_timing({"iteration": 1, "charts/learner_SPS": 10.0})
        run.write_result({"objective": 0.7})
    assert (run.path / "metrics.jsonl").read_text() == '{"iteration": 1, "losses/entropy": 1.5}\n'
    assert (run.path / "timing.jsonl").read_text() == '{"iteration": 1, "charts/learner_SPS": 10.0}\n'
    assert json.loads((run.path / "result.json").read_text()) == {"objective": 0.7}


HOLDER = """
import sys
from pathlib import Path
from dual_policy_plugin.run.directory import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]), config_yaml=sys.argv[2], now=lambda: 0.0)
run.save_checkpoint(0, b"zero")
print("ready", flush=True)
sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    root = Path(run_directory.__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), CONFIG],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    return holder


def test_a_second_live_process_is_refused_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    with start_holder(tmp_path) as holder:
        with pytest.raises(RunError) as caught:
            open_run(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since 1970-01-01T00:00:00+00:00; "
            f"wait for it, end it, or use another run= name"
        )
        holder.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
    with (tmp_path / "run.lock").open("a") as file:
        file.write("more than the next owner writes")
    with open_run(tmp_path) as run:
        assert not run.is_new
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_job_of_slurms_waits_for_the_process_that_has_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And shows signs of life while it waits, for whoever watches it."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("DUAL_POLICY_HEARTBEAT", str(tmp_path / "beat"))
    monkeypatch.setattr("dual_policy_plugin.heartbeat._last", -math.inf)
    monkeypatch.setattr("dual_policy_plugin.run.lock._AGAIN_S", 0.1)
    with start_holder(tmp_path / "run") as holder:
        end = threading.Timer(0.5, holder.kill)
        end.start()
        check_unlocked(tmp_path / "run")
        assert holder.wait() == -signal.SIGKILL
        end.join()
        open_run(tmp_path / "run").close()
    assert (tmp_path / "beat").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/run is in use by process {holder.pid} on {socket.gethostname()} since 1970-01-01T00:00:00+00:00; "
        "this job waits until it ends"
    ]


def test_the_lock_is_given_back_by_close_and_by_a_refusal(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(RunError, match="in use by process"):
        open_run(tmp_path)
    run.save_checkpoint(0, b"zero")
    run.close()
    run.close()
    with pytest.raises(RunError, match="made by another config"):
        open_run(tmp_path, CONFIG.replace("seed: 1", "seed: 2"))
    open_run(tmp_path).close()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    # a worker that outlives its killed parent must not block the restart
    run = open_run(tmp_path)
    context = multiprocessing.get_context("fork")
    is_up, is_over = context.Event(), context.Event()

    def stay() -> None:
        is_up.set()
        is_over.wait()

    child = context.Process(target=stay)
    child.start()
    assert is_up.wait(10)
    try:
        with pytest.raises(RunError, match="in use"):
            open_run(tmp_path)
        run.close()
        open_run(tmp_path).close()
        assert child.is_alive()
    finally:
        is_over.set()
        child.join()
    assert child.exitcode == 0


def test_a_changed_config_is_shown_and_refused(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save_checkpoint(0, b"zero")
    changed = CONFIG.replace("0.0025", "0.001").replace("0.5}", "0.6}").replace("args: {}", "args: {width: 20}")
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, changed)
    assert str(caught.value) == (
        f"{tmp_path} was made by another config: trainer.learning_rate: 0.0025 -> 0.001, "
        f"trainer.dual_policy.training_agents_pct: 0.5 -> 0.6, env.args.width: null -> 20; "
        f"use another run= name, or the old values to continue it"
    )
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_a_long_diff_is_cut_to_five_keys_and_a_count(tmp_path: Path) -> None:
    many = "".join(f"key{i}: {i}\n" for i in range(8))
    with open_run(tmp_path, many) as run:
        run.save_checkpoint(0, b"zero")
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, "".join(f"key{i}: {i + 10}\n" for i in range(8)))
    assert "key4: 4 -> 14, and 3 more;" in str(caught.value)
    assert "key5" not in str(caught.value)


def test_length_and_logging_may_change(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save_checkpoint(0, b"zero")
    changed = CONFIG.replace("1000", "5000").replace('mode: "off", tags: []', "mode: offline, tags: [a]")
    changed = changed.replace("run: first", "run: renamed") + "hourly_cost: 2.0\nevals: {episodes: 10}\n"
    with open_run(tmp_path, changed) as run:
        assert not run.is_new
    assert (tmp_path / "config.yaml").read_text() == changed


def test_another_spelling_of_the_same_config_is_no_change(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save_checkpoint(0, b"zero")
    open_run(tmp_path, CONFIG.replace("0.0025", "2.5e-3") + "# a remark\nhorizon: null\n").close()


def test_a_run_that_never_began_takes_another_config(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    changed = CONFIG.replace("seed: 1", "seed: 2")
    with open_run(tmp_path, changed) as run:
        assert run.is_new
    assert (tmp_path / "config.yaml").read_text() == changed


@pytest.mark.parametrize("stored", ["a: [1", "a: ${"])
def test_an_unreadable_stored_config_is_named(tmp_path: Path, stored: str) -> None:
    with open_run(tmp_path) as run:
        run.save_checkpoint(0, b"zero")
    (tmp_path / "config.yaml").write_text(stored)
    with pytest.raises(RunError, match=r"config\.yaml cannot be read as YAML"):
        open_run(tmp_path)


def test_checkpoints_without_a_config_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model_0007.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match=r"has checkpoints but no config\.yaml; use another run= name"):
        open_run(tmp_path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "train_dir").write_text("")
    with pytest.raises(RunError, match="could not be created: Not a directory; a file stands where a folder should be"):
        open_run(tmp_path / "train_dir" / "first")


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.run.directory import RunDirectory
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        RunDirectory.open(Path(path), config_yaml="seed: 1")
    except RunError as error:
        print(error)
"""


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    open_run(tmp_path / "mine").close()
    for folder, mode in ((tmp_path, 0o555), (tmp_path / "mine" / "run.lock", 0o444)):
        folder.chmod(mode)
    root = Path(run_directory.__file__).parents[2]
    script = f"import sys; sys.path[:] = {[str(root), *sys.path]!r}\n{UNPRIVILEGED}"
    done = subprocess.run(
        [sys.executable, "-c", script, "new", "mine"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "new could not be created: Permission denied; make the folder writable, or set train_dir= to one that is",
        "mine/run.lock could not be opened: Permission denied; make the folder writable, or set train_dir= to one "
        "that is",
    ]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(RunError, match=r"run\.lock cannot be locked, the file system has no file locks"):
        open_run(tmp_path)


def test_a_checkpoint_is_numbered_and_becomes_latest(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.save_checkpoint(0, b"zero").name == "model_0000.safetensors"
        assert run.save_checkpoint(12345, b"late", score=0.4).name == "model_12345.safetensors"
        run.save_checkpoint(9999, b"earlier")
        assert run.newest_checkpoint() == (12345, run.checkpoints / "model_12345.safetensors")
        (run.checkpoints / "model_99999.safetensors.part").write_bytes(b"")
        (run.checkpoints / "model_5.safetensors").write_bytes(b"")
        assert run.newest_checkpoint() == (12345, run.checkpoints / "model_12345.safetensors")
        assert (run.checkpoints / "best.safetensors").read_bytes() == b"late"


def test_retention_keeps_the_newest_the_best_the_pinned_and_epoch_0(tmp_path: Path) -> None:
    scores = {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.3, 4: float("nan"), 5: None, 6: 0.9, 7: 0.5}
    with open_run(tmp_path, keep_checkpoints=2) as run:
        for epoch in range(4):
            run.save_checkpoint(epoch, b"%d" % epoch, score=scores[epoch])
        run.pin("pool", [0, 3])
        run.pin("publisher", [2, 3])
        run.pin("publisher", [2])  # and no longer 3, which the pool still needs
        assert (run.pinned("pool"), run.pinned("publisher")) == ({0, 3}, {2})
    with open_run(tmp_path, keep_checkpoints=2) as run:  # scores and pins outlive the process
        for epoch in range(4, 8):
            run.save_checkpoint(epoch, b"%d" % epoch, score=scores[epoch])
        assert epochs(run) == [0, 2, 3, 6, 7]
        assert run.best_checkpoint() == (2, 0.9)  # the earliest of equals
        assert (run.checkpoints / "best.safetensors").read_bytes() == b"2"
        assert (run.checkpoints / "latest.safetensors").read_bytes() == b"7"
        run.pin("pool", [0])
        run.pin("publisher", [3])  # the other still needs it
        run.save_checkpoint(7, b"7", score=0.5)
        assert epochs(run) == [0, 2, 3, 6, 7]
        run.pin("publisher", [])
        run.save_checkpoint(8, b"8", score=1.0)
        assert epochs(run) == [0, 7, 8]
        assert (run.checkpoints / "best.safetensors").read_bytes() == b"8"
        assert names(run.checkpoints)[:2] == ["best.safetensors", "latest.safetensors"]


@pytest.mark.parametrize("num_published", range(5))
def test_a_crash_between_the_files_of_a_save_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_published: int
) -> None:
    # the process dies after this many of: index, numbered file, latest, best
    with open_run(tmp_path, keep_checkpoints=1) as run:
        run.save_checkpoint(1, b"one", score=0.1)
        replaced: list[object] = []
        replace = os.replace

        def replace_or_die(source: Path, target: Path) -> None:
            if len(replaced) == num_published:
                raise KeyboardInterrupt
            replaced.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            if num_published < 4:
                with pytest.raises(KeyboardInterrupt):
                    run.save_checkpoint(2, b"two", score=0.2)
            else:
                run.save_checkpoint(2, b"two", score=0.2)
    newest = b"one" if num_published < 2 else b"two"
    with open_run(tmp_path, keep_checkpoints=1) as run:
        for name in ("latest", "best"):
            assert (run.checkpoints / f"{name}.safetensors").read_bytes() == newest
        run.save_checkpoint(3, b"three", score=0.0)
        assert epochs(run) == ([1, 3] if num_published < 2 else [2, 3])


def test_what_is_saved_stays_beside_newer_ones_that_a_kill_left(tmp_path: Path) -> None:
    with open_run(tmp_path, keep_checkpoints=1) as run:
        run.save_checkpoint(9, b"killed before its state was saved", score=0.5)
    with open_run(tmp_path, keep_checkpoints=1) as run:  # goes on from the state of an iteration before
        assert run.save_checkpoint(7, b"7", score=0.1).read_bytes() == b"7"
        run.save_checkpoint(8, b"8", score=0.1)
        assert epochs(run) == [8, 9]


def test_a_failed_save_leaves_all_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path, keep_checkpoints=1) as run:
        run.save_checkpoint(1, b"one", score=0.1)
        before = {path: path.read_bytes() for path in run.checkpoints.iterdir()}

        def fsync(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(RunError, match="No space left on device; free some space"):
                run.save_checkpoint(2, b"two", score=0.2)
        assert {path: path.read_bytes() for path in run.checkpoints.iterdir()} == before


def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save_checkpoint(1, b"one", score=float("nan"))
        assert run.best_checkpoint() is None
        assert not (run.checkpoints / "best.safetensors").exists()
        run.save_checkpoint(2, b"two", score=-1.0)
        run.save_checkpoint(3, b"three", score=float("inf"))
        assert run.best_checkpoint() == (2, -1.0)
        assert (run.checkpoints / "best.safetensors").read_bytes() == b"two"


def test_state_is_kept_by_name(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.load_state("training.safetensors") is None
        run.save_state("training.safetensors", b"state")
    with open_run(tmp_path) as run:
        assert run.load_state("training.safetensors") == b"state"
        with pytest.raises(AssertionError, match="no plain file name"):
            run.save_state("../config.yaml", b"")


def test_metrics_are_cut_back_to_an_iteration(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for iteration in range(1, 6):
            run.append_metrics({"iteration": iteration, "x": iteration / 3})
            run.append_timing({"iteration": iteration})
        run.append_metrics({"iteration": 5, "evaluation": 1})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        assert run.truncate_metrics(5) == 0
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert run.truncate_metrics(3) == 3
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
        assert len((tmp_path / "timing.jsonl").read_bytes().splitlines()) == 5
        assert run.truncate_metrics(-1) == 3
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    with pytest.raises(AssertionError, match="which iteration"):
        run.append_metrics({"x": 1})


def test_open_removes_what_a_crash_left(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.append_metrics({"iteration": 1})
    for folder in (tmp_path, run.checkpoints, tmp_path / "state"):
        (folder / ".model_0001.safetensors.0123456789ab.tmp").write_bytes(b"half")
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"iterat')
    with open_run(tmp_path):
        assert not list(tmp_path.rglob("*.tmp"))
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"iteration": 1}\n'
        assert (tmp_path / "timing.jsonl").read_bytes() == b""


def test_a_foreign_line_in_the_metrics_is_named(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"x": 2}\n')
        with pytest.raises(RunError, match=r"metrics\.jsonl line 2 has no iteration"):
            run.truncate_metrics(1)
