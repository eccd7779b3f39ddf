"""The cache: shared by processes, bounded, and never trusted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_policy_plugin.errors import ConfigError, NpcError
from dual_policy_plugin.npc.cache import STALE_S, Cache
from dual_policy_plugin.npc.holds import FOREIGN_HOLD_S

ROOT = Path(__file__).resolve().parents[2]


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start(code: str, *args: object, **more: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1000)


def test_bytes_come_back_by_digest_and_by_uri(cache: Cache) -> None:
    assert cache.get("s3://b/k#1") is None
    assert cache.put(b"weights", "s3://b/k#1") == digest_of(b"weights")
    assert cache.known("s3://b/k#1") == (digest_of(b"weights"), 7)
    assert cache.get("s3://b/k#1") == b"weights"
    assert cache.get("anything", digest_of(b"weights")) == b"weights"
    assert cache.known("s3://b/k#2") is None
    assert cache.path(digest_of(b"weights")) == cache.root / "blobs" / digest_of(b"weights")
    (entry,) = cache.ls()
    assert (entry.sha256, entry.num_bytes, entry.uris, entry.is_held) == (
        digest_of(b"weights"),
        7,
        ("s3://b/k",),
        False,
    )


def test_names_in_the_cache_are_digests_whatever_the_uri(cache: Cache) -> None:
    for i, uri in enumerate(
        [
            "s3://b/../../../etc/passwd",
            "wandb://e/p/n:v1\0",
            "/abs",
            "..",
            "a" * 5000,
            "\ud800".encode("utf-8", "replace").decode(),
        ]
    ):
        cache.put(str(i).encode(), uri)
        assert cache.get(uri) == str(i).encode()
    for path in cache.root.rglob("*"):
        assert path.is_dir() or len(path.name.removesuffix(".json")) == 64 or path.name == "evict"
    assert {path.name for path in cache.root.parent.iterdir()} == {"cache"}


def test_what_is_not_what_its_name_says_is_dropped_and_never_given(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    digest = cache.put(b"weights", "u")
    cache.path(digest).write_bytes(b"weighty")
    assert cache.get("u") is None
    assert "holds other bytes than its name says" in caplog.text
    assert not cache.path(digest).exists()
    cache.put(b"weights", "u")
    cache.path(digest).write_bytes(b"weigh")  # cut short: known only with its whole size
    assert cache.known("u") is None
    cache.put(b"weights", "u")
    assert cache.get("u") == b"weights"


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"{",
        b"[]",
        b'{"key":"u"}',
        b'{"key":"v","sha256":"' + b"0" * 64 + b'","bytes":1}',
        b'{"key":"u","sha256":"../../x","bytes":1}',
        b'{"key":"u","sha256":3,"bytes":1}',
    ],
)
def test_a_broken_index_is_a_miss(cache: Cache, note: bytes) -> None:
    cache.put(b"weights", "u")
    (path,) = (cache.root / "index").iterdir()
    path.write_bytes(note)
    assert cache.known("u") is None
    assert cache.get("u") is None
    cache.put(b"weights", "u")
    assert cache.get("u") == b"weights"


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 300)
    blobs = [bytes([i]) * 100 for i in range(4)]
    for i, blob in enumerate(blobs[:3]):
        os.utime(cache.path(cache.put(blob, f"u{i}")), (i + 1, i + 1))
    assert cache.get("u0") == blobs[0]  # used now: no longer the oldest
    cache.put(blobs[3], "u3")
    assert [cache.get(f"u{i}") is not None for i in range(4)] == [True, False, True, True]
    assert sum(entry.num_bytes for entry in cache.ls()) == 300
    for i in (0, 2, 3):
        os.utime(cache.path(digest_of(blobs[i])), (10 - i, 10 - i))
    assert cache.prune(100) == [digest_of(blobs[3]), digest_of(blobs[2])]
    assert [entry.uris for entry in cache.ls()] == [("u0",)]
    assert len(list((cache.root / "index").iterdir())) == 1  # what means nothing any more goes along
    big = Cache(tmp_path, 10)
    assert big.get("", big.put(b"y" * 100)) == b"y" * 100  # what is needed now stays though it is too big
    assert len(big.ls()) == 1


HOLD = """
import sys, time
from pathlib import Path
from dual_policy_plugin.npc.cache import Cache
hold = Cache(Path(sys.argv[1])).hold(sys.argv[2:])
print("held", flush=True)
sys.stdin.readline()
if sys.stdin.readline():
    hold.close()
