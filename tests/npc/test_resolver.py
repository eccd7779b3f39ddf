"""Resolving: directories, near names, pins, and bytes that are no longer those that were pinned."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.lock import lock_entries, pin_locked
from dual_policy_plugin.npc.resolver import (
    hold_pinned,
    read_verified,
    request_text,
    resolve,
    resolve_all,
    unique_names,
)
from dual_policy_plugin.npc.sources.builtin import find as find_builtin
from dual_policy_plugin.npc.uri import parse_uri
from tests.services.fixtures import s3_server  # noqa: F401
from tests.services.s3_server import S3Server


def write(path: Path, data: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three checkpoints; `latest` is the newest, `best` the one in the middle, by content."""
    for epoch in (2, 10, 9):
        write(tmp_path / f"my run/checkpoints/model_{epoch:04d}.safetensors", f"weights {epoch:04d}".encode())
    write(tmp_path / "my run/checkpoints/latest.safetensors", b"weights 0010")
    write(tmp_path / "my run/checkpoints/best.safetensors", b"weights 0009")
    write(tmp_path / "my run/config.yaml")
    return tmp_path / "my run"


def test_a_file_is_pinned_by_path_digest_and_size(run: Path) -> None:
    path = run / "checkpoints/model_0002.safetensors"
    for text in (str(path), f"file://{path}"):
        pinned = resolve(text)
        assert pinned.requested == text
        assert pinned.uri == f"file://{path}"
        assert pinned.sha256 == hashlib.sha256(b"weights 0002").hexdigest()
        assert (pinned.num_bytes, pinned.path, pinned.script) == (12, path, None)
        assert pinned.name == "my_run.model_0002"
        assert read_verified(pinned) == b"weights 0002"


