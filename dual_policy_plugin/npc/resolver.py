"""Pins a policy: from the text to one immutable URI, its sha256 and its size; later gives just those bytes.

Third step: text -> uri -> sources -> PinnedPolicy. `policies/loading.py` takes the pin, asks `read_verified` for the
bytes and parses those bytes, from memory: what was verified is what is loaded.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.errors import DigestError, NpcError
from dual_policy_plugin.npc.sources import SOURCES, file_digest
from dual_policy_plugin.npc.uri import parse_uri

MAX_BYTES = 16 * 1024**3
SCRIPT_VERSION = 1
"""Raised when a scripted builtin plays another way; part of what stands in for its digest."""


@dataclass(kw_only=True, slots=True, frozen=True)
class PinnedPolicy:
    """A policy that can be had again, or is known to be gone: never silently another one."""

    name: str
    """In logs and metrics: letters, digits, _ . -"""
    requested: str
    """As the user wrote it."""
    uri: str
    """Immutable: file:///absolute/path/model_0042.safetensors, builtin://arena/medium."""
    sha256: str
    """Of the file's bytes; of b"builtin://<env>/<name>@<version>" where it is a script."""
    num_bytes: int
    """Size of the file; 0 for a script."""
    path: Path | None = None
    """Where the bytes are; None for a script."""
    script: str | None = None
    """Name of the scripted policy; None where there are weights."""


def resolve(source_uri: str, *, name: str | None = None, base: Path | None = None) -> PinnedPolicy:
    """The policy that `source_uri` means now, pinned.

    Args:
        source_uri: a path, file://..., builtin://... or a directory of checkpoints.
        name: the NPC's name in logs and metrics; None: made from where it was found.
        base: what a relative path is relative to; None: the working directory.

    Raises:
        NpcError: the URI or the name is malformed, or the file cannot be read.
        NpcNotFoundError: nothing stands there; the message says what does.
    """
    if name is not None and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) is None:
        raise NpcError(f"an NPC's name {name[:64]!a} is not possible; use up to 64 letters, digits, _ . -")
    uri = parse_uri(source_uri)
    found = SOURCES[uri.scheme](uri, base)
    if found.path is None:
        digest, num_bytes = hashlib.sha256(f"{found.uri}@{SCRIPT_VERSION}".encode()).hexdigest(), 0
    else:
        try:
            num_bytes = found.path.stat().st_size
            if num_bytes > MAX_BYTES:
                raise NpcError(f"{source_uri} has {num_bytes} bytes; a policy has at most {MAX_BYTES}")
            digest = file_digest(found.path)
        except OSError as error:
            raise _unreadable(source_uri, error) from error
    return PinnedPolicy(
        name=name or found.name,
        requested=source_uri,
        uri=found.uri,
        sha256=digest,
        num_bytes=num_bytes,
        path=found.path,
        script=found.script,
    )


def read_verified(pinned: PinnedPolicy) -> bytes:
    """The bytes that were pinned: read once, hashed, compared; empty for a script.

    Raises:
        DigestError: other bytes stand there now.
        NpcError: they cannot be read any more.
    """
    if pinned.path is None:
        return b""
    try:
        with pinned.path.open("rb") as file:
            data = file.read(pinned.num_bytes + 1)  # one more: a file that grew is seen without reading all of it
    except OSError as error:
        raise _unreadable(pinned.uri, error) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != pinned.sha256:
        size = f"{len(data)} bytes" if len(data) <= pinned.num_bytes else f"more than {pinned.num_bytes} bytes"
        raise DigestError(
            f"{pinned.uri}: pinned as sha256 {pinned.sha256[:12]} ({pinned.num_bytes} bytes), now {digest[:12]}"
            f" ({size}); bring the pinned file back, or start a new run"
        )
    return data


def _unreadable(uri: str, error: OSError) -> NpcError:
    return NpcError(f"{uri} cannot be read: {error.strerror or type(error).__name__}; check its access rights")
