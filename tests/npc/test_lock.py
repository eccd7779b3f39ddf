"""The lock file: written, read back strictly, and held against what stands there now."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import flat_metadata
from dual_policy_plugin.npc.lock import (
    check_lock,
    lock_entries,
    lock_facts,
    parse_lock,
    pin_locked,
    read_lock,
    write_lock,
)
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve
from dual_policy_plugin.run.config_diff import add_to_config

WHEN = "2030-01-02T03:04:05Z"


@pytest.fixture
def pinned(tmp_path: Path) -> list[PinnedPolicy]:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/model_0001.safetensors").write_bytes(b"one")
    return [resolve(str(tmp_path / "checkpoints"), name="old"), resolve("builtin://arena/random")]


def test_a_lock_comes_back_as_it_was_written(tmp_path: Path, pinned: list[PinnedPolicy]) -> None:
    path = tmp_path / "npc.lock.json"
    write_lock(path, lock_entries(pinned, WHEN))
    assert read_lock(path) == lock_entries(pinned, WHEN)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert content["npcs"][0] == {
        "role": "npc",
        "requested": str(tmp_path / "checkpoints"),
        "uri": f"file://{tmp_path}/checkpoints/model_0001.safetensors",
        "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
        "bytes": 3,
        "name": "old",
        "when": WHEN,
        "metadata": {"epoch": 1},
    }


def test_the_locked_policy_stays_though_the_directory_moves_on(tmp_path: Path, pinned: list[PinnedPolicy]) -> None:
    lock = lock_entries(pinned, WHEN)
    (tmp_path / "checkpoints/model_0002.safetensors").write_bytes(b"two")
    requested = str(tmp_path / "checkpoints")
    assert resolve(requested).sha256 != pinned[0].sha256
    assert pin_locked(lock, requested) == [pinned[0]]
    assert pin_locked(lock, "builtin://arena/random") == [pinned[1]]


def test_other_bytes_than_the_locked_ones_stop_a_resume(tmp_path: Path, pinned: list[PinnedPolicy]) -> None:
    lock = lock_entries(pinned, WHEN)
    for policy in pinned:
        check_lock(lock, policy)
    (tmp_path / "checkpoints/model_0001.safetensors").write_bytes(b"eno")
    with pytest.raises(DigestError, match=r"pins old as sha256 7692c3ad3540 \(3 bytes\), now [0-9a-f]{12} \(3 bytes\)"):
        pin_locked(lock, str(tmp_path / "checkpoints"))
    with pytest.raises(DigestError):
        check_lock(lock, replace(pinned[1], sha256="0" * 64))
    (tmp_path / "checkpoints/model_0001.safetensors").unlink()
    with pytest.raises(NpcNotFoundError, match=r"model_0001.safetensors: no such file"):
        pin_locked(lock, str(tmp_path / "checkpoints"))


def test_a_policy_that_the_lock_does_not_know_is_refused(pinned: list[PinnedPolicy]) -> None:
    lock = lock_entries(pinned[:1], WHEN)
    with pytest.raises(NpcNotFoundError, match=r"no policy named random; it has old$"):
        check_lock(lock, pinned[1])
    with pytest.raises(NpcNotFoundError, match=r"builtin://arena/random: not in npc.lock.json"):
        pin_locked(lock, "builtin://arena/random")


def test_two_policies_of_one_name_are_not_locked(pinned: list[PinnedPolicy]) -> None:
    with pytest.raises(NpcError, match="two NPCs are named old"):
        lock_entries([pinned[0], pinned[1], pinned[0]], WHEN)


def good_entry(**changes: Any) -> dict[str, Any]:
    entry = {"requested": "a", "uri": "file:///a", "sha256": "0" * 64, "bytes": 3, "name": "a", "when": WHEN}
    return {"role": "npc", **entry, "metadata": {"epoch": 3}} | changes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ([], "has the keys version and npcs"),
        ({"version": 1}, "has the keys version and npcs"),
        ({"version": 1, "npcs": {}}, "has the keys version and npcs"),
        ({"version": 2, "npcs": []}, "version is not 1"),
        ({"version": True, "npcs": []}, "version is not 1"),
        (
            {"version": 1, "npcs": [3]},
            r"npcs\[0\] must have the keys role, requested, uri, sha256, bytes, name, when, metadata",
        ),
        ({"version": 1, "npcs": [good_entry(), good_entry(name="b", extra=1)]}, r"npcs\[1\] must have the keys"),
        ({"version": 1, "npcs": [good_entry(bytes="3")]}, r"npcs\[0\].bytes must be a int, not str"),
        ({"version": 1, "npcs": [good_entry(bytes=True)]}, r"npcs\[0\].bytes must be a int, not bool"),
        ({"version": 1, "npcs": [good_entry(bytes=-1)]}, "not negative"),
        ({"version": 1, "npcs": [good_entry(sha256="0" * 63)]}, "64 hex digits"),
        ({"version": 1, "npcs": [good_entry(sha256="0" * 64 + "\n")]}, "64 hex digits"),
        ({"version": 1, "npcs": [good_entry(uri=None)]}, r"uri must be a str"),
        ({"version": 1, "npcs": [good_entry(), good_entry()]}, "two entries have one name"),
        ({"version": 1, "npcs": [good_entry(name="a/b")]}, "name must be up to 64 letters"),
        ({"version": 1, "npcs": [good_entry(role="judge")]}, "role one of npc, initial, opponent"),
        ({"version": 1, "npcs": [good_entry(metadata={"a": [1]})]}, "metadata must be names with plain numbers"),
        ({"version": 1, "npcs": [good_entry(metadata={"a": "${oc.env:HOME}"})]}, "metadata must be names with plain"),
    ],
)
def test_a_lock_that_is_not_as_written_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "npc.lock.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(NpcError, match=reason) as caught:
        read_lock(path)
    assert str(path) in str(caught.value)


def test_a_good_lock_is_read(tmp_path: Path) -> None:
    path = tmp_path / "npc.lock.json"
    path.write_text(json.dumps({"version": 1, "npcs": [good_entry(), good_entry(name="b")]}))
    assert [(entry.name, entry.num_bytes) for entry in read_lock(path)] == [("a", 3), ("b", 3)]


def test_a_lock_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NpcError, match="cannot be read: No such file"):
        read_lock(tmp_path / "npc.lock.json")


TEXTS = st.text(max_size=300) | st.sampled_from(
    ["???", "${a}", "yes", "1e3", "null", "~", "0x1f", "2026-01-01", "#", "a: b"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda children: st.lists(children, max_size=2) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(metadata=st.dictionaries(TEXTS, VALUES, max_size=6))
def test_whatever_a_policy_says_the_lock_and_the_config_come_back_as_written(metadata: dict[str, Any]) -> None:
    flat = flat_metadata(metadata)
    pin = PinnedPolicy(name="a", requested="a", uri="file:///a", sha256="0" * 64, num_bytes=1, metadata=flat)
    entries = lock_entries([pin], WHEN)
    assert parse_lock(json.loads(json.dumps(lock_facts(entries))), "x") == entries
    text = add_to_config("a: 1\n", "trainer.dual_policy.lock", lock_facts(entries))
    config = OmegaConf.to_container(OmegaConf.create(text), resolve=True, throw_on_missing=True)
    assert parse_lock(config["trainer"]["dual_policy"]["lock"], "x") == entries


def test_policies_of_several_roles_and_of_one_request(tmp_path: Path, pinned: list[PinnedPolicy]) -> None:
    twins = [replace(pinned[0], requested="all"), replace(pinned[1], requested="all")]
    entries = (*lock_entries(twins, WHEN), *lock_entries(pinned, WHEN, role="opponent"))
    write_lock(tmp_path / "npc.lock.json", entries)
    lock = read_lock(tmp_path / "npc.lock.json")
    assert lock == entries
    assert pin_locked(lock, "all") == twins
    assert pin_locked(lock, pinned[0].requested, role="opponent") == [pinned[0]]
    with pytest.raises(NpcNotFoundError, match=r"random: not in npc.lock.json, which has all;"):
        pin_locked(lock, "builtin://arena/random")


def test_what_is_fetched_is_pinned_without_a_question_to_the_network() -> None:
    pin = PinnedPolicy(
        name="a", requested="s3://b/", uri="s3://b/k.pt", sha256="0" * 64, num_bytes=1, metadata={"epoch": 1}
    )
    assert pin_locked(lock_entries([pin], WHEN), "s3://b/") == [pin]
