"""Policies in S3: a key is one, a prefix holds several. Through boto3, with the user's own configuration of it.

A ranged GET of an object's first bytes gives size, ETag, version and our description at once: nothing is downloaded to
choose. A fetch insists on the ETag (and the version) that was found.
"""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import CheckpointError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.header import FIRST_READ, read_description
from dual_policy_plugin.npc.sources import http
from dual_policy_plugin.npc.sources.http import read_body, read_checked
from dual_policy_plugin.npc.sources.s3_client import (
    NUM_CONNECTIONS,
    Listed,
    arguments_of,
    client,
    errors,
    get_range,
    list_objects,
    size_of,
    time_of,
)
from dual_policy_plugin.npc.uri import NpcUri, S3Name, s3_name

SHA256_KEY = "sha256"
"""User metadata of an object under which its publisher notes the sha256 of its bytes."""

log = logging.getLogger(__name__)


def find(uri: NpcUri, base: Path | None) -> Candidate:
    """The object that a key means. A prefix means its newest checkpoint, as a directory does.

    `latest.safetensors` and the like are overwritten while a run goes on; such a key is pinned to the model_<epoch>
    beside it with the same content, where there is one.

    Raises:
        NpcNotFoundError: there is no such object; the message says what else is there.
        NpcError: S3 does not let us, or cannot be reached.
    """
    name = s3_name(uri)
    if name.is_prefix:
        return _newest(name, uri.text)
    found = _describe(name, uri.text)
    if found is None:
        if name.version_id is None and (listed := list_objects(replace(name, key=f"{name.key}/"), uri.text)):
            return _newest(replace(name, key=f"{name.key}/"), uri.text, listed)
        raise NpcNotFoundError(f"{uri.text}: no such object; {_what_is_beside(name, uri.text)}")
    if name.version_id is None and found.version is None and "?versionId=" not in found.uri:
        return _numbered_twin(name, found, uri.text)
    return found


def collection(uri: NpcUri, base: Path | None) -> list[Candidate]:
    """The checkpoints under a prefix, as for a directory: of a run all; of several runs the newest of each.

    Raises:
        NpcNotFoundError: there is none.
    """
    name = s3_name(uri)
    if not name.is_prefix:
        if (found := _describe(name, uri.text)) is not None:
            return [found]
        if name.version_id is not None:
            raise NpcNotFoundError(f"{uri.text}: no such object or version; {_what_is_beside(name, uri.text)}")
        name = replace(name, key=f"{name.key}/")
    listed = list_objects(name, uri.text)
    files, is_one_run = _checkpoints(name.key, listed)
    if not files:
        raise NpcNotFoundError(f"{uri.text}: no checkpoint under this prefix; {_what_is_beside(name, uri.text)}")
    client()  # made once, before the threads
    with ThreadPoolExecutor(min(NUM_CONNECTIONS, len(files))) as pool:
        described = pool.map(lambda file: _describe_listed(name.bucket, file, uri.text), files)
        candidates = [found for found in described if found is not None]  # None: removed since it was listed
    return candidates if is_one_run else [replace(found, version=None) for found in candidates]


def fetch(candidate: Candidate) -> bytes:
    """The object's bytes: of the size, version and ETag that were found, and whole.

    Raises:
        DigestError: another object stands there now.
        NpcError: S3 does not give it; every attempt was used.
    """
    name = s3_name(NpcUri(text=candidate.uri, scheme="s3", path=candidate.uri.removeprefix("s3://")))
    data = read_checked(lambda: _read(name, candidate), candidate.uri)
    _check_facts(data, candidate)
    return data


def _read(name: S3Name, candidate: Candidate) -> tuple[bytes, bool]:
    """The object's bytes, and whether a digest was compared."""
    with errors(candidate.uri):
        answer = client().get_object(**arguments_of(name, candidate.etag))
        try:
            num_bytes = candidate.num_bytes or int(answer["ContentLength"])
            if num_bytes > http.MAX_BYTES:
                raise NpcError(f"{candidate.uri} has {num_bytes} bytes; a policy has at most {http.MAX_BYTES}")
            data = read_body(answer["Body"].read, num_bytes, candidate.uri)
        finally:
            answer["Body"].close()
    sha256 = str(answer.get("Metadata", {}).get(SHA256_KEY, ""))
    is_plain = not str(answer.get("ServerSideEncryption") or "").startswith("aws:kms")
    is_plain = is_plain and not answer.get("SSECustomerAlgorithm")  # else an ETag is no MD5
    is_vouched = http.check_bytes(data, num_bytes=num_bytes, md5=_bare(answer.get("ETag")) if is_plain else "")
    if re.fullmatch(r"[0-9a-f]{64}", sha256):
        return data, http.check_sha256(data, sha256)
    return data, is_vouched


def _check_facts(data: bytes, candidate: Candidate) -> None:
    """Raises unless the bytes say about themselves what the first bytes said when the candidate was chosen."""
    if not candidate.metadata or not candidate.uri.partition("?")[0].endswith(".safetensors"):
        return
    try:
        facts = read_description(lambda start, stop: data[start:stop], len(data), where=candidate.uri)["flat"]
    except CheckpointError:
        return  # said where the policy is loaded
    if any(facts.get(key, value) != value for key, value in candidate.metadata.items()):
        raise NpcError(f"{candidate.uri}: its header was misread when it was chosen; try again")


