"""Writes down which policies a run uses (`npc.lock.json`), and holds every later process to it.

Stands beside the resolver: the first process pins and writes the lock, a resume and every other process pin again
from the lock's immutable URIs and stop where the bytes are others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import ConfigError, DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.files import publish
from dual_policy_plugin.npc.candidates import flat_metadata
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve
from dual_policy_plugin.npc.uri import parse_uri

LOCK_VERSION = 1
MAX_LOCK_BYTES = 16 * 1024**2

ROLES = ("npc", "initial", "opponent", "held_out")
"""What a policy is to a run: plays beside the learner, is what the learner starts from, is evaluated against, is
evaluated against and never plays beside it."""

_FIELDS = {
    "role": str,
    "requested": str,
    "uri": str,
    "sha256": str,
    "bytes": int,
    "name": str,
    "when": str,
    "metadata": dict,
}


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
    role: str = "npc"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What was known of it then; flat."""


def lock_entries(pinned: Iterable[PinnedPolicy], when: str, *, role: str = "npc") -> tuple[LockEntry, ...]:
    """The entries of policies that were pinned at `when`.

    Raises:
        NpcError: two of them have one name; a lock, like the metrics, tells policies apart by their names.
    """
    pinned = tuple(pinned)
    names = [policy.name for policy in pinned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise NpcError(f"two NPCs are named {twice[0]}; give one of them another name")
    return tuple(
        LockEntry(
            requested=p.requested,
            uri=p.uri,
            sha256=p.sha256,
            num_bytes=p.num_bytes,
            name=p.name,
            when=when,
            role=role,
            metadata=dict(p.metadata),
        )
        for p in pinned
    )


def entry_facts(entry: LockEntry) -> dict[str, Any]:
    """An entry as plain JSON, as it stands in the lock file, in config.yaml and in checkpoints."""
    facts = asdict(entry)
    return {key: facts["num_bytes" if key == "bytes" else key] for key in _FIELDS}


def lock_facts(entries: Iterable[LockEntry]) -> dict[str, Any]:
    """A whole lock as plain JSON."""
    return {"version": LOCK_VERSION, "npcs": [entry_facts(entry) for entry in entries]}


def write_lock(path: Path, entries: Iterable[LockEntry]) -> None:
    """Publishes the lock file."""
    publish(path, (json.dumps(lock_facts(entries), indent=2) + "\n").encode())


def read_lock(path: Path) -> tuple[LockEntry, ...]:
    """The entries of a lock file.

    Raises:
        NpcError: it cannot be read or is not as `write_lock` writes it; the message says where.
    """
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_LOCK_BYTES + 1)
        if len(data) > MAX_LOCK_BYTES:
            raise NpcError(f"{path}: over {MAX_LOCK_BYTES} bytes; this is no lock file")
        lock = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise NpcError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    except (ValueError, RecursionError) as error:
        raise NpcError(f"{path}: not valid JSON; restore it, or start a new run") from error
    return parse_lock(lock, str(path))


def parse_lock(lock: object, where: str) -> tuple[LockEntry, ...]:
    """The entries of a lock that was read from a file or a config.

    Raises:
        NpcError: it is not as `lock_facts` makes it; the message says where.
    """
    if type(lock) is not dict or set(lock) != {"version", "npcs"} or type(lock["npcs"]) is not list:
        raise NpcError(f"{where}: a lock file has the keys version and npcs; restore it, or start a new run")
    if type(lock["version"]) is not int or lock["version"] != LOCK_VERSION:
        raise NpcError(f"{where}: its version is not {LOCK_VERSION}, which this package reads")
    entries = tuple(_read_entry(entry, f"{where}: npcs[{i}]") for i, entry in enumerate(lock["npcs"]))
    if len({(entry.role, entry.name) for entry in entries}) != len(entries):
        raise NpcError(f"{where}: two entries have one name; restore it, or start a new run")
    return entries