"""


@pytest.fixture
def holder(cache: Cache) -> Iterator[subprocess.Popen[str]]:
    process = start(HOLD, cache.root, cache.put(b"held", "u"))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_live_run_uses_stays_until_it_dies(cache: Cache, holder: subprocess.Popen[str]) -> None:
    os.utime(cache.path(digest_of(b"held")), (1, 1))
    cache.put(b"x" * 999)
    assert cache.prune(0) == [digest_of(b"x" * 999)]
    assert [entry.is_held for entry in cache.ls()] == [True]
    assert cache.get("u") == b"held"
    holder.kill()
    holder.wait()
    assert cache.prune(0) == [digest_of(b"held")]
    assert cache.ls() == []
    assert list((cache.root / "holds").rglob("*-*")) == []


def test_a_closed_hold_holds_nothing(cache: Cache) -> None:
    digest = cache.put(b"held")
    with cache.hold([digest]) as hold:
        assert cache.prune(0) == []
        hold.refresh()
    hold.close()
    assert cache.prune(0) == [digest]


def test_a_hold_of_another_machine_counts_while_it_is_refreshed(cache: Cache) -> None:
    digest = cache.put(b"held")
    hold = cache.root / "holds" / digest / "othermachine-1-00"
    hold.parent.mkdir(parents=True)
    hold.touch()  # its lock cannot be seen from here
    assert cache.prune(0) == []
    os.utime(hold, (time.time() - FOREIGN_HOLD_S - 10,) * 2)
    assert cache.prune(0) == [digest]


WRITE = """
import hashlib, random, sys
from pathlib import Path
from dual_policy_plugin.npc.cache import Cache
cache, rng = Cache(Path(sys.argv[1]), 200_000), random.Random(int(sys.argv[2]))
blobs = [random.Random(i).randbytes(20_000) for i in range(20)]
wrong = 0
for _ in range(60):
    i = rng.randrange(20)
    data = cache.get(f"u{i}")
    wrong += data is not None and data != blobs[i]
    if data is None or rng.random() < 0.3:
        cache.put(blobs[i], f"u{i}")
    if rng.random() < 0.1:
        cache.prune()
print(wrong)
"""


def test_eight_processes_write_read_and_evict_at_once(tmp_path: Path) -> None:
    processes = [start(WRITE, tmp_path, seed) for seed in range(8)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "0\n"), err
    cache = Cache(tmp_path, 200_000)
    whole, bad = cache.verify()
    assert bad == []
    cache.prune()
    assert 1 <= len(cache.ls()) <= 10
    assert whole >= len(cache.ls())
    assert list(tmp_path.rglob("*.tmp")) == []


KILLED = """
import sys
from pathlib import Path
from dual_policy_plugin.npc.cache import Cache
cache, i = Cache(Path(sys.argv[1])), 0
print("go", flush=True)
while True:
    cache.put(bytes([i % 256]) * 3_000_000, f"u{i % 256}")
    i += 1
"""


def test_a_killed_writer_leaves_whole_files_or_none(tmp_path: Path) -> None:
    for pause in (0.02, 0.05, 0.09):
        process = start(KILLED, tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.kill()
        process.communicate()
    cache = Cache(tmp_path)
    assert cache.verify()[1] == []
    for path in tmp_path.rglob("*.tmp"):
        os.utime(path, (time.time() - STALE_S - 10,) * 2)
    cache.prune()
    assert list(tmp_path.rglob("*.tmp")) == []


FETCH = """
import sys, time
from pathlib import Path
from dual_policy_plugin.npc.cache import Cache
cache = Cache(Path(sys.argv[1]))
with cache.fetching("u"):
    if cache.get("u") is None:
        with open(sys.argv[2], "a") as log:
            log.write("fetched\\n")
        time.sleep(0.3)
        cache.put(b"weights", "u")
print(cache.get("u"))
"""


def test_one_process_fetches_and_the_others_wait(tmp_path: Path) -> None:
    processes = [start(FETCH, tmp_path / "cache", tmp_path / "log") for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["b'weights'\n"] * 4
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_verify_counts_the_whole_and_removes_the_rest(cache: Cache) -> None:
    good, bad = cache.put(b"good", "g"), cache.put(b"bad", "b")
    cache.path(bad).write_bytes(b"BAD")
    assert cache.verify() == (1, [bad])
    assert cache.verify() == (1, [])
    assert [entry.sha256 for entry in cache.ls()] == [good]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NpcError, match=r"file cannot be written: .*; set DUAL_POLICY_CACHE to a folder with room"):
        Cache(tmp_path / "file").put(b"x")
    assert Cache(tmp_path / "file").get("u") is None
    assert Cache(tmp_path / "file").ls() == []


def test_root_and_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("DUAL_POLICY_CACHE_GB", "0.5")
    assert (Cache().root, Cache().max_bytes) == (tmp_path / "here", 500_000_000)
    monkeypatch.delenv("DUAL_POLICY_CACHE")
    monkeypatch.delenv("DUAL_POLICY_CACHE_GB")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (Cache().root, Cache().max_bytes) == (tmp_path / ".cache/dual-policy", 20_000_000_000)
    for text in ("-1", "x", "nan", "inf"):
        monkeypatch.setenv("DUAL_POLICY_CACHE_GB", text)
        with pytest.raises(ConfigError, match=f"DUAL_POLICY_CACHE_GB={text} is not possible"):
            Cache()


def test_the_index_holds_the_uri_and_nothing_else(cache: Cache) -> None:
    cache.put(b"weights", "s3://b/k#etag")
    (path,) = (cache.root / "index").iterdir()
    assert json.loads(path.read_text()) == {"key": "s3://b/k#etag", "sha256": digest_of(b"weights"), "bytes": 7}
