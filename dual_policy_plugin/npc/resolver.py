"""Pins policies: from the text or a selector to immutable URIs, their sha256 and sizes; later gives just those bytes.

Third step: text -> uri -> sources -> selector -> PinnedPolicy. `policies/loading.py` takes the pin, asks
`read_verified` for the bytes and parses those bytes, from memory: what was verified is what is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.errors import DigestError, NpcError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.holds import Hold
from dual_policy_plugin.npc.selector import select
from dual_policy_plugin.npc.sources import SOURCES
from dual_policy_plugin.npc.sources.local import file_digest, unreadable
from dual_policy_plugin.npc.uri import parse_uri
from dual_policy_plugin.waiting import waiting

SCRIPT_VERSION = 1
"""Raised when a scripted builtin plays another way; part of what stands in for its digest."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class PinnedPolicy:
    """A policy that can be had again, or is known to be gone: never silently another one."""

    name: str
    """In logs and metrics: letters, digits, _ . -"""
    requested: str
    """As the user wrote it; with a selector, see `request_text`."""
    uri: str
    """Immutable: wandb://entity/project/type/name:v7, s3://bucket/key, file:///absolute/path/model_0042.safetensors,
    builtin://arena/medium."""
    sha256: str
    """Of the file's bytes; of b"builtin://<env>/<name>@<version>" where it is a script."""
    num_bytes: int
    """Size of the file; 0 for a script."""
    path: Path | None = None
    """Where the bytes are; None for a script, and for what is fetched into the cache."""
    script: str | None = None
    """Name of the scripted policy; None where there are weights."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Flat: epoch, step, architecture, metrics by their names, ... as far as it was known when it was pinned."""


def resolve_all(
    source: PolicySource, *, seed: int, base: Path | None = None, cache: Cache | None = None
) -> list[PinnedPolicy]:
    """The policies that a source means now, pinned; their bytes are at hand.

    Args:
        source: URI and selector.
        seed: the run's, for type=rand.
        base: what a relative path is relative to; None: the working directory.
        cache: for what is fetched; None: the default one.

    Raises:
        NpcError: the URI is malformed, or something cannot be read or fetched.
        NpcNotFoundError: nothing stands there, or too little; the message says what does.
    """
    chosen = choose(source, seed=seed, base=base)
    names = _names(source.name, chosen)
    requested = request_text(source)
    return [pin(one, name=name, requested=requested, cache=cache) for one, name in zip(chosen, names, strict=True)]


def resolve(
    source_uri: str, *, name: str | None = None, base: Path | None = None, cache: Cache | None = None
) -> PinnedPolicy:
    """The one policy that `source_uri` means now, pinned; as `resolve_all` for a URI without a selector."""
    _check_name(name)
    (found,) = resolve_all(PolicySource(uri=source_uri, name=name), seed=0, base=base, cache=cache)
    return found


def choose(source: PolicySource, *, seed: int, base: Path | None = None) -> list[Candidate]:
    """The candidates that a source means now; nothing is fetched."""
    uri = parse_uri(source.uri)
    of_scheme = SOURCES[uri.scheme]
    with waiting(f"looking up {source.uri}"):
        found = [of_scheme.find(uri, base)] if source.type == "specific" else of_scheme.collection(uri, base)
    return select(
        found,
        type=source.type,
        range=source.range,
        metric=source.metric,
        filters=source.filters,
        seed=seed,
        asked=source.uri,
    )


def pin(candidate: Candidate, *, name: str, requested: str, cache: Cache | None = None) -> PinnedPolicy:
    """A candidate with the digest of its bytes: hashed where they are, or fetched into the cache unless they are there.

    Raises:
        NpcError: they cannot be read or fetched.
    """
    if "${" in candidate.uri:
        raise NpcError(f"{candidate.uri}: a config would take ${{ for an interpolation; rename the file")
    num_bytes = candidate.num_bytes
    if candidate.script is not None:
        digest, num_bytes = hashlib.sha256(f"{candidate.uri}@{SCRIPT_VERSION}".encode()).hexdigest(), 0
    elif candidate.path is not None:
        try:
            with waiting(f"hashing {candidate.uri}"):
                digest, num_bytes = file_digest(candidate.path), candidate.path.stat().st_size
        except OSError as error:
            raise unreadable(candidate.uri, error) from error
    else:
        with waiting(f"fetching {candidate.uri}"):
            digest, num_bytes = _digest_of_remote(candidate, cache or Cache())
    return PinnedPolicy(
        name=name,
        requested=requested,
        uri=candidate.uri,
        sha256=digest,
        num_bytes=num_bytes,
        path=candidate.path,
        script=candidate.script,
        metadata=candidate.metadata,
    )