def _read_entry(entry: object, where: str) -> LockEntry:
    if type(entry) is not dict or set(entry) != set(_FIELDS):
        raise NpcError(f"{where} must have the keys {', '.join(_FIELDS)}")
    for key, kind in _FIELDS.items():
        if type(entry[key]) is not kind:
            raise NpcError(f"{where}.{key} must be a {kind.__name__}, not {type(entry[key]).__name__}")
    if re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is None or entry["bytes"] < 0:
        raise NpcError(f"{where}: sha256 must be 64 hex digits and bytes not negative")
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", entry["name"]) is None or entry["role"] not in ROLES:
        raise NpcError(f"{where}: name must be up to 64 letters, digits, _ . - and role one of {', '.join(ROLES)}")
    if flat_metadata(entry["metadata"]) != entry["metadata"]:
        raise NpcError(f"{where}: metadata must be names with plain numbers and short texts")
    values = {key: value for key, value in entry.items() if key != "bytes"}
    return LockEntry(num_bytes=entry["bytes"], **values)


def check_lock(lock: Iterable[LockEntry], pinned: PinnedPolicy, *, role: str = "npc") -> None:
    """Raises an error unless the lock has just these bytes under the policy's name.

    Raises:
        NpcNotFoundError: the lock does not know the policy.
        DigestError: it does, with other bytes.
    """
    lock = tuple(entry for entry in lock if entry.role == role)
    entry = next((entry for entry in lock if entry.name == pinned.name), None)
    if entry is None:
        names = ", ".join(entry.name for entry in lock) or "nothing"
        raise NpcNotFoundError(f"{pinned.uri}: npc.lock.json has no policy named {pinned.name}; it has {names}")
    if (entry.sha256, entry.num_bytes) != (pinned.sha256, pinned.num_bytes):
        raise DigestError(
            f"{pinned.uri}: npc.lock.json pins {entry.name} as sha256 {entry.sha256[:12]} ({entry.num_bytes} bytes),"
            f" now {pinned.sha256[:12]} ({pinned.num_bytes} bytes); bring the pinned file back, or start a new run"
        )


def locked_as(lock: Iterable[LockEntry], requested: str, *, role: str = "npc") -> tuple[LockEntry, ...]:
    """The entries that were locked under this requested text (see `resolver.request_text`), in their order."""
    return tuple(entry for entry in lock if entry.requested == requested and entry.role == role)


def pin_locked(lock: Iterable[LockEntry], requested: str, *, role: str = "npc") -> list[PinnedPolicy]:
    """The pins of the policies that were locked under this requested text, whatever the text would mean by now.

    Files are hashed here; what is fetched is verified where it is loaded, and nothing is asked over the network.

    Raises:
        NpcError: the lock does not know it, or the pinned file is gone.
        DigestError: other bytes stand there now.
    """
    lock = tuple(lock)
    entries = locked_as(lock, requested, role=role)
    if not entries:
        asked = ", ".join(dict.fromkeys(entry.requested for entry in lock if entry.role == role)) or "nothing"
        raise NpcNotFoundError(f"{requested}: not in npc.lock.json, which has {asked}; start a new run for another NPC")
    return [_pin_entry(entry) for entry in entries]


def check_held_out(held_out: Iterable[PinnedPolicy | LockEntry], npcs: Mapping[str, str]) -> None:
    """Raises a ConfigError where a held-out policy is an NPC of the run, by its bytes and not by its name.

    Args:
        held_out: the policies of evals.held_out.
        npcs: sha256 -> name.
    """
    for held in held_out:
        if held.sha256 in npcs:
            raise ConfigError(
                f"evals.held_out={held.requested} is the NPC {npcs[held.sha256]} of this run (sha256 "
                f"{held.sha256[:12]}); hold out a policy that the learner does not train against"
            )


def _pin_entry(entry: LockEntry) -> PinnedPolicy:
    if parse_uri(entry.uri).scheme in ("file", "builtin"):
        here = resolve(entry.uri, name=entry.name)
        check_lock([replace(entry, role="npc")], here)
        return replace(here, requested=entry.requested, metadata=entry.metadata)
    return PinnedPolicy(
        name=entry.name,
        requested=entry.requested,
        uri=entry.uri,
        sha256=entry.sha256,
        num_bytes=entry.num_bytes,
        metadata=entry.metadata,
    )
