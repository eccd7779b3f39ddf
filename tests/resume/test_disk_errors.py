"""A disk that refuses: one line for the user, nothing lost, and the same command goes on when the fault is gone.

The faults stand where the operating system does (`edge.py`, a real limit, a real full disk); nothing of ours is
patched.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.cli import main as command
from tests.resume.edge import Call, Edge
from tests.resume.reading import Faults, Peace, differences, look
from tests.resume.runs import ROOT, RUN, SHORT

FAULTS = {
    "at the start": [
        ("run lock", "open", errno.EACCES), ("run lock", "ftruncate", errno.EIO), ("config", "open", errno.ENOSPC),
        ("config", "write", errno.EDQUOT), ("npc lock", "replace", errno.EIO), ("index", "fsync", errno.EIO),
    ],
    "checkpoint": [
        ("checkpoint", "open", errno.EACCES), ("checkpoint", "write", errno.ENOSPC), ("checkpoint", "fsync", errno.EIO),
        ("checkpoint", "replace", errno.EDQUOT), ("checkpoint", "unlink", errno.EIO), ("index", "write", errno.ENOSPC),
        ("folder", "fsync", errno.EIO),
    ],
    "copies": [
        ("latest", "open", errno.ENOSPC), ("latest", "write", errno.EDQUOT), ("latest", "replace", errno.EACCES),
        ("best", "write", errno.ENOSPC), ("best", "fsync", errno.EIO),
    ],
    "state": [
        ("state", "open", errno.EACCES), ("state", "write", errno.ENOSPC), ("state", "write", errno.EIO),
        ("state", "fsync", errno.EIO), ("state", "fsync", errno.EDQUOT), ("state", "replace", errno.EACCES),
    ],
    "lines": [
        ("metrics", "open", errno.EACCES), ("metrics", "write", errno.ENOSPC), ("metrics", "write", errno.EDQUOT),
        ("metrics", "fsync", errno.EIO), ("timing", "write", errno.ENOSPC), ("timing", "fsync", errno.EIO),
    ],
    "result": [("result", "open", errno.EACCES), ("result", "write", errno.ENOSPC), ("result", "replace", errno.EIO)],
}  # fmt: skip
"""By where they hit: the file, the call, and how the operating system refuses it."""
MENDS = {
    errno.ENOSPC: "free some space, or lower trainer.keep_checkpoints",
    errno.EDQUOT: "free some of your quota, or lower trainer.keep_checkpoints",
    errno.EACCES: "make the folder writable, or set train_dir= to one that is",
    errno.EIO: "the storage is failing; set train_dir= to another disk",
}


class Refusal:
    """Refuses one call for one kind of file, a write after its first 100 bytes; sees if it ever came to that."""

    def __init__(self, kind: str, name: str, code: int) -> None:
        """Args: kind, name: of the call; code: errno of the refusal."""
        self.kind, self.name, self.code, self.path = kind, name, code, Path()

    def __call__(self, call: Call) -> int | None:
        """As Edge calls it."""
        if (call.kind, call.name) != (self.kind, self.name):
            return None
        if call.name == "write" and self.path != call.path:
            self.path = call.path
            return 100
        self.path = call.path
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_disk_that_refuses_loses_nothing_and_the_command_goes_on_later(
    tmp_path: Path, peace: Peace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], faults: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found, iteration = Faults(), -1
    for kind, name, code in faults:
        refusal = Refusal(kind, name, code)
        with Edge(tmp_path, refusal):
            assert command(list(SHORT)) == 2, (kind, name)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
        assert len(lines) == 1, lines
        assert os.strerror(code) in lines[0]
        assert lines[0].endswith(MENDS[code])
        assert str(refusal.path.relative_to(tmp_path)) in lines[0] or kind == "folder"
        assert list(tmp_path.rglob("*.tmp")) == []
        iteration = look(tmp_path / RUN, peace, iteration, found)
        assert found.all() == [], (kind, name, code)
    assert command(list(SHORT)) == 0
    assert differences(peace.run, tmp_path / RUN) == []


@pytest.mark.slow
def test_a_limit_on_file_sizes_ends_the_command_with_one_line(tmp_path: Path, peace: Peace) -> None:
    """The kernel writes the state's first 200,000 bytes and refuses the rest; checkpoints are smaller."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    words = [sys.executable, "-W", "ignore", "-m", "dual_policy_plugin", *SHORT]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=tmp_path, env=environ, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: train_dir/r/state/training.safetensors could not be written: File too large; raise the limit on file "
        "sizes (ulimit -f)"
    )
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.tmp")) == []
    faults = Faults()
    assert look(tmp_path / RUN, peace, -1, faults) == -1
    assert faults.all() == []
    assert (tmp_path / RUN / "checkpoints/model_0000.safetensors").exists()
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert differences(peace.run, tmp_path / RUN) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes a right that this user does not have")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_really_full_and_then_has_room_again(
    small_disk: Path, peace: Peace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_disk)
    faults, iteration, others = Faults(), -1, small_disk / "others"
    for num_kb in (900, 600, 400, 200):  # what others take, less each time
        others.write_bytes(bytes(num_kb * 1000))
        assert command(list(SHORT)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(
            r"error: train_dir/r/\S+ could not be (written|extended): No space left on device; "
            r"free some space, or lower trainer.keep_checkpoints",
            line,
        ), line
        assert list(small_disk.rglob("*.tmp")) == []
        iteration = look(small_disk / RUN, peace, iteration, faults)
        assert faults.all() == [], num_kb
    others.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert command(list(SHORT)) == 0
    assert differences(peace.run, small_disk / RUN) == []
