"""Writes down which policies a run uses (`npc.lock.json`), and holds every later process to it.

Stands beside the resolver: the first process pins and writes the lock, a resume and every other process pin again
from the lock's immutable URIs and stop where the bytes are others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.files import publish
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve

LOCK_VERSION = 1
MAX_LOCK_BYTES = 16 * 1024**2

_FIELDS = {"requested": str, "uri": str, "sha256": str, "bytes": int, "name": str, "when": str}


@dataclass(kw_only=True, slots=True, frozen=True)
class LockEntry:
    """One policy as it was pinned; `num_bytes` is the key `bytes` in the file."""

    requested: str
    uri: str
    sha256: str
    num_bytes: int
    name: str
    when: str
    """When it was pinned, as the caller gave it (ISO 8601)."""


def lock_entries(pinned: Iterable[PinnedPolicy], when: str) -> tuple[LockEntry, ...]:
    """The entries of policies that were pinned at `when`.

    Raises:
        NpcError: two of them have one name; a lock, like the metrics, tells policies apart by their names.
    """
    pinned = tuple(pinned)
    names = [policy.name for policy in pinned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise NpcError(f"two NPCs are named {twice[0]}; give one of them another name")
    return tuple(
        LockEntry(requested=p.requested, uri=p.uri, sha256=p.sha256, num_bytes=p.num_bytes, name=p.name, when=when)
        for p in pinned
    )


def write_lock(path: Path, entries: Iterable[LockEntry]) -> None:
    """Publishes the lock file."""
    npcs = [
        {
            "requested": e.requested,
            "uri": e.uri,
            "sha256": e.sha256,
            "bytes": e.num_bytes,
            "name": e.name,
            "when": e.when,
        }
        for e in entries
    ]
    publish(path, (json.dumps({"version": LOCK_VERSION, "npcs": npcs}, indent=2) + "\n").encode())


def read_lock(path: Path) -> tuple[LockEntry, ...]:
    """The entries of a lock file.

    Raises:
        NpcError: it cannot be read or is not as `write_lock` writes it; the message says where.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LOCK_BYTES + 1)
        if len(data) > MAX_LOCK_BYTES:
            raise NpcError(f"{path}: over {MAX_LOCK_BYTES} bytes; this is no lock file")
        lock = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise NpcError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    except (ValueError, RecursionError) as error:
        raise NpcError(f"{path}: not valid JSON; restore it, or start a new run") from error
    if type(lock) is not dict or set(lock) != {"version", "npcs"} or type(lock["npcs"]) is not list:
        raise NpcError(f"{path}: a lock file has the keys version and npcs; restore it, or start a new run")
    if type(lock["version"]) is not int or lock["version"] != LOCK_VERSION:
        raise NpcError(f"{path}: its version is not {LOCK_VERSION}, which this package reads")
    entries = tuple(_read_entry(entry, f"{path}: npcs[{i}]") for i, entry in enumerate(lock["npcs"]))
    if len({entry.name for entry in entries}) != len(entries):
        raise NpcError(f"{path}: two entries have one name; restore it, or start a new run")
    return entries


def _read_entry(entry: object, where: str) -> LockEntry:
    if type(entry) is not dict or set(entry) != set(_FIELDS):
        raise NpcError(f"{where} must have the keys {', '.join(_FIELDS)}")
    for key, kind in _FIELDS.items():
        if type(entry[key]) is not kind:
            raise NpcError(f"{where}.{key} must be a {kind.__name__}, not {type(entry[key]).__name__}")
    if re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is None or entry["bytes"] < 0:
        raise NpcError(f"{where}: sha256 must be 64 hex digits and bytes not negative")
    num_bytes = entry.pop("bytes")
    return LockEntry(num_bytes=num_bytes, **entry)


def check_lock(lock: Iterable[LockEntry], pinned: PinnedPolicy) -> None:
    """Raises an error unless the lock has just these bytes under the policy's name.

    Raises:
        NpcNotFoundError: the lock does not know the policy.
        DigestError: it does, with other bytes.
    """
    lock = tuple(lock)
    entry = next((entry for entry in lock if entry.name == pinned.name), None)
    if entry is None:
        names = ", ".join(entry.name for entry in lock) or "nothing"
        raise NpcNotFoundError(f"{pinned.uri}: npc.lock.json has no policy named {pinned.name}; it has {names}")
    if (entry.sha256, entry.num_bytes) != (pinned.sha256, pinned.num_bytes):
        raise DigestError(
            f"{pinned.uri}: npc.lock.json pins {entry.name} as sha256 {entry.sha256[:12]} ({entry.num_bytes} bytes),"
            f" now {pinned.sha256[:12]} ({pinned.num_bytes} bytes); bring the pinned file back, or start a new run"
        )


def pin_locked(lock: Iterable[LockEntry], requested: str) -> PinnedPolicy:
    """The pin of the policy that was locked under this requested text, whatever the text would mean by now.

    Raises:
        NpcError: the lock does not know it, or the pinned file is gone.
        DigestError: other bytes stand there now.
    """
    lock = tuple(lock)
    entry = next((entry for entry in lock if entry.requested == requested), None)
    if entry is None:
        asked = ", ".join(entry.requested for entry in lock) or "nothing"
        raise NpcNotFoundError(f"{requested}: not in npc.lock.json, which has {asked}; start a new run for another NPC")
    pinned = replace(resolve(entry.uri, name=entry.name), requested=requested)
    check_lock([entry], pinned)
    return pinned
