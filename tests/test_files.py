from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dual_policy_plugin import files
from dual_policy_plugin.errors import RunError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_publish_replaces_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.publish(path, b"old")
    files.publish(path, b"new bytes")
    assert path.read_bytes() == b"new bytes"
    assert names(tmp_path) == ["a.bin"]


def test_publish_keeps_to_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.publish(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_publish_syncs_the_bytes_before_and_the_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        order.append("folder" if Path(f"/dev/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        order.append("rename")
        assert source.parent == target.parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.publish(tmp_path / "a", b"x")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "make the folder writable"),
        (errno.EROFS, "set train_dir= to a folder that can be written"),
        (errno.EIO, "the storage is failing"),
    ],
)
def test_an_error_of_the_operating_system_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, mend: str
) -> None:
    path = tmp_path / "model_0001.safetensors"
    files.publish(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(RunError) as caught:
            files.publish(path, b"new")
    message = str(caught.value)
    assert str(path) in message
    assert os.strerror(code) in message
    assert mend in message
    assert "\n" not in message
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]


LIMITED = """
import resource, sys
from pathlib import Path
from dual_policy_plugin import files
from dual_policy_plugin.errors import RunError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for action in (lambda: files.publish(Path("a"), bytes(5000)), lambda: files.append_line(Path("b"), {"x": "y" * 990})):
    try:
        action()
    except RunError as error:
        print(error)
"""


def test_a_write_that_really_stops_half_way_loses_nothing(tmp_path: Path) -> None:
    # the kernel writes the first 1,000 bytes and refuses the rest, as on a disk that fills up
    files.publish(tmp_path / "a", b"old")
    files.append_line(tmp_path / "b", {"x": 1})
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=tmp_path, env=project_on_path(), capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("a could not be written: File too large; raise the limit")
    assert lines[1].startswith("b could not be extended: File too large; raise the limit")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / "b").read_bytes() == b'{"x": 1}\n'
    assert names(tmp_path) == ["a", "b"]


WRITER = """
import sys
from pathlib import Path
from dual_policy_plugin import files
size = 300_000
print("ready", flush=True)
while True:
    for byte in (b"a", b"b"):
        files.publish(Path("model"), byte * size)
"""


def test_a_reader_never_sees_half_a_file_and_a_kill_leaves_a_whole_one(tmp_path: Path) -> None:
    files.publish(tmp_path / "model", b"a" * 300_000)
    whole = {b"a" * 300_000, b"b" * 300_000}
    seen: set[bytes] = set()
    for delay in (0.05, 0.08, 0.11):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER], cwd=tmp_path, env=project_on_path(), stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            start = time.monotonic()
            while time.monotonic() < start + delay or (seen != whole and time.monotonic() < start + 10):
                seen.add((tmp_path / "model").read_bytes())
            writer.send_signal(signal.SIGKILL)
        seen.add((tmp_path / "model").read_bytes())
    assert seen == whole


def test_remove_temporary_files_takes_what_a_killed_publish_left(tmp_path: Path) -> None:
    (tmp_path / ".model.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "model").write_bytes(b"whole")
    (tmp_path / ".hidden").write_bytes(b"the user's")
    assert files.remove_temporary_files(tmp_path) == 1
    assert names(tmp_path) == [".hidden", "model"]


def test_a_line_is_one_write_in_append_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    write = os.write

    def record_write(descriptor: int, data: bytes) -> int:
        writes.append(bytes(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", record_write)
    files.append_line(tmp_path / "m.jsonl", {"iteration": 1, "ö": 0.5})
    files.append_line(tmp_path / "m.jsonl", {"iteration": 2})
    assert writes == ['{"iteration": 1, "ö": 0.5}\n'.encode(), b'{"iteration": 2}\n']
    assert (tmp_path / "m.jsonl").read_bytes() == b"".join(writes)


def test_a_line_on_a_full_device_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"m\.jsonl could not be extended: No space left on device; free some space"):
        files.append_line(tmp_path / "m.jsonl", {"iteration": 1})


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": float("-inf"), "e": 2}, "f": "NaN"}
    files.append_line(tmp_path / "m.jsonl", record)
    assert (tmp_path / "m.jsonl").read_text() == '{"a": null, "b": [1.0, null], "c": {"d": null, "e": 2}, "f": "NaN"}\n'
    files.publish_json(tmp_path / "r.json", record)
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "a": None,
        "b": [1.0, None],
        "c": {"d": None, "e": 2},
        "f": "NaN",
    }


@pytest.mark.parametrize("torn", [b'{"iteration": 3, "lo', b'{"iteration": 3, "lo\n', b"\0" * 40, b"\0" * 40 + b"\n"])
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "m.jsonl"
    whole = b'{"iteration": 1}\n{"iteration": 2}\n'
    path.write_bytes(whole + torn)
    assert files.read_lines(path) == [b'{"iteration": 1}\n', b'{"iteration": 2}\n']
    assert files.cut_torn_tail(path) == len(torn)
    assert path.read_bytes() == whole
    assert files.cut_torn_tail(path) == 0
    assert files.cut_torn_tail(tmp_path / "absent") == 0


@pytest.mark.parametrize("block_bytes", [1, 3, 17, 64, 1000])
def test_lines_backwards_are_those_of_the_file(
    tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "m.jsonl"
    assert list(files.lines_backwards(path)) == []
    for num in range(8):
        lines = [json.dumps({"iteration": i, "x": "y" * (i * 7 % 40)}).encode() + b"\n" for i in range(num)]
        for torn in (b"", b'{"iterat', b"\0" * 40 + b"\n", b'{"a": 1\n{"b"\n{"c": 3}'):
            path.write_bytes(b"".join(lines) + torn)
            found = list(files.lines_backwards(path))
            assert [line for _, line in found] == lines[::-1] == files.read_lines(path)[::-1]
            assert [end for end, _ in found] == [len(b"".join(lines[: i + 1])) for i in reversed(range(num))]


def test_of_a_long_file_the_end_is_read(tmp_path: Path) -> None:
    """One of 2**40 bytes, which no memory holds."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)
    with path.open("ab") as file:
        file.write(b'\n{"iteration": 1}\n{"iteration": 2}\n')
    assert next(files.lines_backwards(path)) == ((1 << 40) + 35, b'{"iteration": 2}\n')
    assert files.cut_torn_tail(path) == 0
    assert path.stat().st_size == (1 << 40) + 35


def test_a_lock_is_held_while_a_file_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen: list[bytes | None] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append(path.read_bytes() if path.exists() else None)
        yield
        seen.append(path.read_bytes())

    files.publish(path, b"x", around=around())
    assert seen == [None, b"x"]

    @contextmanager
    def refuse() -> Iterator[None]:
        raise RunError("not yours")
        yield

    with pytest.raises(RunError, match="not yours"):
        files.publish(path, b"y", around=refuse())
    assert path.read_bytes() == b"x"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    assert files.read_json(tmp_path / "absent.json") is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match=r"bad\.json holds no JSON"):
        files.read_json(tmp_path / "bad.json")


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_failing_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail_on_folders(code: int) -> None:
        def fsync_files(descriptor: int) -> None:
            if Path(f"/dev/fd/{descriptor}").is_dir():
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync_files)

    fail_on_folders(errno.EINVAL)
    files.publish(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    fail_on_folders(errno.EIO)
    with pytest.raises(RunError, match="storage is failing"):
        files.publish(tmp_path / "b", b"x")


def project_on_path() -> dict[str, str]:
    root = Path(files.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root)}