def _newest(name: S3Name, asked: str, listed: list[Listed] | None = None) -> Candidate:
    """The newest checkpoint of a run under a prefix: the highest epoch, else latest.safetensors, else the only file."""
    listed = list_objects(name, asked) if listed is None else listed
    files, is_one_run = _checkpoints(name.key, listed)
    if not files:
        raise NpcNotFoundError(f"{asked}: no checkpoint under this prefix; {_what_is_beside(name, asked)}")
    if not is_one_run:
        folders = sorted({file.folder.removesuffix("checkpoints/") for file in files})
        raise NpcNotFoundError(
            f"{asked}: no checkpoint of its own, it holds the runs {_some(folders)}; name one of them"
        )
    latest = [file for file in files if file.key.endswith("/latest.safetensors")]
    if files[-1].epoch is None and len(files) > 1 and not latest:
        raise NpcNotFoundError(f"{asked}: several policy files ({_some([f.key for f in files])}); name one of them")
    chosen = files[-1] if files[-1].epoch is not None or not latest else latest[0]
    found = _describe_listed(name.bucket, chosen, asked)
    if found is None:
        raise NpcNotFoundError(f"{asked}: {chosen.key} was removed while it was looked at; try again")
    return found


def _checkpoints(prefix: str, listed: list[Listed]) -> tuple[list[Listed], bool]:
    """The policy files that a prefix means, and whether they are one run's (then in the order of their epochs).

    As for a directory: those in its checkpoints/, else those directly in it, else the newest of each run below it.
    """
    folders: dict[str, list[Listed]] = {}
    for file in listed:
        folders.setdefault(file.folder, []).append(file)
    for own in (f"{prefix}checkpoints/", prefix):
        if own in folders:
            return _by_epoch(folders[own]), True
    runs = [_by_epoch(files) for folder, files in sorted(folders.items()) if folder.endswith("/checkpoints/")]
    runs = runs or [_by_epoch(files) for folder, files in sorted(folders.items()) if not folder.endswith("/state/")]
    return [_newest_of(files) for files in runs], False


def _newest_of(files: list[Listed]) -> Listed:
    latest = [file for file in files if file.key.endswith("/latest.safetensors")]
    return files[-1] if files[-1].epoch is not None or not latest else latest[0]


def _by_epoch(files: list[Listed]) -> list[Listed]:
    """The numbered checkpoints by epoch (one file of each, rather .safetensors), else all by key."""
    numbered: dict[int, Listed] = {}
    for file in sorted(files, key=lambda file: file.key.endswith(".safetensors")):
        if file.epoch is not None:
            numbered[file.epoch] = file
    return [numbered[epoch] for epoch in sorted(numbered)] or sorted(files, key=lambda file: file.key)


def _describe_listed(bucket: str, file: Listed, asked: str) -> Candidate | None:
    return _describe(S3Name(bucket=bucket, key=file.key), asked, etag=file.etag)


def _describe(name: S3Name, asked: str, *, etag: str = "") -> Candidate | None:
    """The candidate that an object is, from its first bytes; None where there is no such object."""
    where = f"s3://{name.bucket}/{name.key}"
    try:
        first, head = get_range(name, 0, FIRST_READ, etag=etag, where=where)
    except NpcNotFoundError:
        return None
    if (size := size_of(head)) > http.MAX_BYTES:
        raise NpcError(f"{where} has {size} bytes; a policy has at most {http.MAX_BYTES}")
    etag = str(head.get("ETag") or "")
    version_id = str(head.get("VersionId") or "")
    version_id = "" if version_id == "null" else version_id
    pinned = replace(name, version_id=version_id or name.version_id)

    def read_range(start: int, stop: int) -> bytes:
        if stop <= len(first):
            return first[start:stop]
        return first[start:] + get_range(pinned, max(start, len(first)), stop, etag=etag, where=where)[0]

    facts: dict[str, Any] = {}
    if name.key.endswith(".safetensors"):
        try:
            facts = dict(read_description(read_range, size, where=where)["flat"])
        except CheckpointError as error:
            log.warning("%s", error)
    listed = Listed(key=name.key, size=size, etag=etag, created=time_of(head.get("LastModified")))
    return Candidate(
        name=_policy_name(name.key),
        uri=where + (f"?versionId={pinned.version_id}" if pinned.version_id else ""),
        version=listed.epoch,
        created=listed.created,
        num_bytes=size,
        metadata=({} if listed.epoch is None else {"epoch": listed.epoch}) | facts,
        etag=etag,
    )


def _numbered_twin(name: S3Name, found: Candidate, asked: str) -> Candidate:
    """The newest model_<epoch> beside an object with the same ETag and size; the object itself if there is none."""
    folder = name.key[: name.key.rfind("/") + 1]
    listed = list_objects(replace(name, key=f"{folder}model_"), asked)
    twins = [
        file
        for file in _by_epoch(listed)
        if file.folder == folder and (file.etag, file.size) == (found.etag, found.num_bytes)
    ]
    twin = _describe_listed(name.bucket, twins[-1], asked) if twins and twins[-1].epoch is not None else None
    return twin or found


def _bare(etag: object) -> str:
    return str(etag or "").strip('"')


def _policy_name(key: str) -> str:
    """<run>.<stem> for an object in a run's `checkpoints/`, else its stem."""
    parts = key.split("/")
    stem = parts[-1].rpartition(".")[0] or parts[-1]
    name = f"{parts[-3]}.{stem}" if len(parts) > 2 and parts[-2] == "checkpoints" else stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64] or "npc"


def _what_is_beside(name: S3Name, asked: str) -> str:
    """What policy files stand in the same folder."""
    folder = name.key[: name.key.rstrip("/").rfind("/") + 1]
    try:
        listed = list_objects(replace(name, key=folder, version_id=None), asked)
    except NpcNotFoundError:
        return f"there is no bucket {name.bucket}"
    except NpcError:
        return "what else is there cannot be listed"
    return f"s3://{name.bucket}/{folder} holds {_some([f.key for f in listed])}" if listed else "no policy is beside it"


def _some(names: list[str]) -> str:
    others = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + others