def read_verified(pinned: PinnedPolicy, *, cache: Cache | None = None) -> bytes:
    """The bytes that were pinned: read or fetched once, hashed, compared; empty for a script.

    Raises:
        DigestError: other bytes stand there now.
        NpcError: they cannot be had any more.
    """
    if pinned.script is not None:
        return b""
    if pinned.path is not None:
        try:
            with pinned.path.open("rb") as file:
                data = file.read(pinned.num_bytes + 1)  # one more: a file that grew is seen without reading all of it
        except OSError as error:
            raise unreadable(pinned.uri, error) from error
        _check_digest(data, pinned)
        return data
    cache = cache or Cache()
    cached = cache.get("", pinned.sha256)
    if cached is not None:
        return cached
    uri = parse_uri(pinned.uri)
    with waiting(f"fetching {pinned.uri}"), cache.fetching(pinned.uri):
        cached = cache.get("", pinned.sha256)  # another process may have fetched it while this one waited
        if cached is not None:
            return cached
        candidate = SOURCES[uri.scheme].find(uri, None)
        data = SOURCES[uri.scheme].fetch(candidate)
        _check_digest(data, pinned)
        _keep(data, candidate, cache)
    return data


def hold_pinned(pinned: Sequence[PinnedPolicy], cache: Cache | None = None) -> Hold:
    """Keeps the fetched ones in the cache for as long as the run lives."""
    remote = [one.sha256 for one in pinned if one.path is None and one.script is None]
    return (cache or Cache()).hold(remote) if remote else Hold()


def request_text(source: PolicySource) -> str:
    """What a source asks for, in one text: its URI, and the selector where there is one."""
    if source.type == "specific":
        words = []
    elif source.type == "all":
        words = ["type=all"]
    else:
        words = [f"type={source.type}", f"range={source.range}"]
    if source.type == "top":
        words.append(f"metric={source.metric}")
    words += [f"filters.{key}={value}" for key, value in sorted((source.filters or {}).items())]
    return " ".join([source.uri, *words])


def _digest_of_remote(candidate: Candidate, cache: Cache) -> tuple[str, int]:
    """(sha256, size) of what is fetched once and kept."""
    if not candidate.etag:  # a listing names no bytes; a name alone may mean others on another server, or made anew
        uri = parse_uri(candidate.uri)
        now = SOURCES[uri.scheme].find(uri, None)
        candidate = replace(candidate, etag=now.etag, num_bytes=now.num_bytes)
    with cache.fetching(candidate.uri):
        known = cache.known(_key(candidate)) if candidate.etag else None
        if known is not None and candidate.num_bytes in (0, known[1]):
            return known
        data = SOURCES[parse_uri(candidate.uri).scheme].fetch(candidate)
        _keep(data, candidate, cache)
    return hashlib.sha256(data).hexdigest(), len(data)


def _keep(data: bytes, candidate: Candidate, cache: Cache) -> None:
    try:
        cache.put(data, _key(candidate))
    except NpcError as error:
        _log.warning("%s; until then every process fetches for itself", error)


def _key(candidate: Candidate) -> str:
    """What the cache knows the bytes by; an object that was overwritten, or of another server, has another etag."""
    return f"{candidate.uri}#{candidate.etag}" if candidate.etag else candidate.uri


def _check_digest(data: bytes, pinned: PinnedPolicy) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != pinned.sha256:
        size = f"{len(data)} bytes" if len(data) <= pinned.num_bytes else f"more than {pinned.num_bytes} bytes"
        raise DigestError(
            f"{pinned.uri}: pinned as sha256 {pinned.sha256[:12]} ({pinned.num_bytes} bytes), now {digest[:12]}"
            f" ({size}); bring the pinned file back, or start a new run"
        )


def _names(name: str | None, chosen: Sequence[Candidate]) -> list[str]:
    """A different name for each: the given one or the candidate's own, with a number where one would be there twice."""
    if name is not None and len(chosen) == 1:
        return [name]
    names = [f"{name}.{i}" for i in range(len(chosen))] if name is not None else [one.name for one in chosen]
    return unique_names(names)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names in their order, each with -2, -3, ... behind it where it was there before."""
    result: list[str] = []
    for name in names:
        number, free = 2, name
        while free in result:
            free, number = f"{name[:58]}-{number}", number + 1
        result.append(free)
    return result


def _check_name(name: str | None) -> None:
    if name is not None and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) is None:
        raise NpcError(f"an NPC's name {name[:64]!a} is not possible; use up to 64 letters, digits, _ . -")