def test_a_relative_path_is_relative_to_the_base(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "checkpoints/model_0002.safetensors"
    for text in ("checkpoints/model_0002.safetensors", "file://checkpoints/model_0002.safetensors"):
        assert resolve(text, base=run).path == path
    monkeypatch.chdir(run / "checkpoints")
    assert resolve("../checkpoints/./model_0002.safetensors").uri == f"file://{path}"


def test_the_name_can_be_given(run: Path) -> None:
    assert resolve(str(run), name="old-1.0").name == "old-1.0"
    for name in ("", "a b", "a/b", "x" * 65, "ü"):
        with pytest.raises(NpcError, match=r"name .* is not possible"):
            resolve(str(run), name=name)


def test_a_directory_means_its_newest_checkpoint_by_number(run: Path) -> None:
    newest = f"file://{run}/checkpoints/model_0010.safetensors"
    assert resolve(str(run)).uri == newest
    assert resolve(f"file://{run}/checkpoints/").uri == newest
    write(run / "checkpoints/model_9999.safetensors")
    write(run / "checkpoints/model_10000.safetensors")  # more digits: still by number, not by letters
    assert resolve(str(run)).uri.endswith("model_10000.safetensors")
    write(run / "checkpoints/model_10000.pt")
    assert resolve(str(run)).uri.endswith("model_10000.safetensors")
    write(run / "checkpoints/model_10001.pt")
    assert resolve(str(run)).uri.endswith("model_10001.pt")


def test_files_that_change_are_pinned_to_those_that_do_not(run: Path) -> None:
    folder = run / "checkpoints"
    assert resolve(str(folder / "latest.safetensors")).path == folder / "model_0010.safetensors"
    assert resolve(str(folder / "best.safetensors")).path == folder / "model_0009.safetensors"
    write(folder / "best.safetensors", b"weights 0000")
    assert resolve(str(folder / "best.safetensors")).path == folder / "best.safetensors"


def test_a_link_is_pinned_to_what_it_means_now(run: Path) -> None:
    (run / "current").symlink_to(run / "checkpoints/model_0002.safetensors")
    assert resolve(str(run / "current")).path == run / "checkpoints/model_0002.safetensors"
    (run / "loop").symlink_to(run / "loop")
    with pytest.raises(NpcError, match=r"loop: "):
        resolve(str(run / "loop"))


def test_a_directory_without_numbers_means_latest_or_its_only_file(tmp_path: Path) -> None:
    write(tmp_path / "one/policy.pt")
    assert resolve(str(tmp_path / "one")).path == tmp_path / "one/policy.pt"
    write(tmp_path / "one/other.safetensors")
    with pytest.raises(NpcNotFoundError, match=r"several policy files \(other.safetensors, policy.pt\); name one"):
        resolve(str(tmp_path / "one"))
    write(tmp_path / "one/latest.safetensors")
    assert resolve(str(tmp_path / "one")).path == tmp_path / "one/latest.safetensors"


def test_a_directory_of_runs_is_asked_back(run: Path) -> None:
    with pytest.raises(NpcNotFoundError, match=r"holds the runs my run; name one of them"):
        resolve(str(run.parent))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("checkpoints/model_0002.pt", r"no such file; model_0002.safetensors stands beside it, name that one$"),
        ("checkpoints/model_002.safetensors", r"did you mean model_0002.safetensors\? .* holds best.safetensors, "),
        ("checkpoint/model_0002.pt", r"checkpoint does not exist; did you mean checkpoints\?"),
        ("nowhere/at/all.pt", r"nowhere does not exist; .*my run holds checkpoints, config.yaml$"),
        ("config.yaml/x.pt", r"config.yaml"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(run: Path, path: str, reason: str) -> None:
    with pytest.raises(NpcError, match=reason) as caught:
        resolve(path, base=run)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint_is_not_meant(run: Path) -> None:
    for name in ("old_run", "old_rum"):
        (run / name / "checkpoints").mkdir(parents=True)
    write(run / "old_rum/checkpoints/model_0001.safetensors")
    with pytest.raises(NpcNotFoundError, match=r"did you mean old_rum\?"):
        resolve("old_rux", base=run)
    (run / "old_rum/checkpoints/model_0001.safetensors").unlink()
    with pytest.raises(NpcNotFoundError, match=r"^old_rux: no such file; .*my run holds "):
        resolve("old_rux", base=run)


def test_a_long_listing_is_cut_short(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"file{i:02d}")
    with pytest.raises(NpcNotFoundError, match=r"holds file00, file01, file02, file03, file04 and 15 more$"):
        resolve("zzz", base=tmp_path)


def test_an_empty_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(NpcNotFoundError, match=r"no checkpoint in .*; it is empty$"):
        resolve(str(tmp_path))


def test_special_files_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (str(tmp_path / "pipe.pt"), "/dev/zero"):
        with pytest.raises(NpcError, match="neither a file nor a directory"):
            resolve(path)


def test_a_name_that_is_too_long_for_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NpcError, match="File name too long"):
        resolve("x" * 300, base=tmp_path)


def test_other_bytes_than_the_pinned_ones_are_never_given(run: Path) -> None:
    path = run / "checkpoints/model_0002.safetensors"
    pinned = resolve(str(path))
    for data in (b"weights 0003", b"weights", b"", b"weights 0002 and more"):
        path.write_bytes(data)
        with pytest.raises(DigestError) as caught:
            read_verified(pinned)
        message = str(caught.value)
        assert f"pinned as sha256 {pinned.sha256[:12]} (12 bytes)" in message
        assert re.search(r"now [0-9a-f]{12} \(", message)
    path.unlink()
    with pytest.raises(NpcError, match="cannot be read: No such file"):
        read_verified(pinned)


def test_a_wrong_digest_of_the_right_size_is_seen(run: Path) -> None:
    pinned = resolve(str(run))
    with pytest.raises(DigestError):
        read_verified(replace(pinned, sha256="0" * 64))


@pytest.mark.parametrize("name", ["random", "forager", "hunter"])
def test_scripted_builtins_have_a_digest_of_their_name_and_version(name: str) -> None:
    pinned = resolve(f"builtin://arena/{name}")
    assert (pinned.name, pinned.script, pinned.path, pinned.num_bytes) == (name, name, None, 0)
    assert pinned.uri == f"builtin://arena/{name}"
    assert pinned.sha256 == hashlib.sha256(f"builtin://arena/{name}@1".encode()).hexdigest()
    assert read_verified(pinned) == b""


def test_builtin_files_are_found_under_their_root(tmp_path: Path) -> None:
    path = write(tmp_path / "arena/medium.safetensors")
    found = find_builtin(parse_uri("builtin://arena/medium"), None, root=tmp_path)
    assert (found.uri, found.name, found.path) == ("builtin://arena/medium", "medium", path)
    with pytest.raises(NpcNotFoundError) as caught:
        find_builtin(parse_uri("builtin://arena/mediun"), None, root=tmp_path)
    assert str(caught.value) == (
        "builtin://arena/mediun: no such builtin; did you mean builtin://arena/medium? "
        "there are arena/random, arena/forager, arena/hunter, arena/medium"
    )


def test_an_unknown_builtin_names_the_nearest() -> None:
    with pytest.raises(NpcNotFoundError, match=r"did you mean builtin://arena/hunter\?"):
        resolve("builtin://arena/huntr")


def test_resolving_never_imports_torch() -> None:
    code = "import sys, dual_policy_plugin.npc.lock; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout == "False\n"


def policy(tmp_path: Path, number: int, **metadata: object) -> bytes:
    """A small policy file that says this about itself."""
    text = json.dumps({"architecture": "mlp", "metadata": metadata})
    header = json.dumps({"__metadata__": {"dual_policy": text}, "w": {"shape": [number], "dtype": "U8"}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(number)


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A run with epochs 1 to 6, of which 4 won most often and 3 says nothing about it."""
    for epoch, rate in ((1, 0.1), (2, 0.2), (3, None), (4, 0.9), (5, 0.3), (6, 0.4)):
        metrics = {} if rate is None else {"dual_policy/win_rate": rate}
        data = policy(tmp_path, epoch, epoch=epoch, step=epoch * 100, kind=epoch % 2, metrics=metrics)
        write(tmp_path / f"run/checkpoints/model_{epoch:04d}.safetensors", data)
    return tmp_path / "run"


def epochs(*, seed: int = 1, **selector: Any) -> list[int]:
    return [pin.metadata["epoch"] for pin in resolve_all(PolicySource(**selector), seed=seed)]


def test_selectors_over_a_directory(scored: Path) -> None:
    uri, rate = str(scored), "dual_policy/win_rate"
    assert epochs(uri=uri) == [6]
    assert epochs(uri=uri, type="latest", range=3) == [6, 5, 4]
    assert epochs(uri=uri, type="top", range=2) == [6, 5]
    assert epochs(uri=uri, type="top", range=2, metric=rate, filters={"kind": 0}) == [4, 6]
    assert epochs(uri=uri, type="all", filters={"kind": 1}) == [1, 3, 5]
    drawn = epochs(uri=uri, type="rand", range=3, seed=5)
    assert len(set(drawn)) == 3
    assert epochs(uri=uri, type="rand", range=3, seed=5) == drawn
    assert len({tuple(epochs(uri=uri, type="rand", range=3, seed=seed)) for seed in range(20)}) > 10
    with pytest.raises(NpcError, match=r"run: 1 of 6 policies have no dual_policy/win_rate \(run.model_0003\)"):
        epochs(uri=uri, type="top", metric=rate)


def test_a_pin_of_a_selector_says_what_it_is(scored: Path) -> None:
    (pinned,) = resolve_all(
        PolicySource(uri=str(scored), type="top", metric="dual_policy/win_rate", filters={"kind": "0"}), seed=1
    )
    assert pinned.requested == f"{scored} type=top range=1 metric=dual_policy/win_rate filters.kind=0"
    assert pinned.uri == f"file://{scored}/checkpoints/model_0004.safetensors"
    assert pinned.name == "run.model_0004"
    assert pinned.metadata["dual_policy/win_rate"] == 0.9
    assert pinned.metadata["parameters"] == 4


def test_every_policy_of_a_pool_has_a_name_of_its_own(scored: Path, tmp_path: Path) -> None:
    named = resolve_all(PolicySource(uri=str(scored), type="latest", range=3, name="old"), seed=1)
    assert [pin.name for pin in named] == ["old.0", "old.1", "old.2"]
    for job in ("a", "b"):
        write(tmp_path / f"runs/{job}/checkpoints/policy.pt", job.encode())
    assert [pin.name for pin in resolve_all(PolicySource(uri=str(tmp_path / "runs"), type="all"), seed=1)] == [
        "a.policy",
        "b.policy",
    ]
    assert unique_names(["a", "b", "a", "a", "a-2"]) == ["a", "b", "a-2", "a-3", "a-2-2"]
    assert len(set(unique_names(["x" * 64] * 12))) == 12


def test_of_a_directory_of_runs_the_newest_checkpoint_of_each_is_a_candidate(tmp_path: Path) -> None:
    for run, epoch, age in (("old", 900, 3000), ("new", 2, 1000)):
        path = write(
            tmp_path / f"runs/{run}/checkpoints/model_{epoch:04d}.safetensors", policy(tmp_path, 1, epoch=epoch)
        )
        write(path.with_name("model_0001.safetensors"), b"older")
        os.utime(path, (1e9 - age, 1e9 - age))
    # epochs of different runs say nothing about which is newer; the time does
    assert epochs(uri=str(tmp_path / "runs"), type="latest") == [2]
    assert epochs(uri=str(tmp_path / "runs"), type="top") == [900]
    assert sorted(epochs(uri=str(tmp_path / "runs"), type="all")) == [2, 900]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(NpcNotFoundError, match=r"no checkpoint in .*; it is empty$"):
        resolve_all(PolicySource(uri=str(tmp_path / "nothing"), type="all"), seed=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    return Cache()


def test_what_comes_from_s3_is_fetched_once_and_verified(s3_server: S3Server, cache: Cache, tmp_path: Path) -> None:  # noqa: F811
    client = s3_server.client()
    client.create_bucket(Bucket="policies")
    data = {epoch: policy(tmp_path, 1000 + epoch, epoch=epoch) for epoch in (1, 2, 3)}
    for epoch, content in data.items():
        client.put_object(Bucket="policies", Key=f"a/checkpoints/model_{epoch:04d}.safetensors", Body=content)
    source = PolicySource(uri="s3://policies/a/", type="latest", range=2)
    pinned = resolve_all(source, seed=1)
    assert [pin.uri.rpartition("/")[2] for pin in pinned] == ["model_0003.safetensors", "model_0002.safetensors"]
    assert [pin.sha256 for pin in pinned] == [hashlib.sha256(data[epoch]).hexdigest() for epoch in (3, 2)]
    assert [pin.path for pin in pinned] == [None, None]
    assert len(cache.ls()) == 2
    assert resolve_all(source, seed=1) == pinned
    lock = lock_entries(pinned, "now")
    s3_server.faults.add("GET", "status:503", times=100)  # from here on the cache alone can answer
    assert pin_locked(lock, source_text := request_text(source)) == pinned
    assert source_text == "s3://policies/a/ type=latest range=2"
    with hold_pinned(pinned):
        assert cache.prune(0) == []
    assert [read_verified(pin) for pin in pinned] == [data[3], data[2]]


def test_an_object_that_was_overwritten_stops_a_resume(s3_server: S3Server, cache: Cache, tmp_path: Path) -> None:  # noqa: F811
    client = s3_server.client()
    client.create_bucket(Bucket="policies")
    client.put_object(Bucket="policies", Key="model.pt", Body=b"first")
    pinned = resolve("s3://policies/model.pt")
    client.put_object(Bucket="policies", Key="model.pt", Body=b"other")
    assert read_verified(pinned) == b"first"  # still in the cache
    assert resolve("s3://policies/model.pt").sha256 == hashlib.sha256(b"other").hexdigest()
    cache.prune(0)
    with pytest.raises(DigestError, match=r"s3://policies/model.pt: pinned as sha256 [0-9a-f]{12} \(5 bytes\), now"):
        read_verified(pinned)
    client.delete_object(Bucket="policies", Key="model.pt")
    with pytest.raises(NpcNotFoundError, match=r"s3://policies/model.pt: no such object"):
        read_verified(pinned)


def test_damage_in_the_cache_is_mended_from_the_source(s3_server: S3Server, cache: Cache) -> None:  # noqa: F811
    client = s3_server.client()
    client.create_bucket(Bucket="policies")
    client.put_object(Bucket="policies", Key="model.pt", Body=b"weights")
    pinned = resolve("s3://policies/model.pt")
    cache.path(pinned.sha256).write_bytes(b"WEIGHTS")
    assert read_verified(pinned) == b"weights"
    assert cache.get("", pinned.sha256) == b"weights"


def test_a_cache_that_cannot_be_written_is_said_and_not_in_the_way(
    s3_server: S3Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path / "file")
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "file"))
    client = s3_server.client()
    client.create_bucket(Bucket="policies")
    client.put_object(Bucket="policies", Key="model.pt", Body=b"weights")
    pinned = resolve("s3://policies/model.pt")
    assert read_verified(pinned) == b"weights"
    assert "set DUAL_POLICY_CACHE to a folder with room" in caplog.text


def test_a_file_whose_path_a_config_would_interpolate_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "${oc.env:HOME}/model.pt")
    (tmp_path / "link").symlink_to(tmp_path / "${oc.env:HOME}/model.pt")
    with pytest.raises(NpcError, match="for an interpolation; rename the file"):
        resolve(str(tmp_path / "link"))


@pytest.mark.parametrize("kind", ["pipe", "broken link", "folder"])
def test_what_is_no_file_is_named_and_never_waited_for(scored: Path, kind: str) -> None:
    odd = scored / "checkpoints/model_0009.safetensors"
    {"pipe": os.mkfifo, "broken link": lambda path: path.symlink_to("nowhere"), "folder": os.mkdir}[kind](odd)
    with pytest.raises(NpcError, match=r"(model_0009.safetensors|nowhere) is no file .*remove it, or name a single"):
        resolve_all(PolicySource(uri=str(scored), type="all"), seed=0)
