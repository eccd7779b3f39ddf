"""Policies in files: a path is one, a directory holds several."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import CheckpointError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.header import read_description
from dual_policy_plugin.npc.uri import NpcUri

MAX_BYTES = 16 * 1024**3
MAX_LISTED = 5
MAX_SCANNED = 10_000

_NUMBERED = re.compile(r"model_(\d{1,18})\.(safetensors|pt)")


def find(uri: NpcUri, base: Path | None) -> Candidate:
    """The file that a path means. A directory means its newest checkpoint (see `newest_checkpoint`).

    `latest.safetensors` and `best.safetensors` are overwritten while a run goes on; they are pinned to the
    model_<epoch> file beside them with the same content, where there is one. Links are followed.
    """
    path = _path(uri, base)
    try:
        if path.is_dir():
            path = newest_checkpoint(path, uri.text)
        elif not path.exists():
            raise NpcNotFoundError(f"{uri.text}: {_what_is_there(path)}")
        path = path.resolve()
        if not path.is_file():
            raise NpcError(f"{uri.text} is neither a file nor a directory; name a .safetensors or .pt file")
        if _NUMBERED.fullmatch(path.name) is None:
            path = _numbered_twin(path)
        return describe(path)
    except OSError as error:
        raise NpcError(f"{uri.text}: {error.strerror or type(error).__name__}; check its path and access") from error


def collection(uri: NpcUri, base: Path | None) -> list[Candidate]:
    """The checkpoints of a run directory; of a directory of runs the newest checkpoint of each; of a file itself."""
    path = _path(uri, base)
    try:
        if not path.is_dir():
            return [find(uri, base)]
        folder = _checkpoint_folder(path)
        files = _policy_files(_names_in(folder))
        if files:
            return [describe((folder / name).resolve()) for name in files]
        runs = [path / name for name in _names_in(path) if (path / name / "checkpoints").is_dir()]
        newest = [newest_checkpoint(run, uri.text) for run in runs if _policy_files(_names_in(run / "checkpoints"))]
        if newest:  # epochs of different runs say nothing about which is newer
            return [replace(describe(file.resolve()), version=None) for file in newest]
        raise NpcNotFoundError(f"{uri.text}: no checkpoint in {folder}; {_holds('it', _names_in(folder))}")
    except OSError as error:
        raise NpcError(f"{uri.text}: {error.strerror or type(error).__name__}; check its path and access") from error


def fetch(candidate: Candidate) -> bytes:
    """The file's bytes.

    Raises:
        NpcError: it cannot be read, or has another size than when it was found.
    """
    if candidate.path is None:
        return b""
    try:
        with candidate.path.open("rb") as file:
            data = file.read(candidate.num_bytes + 1)  # one more: a file that grew is seen without reading all of it
    except OSError as error:
        raise unreadable(candidate.uri, error) from error
    if len(data) != candidate.num_bytes:
        raise NpcError(f"{candidate.uri} changed while it was read; wait until it is written, and try again")
    return data


def describe(path: Path) -> Candidate:
    """The candidate that a file is; what is wrong with its content is said where it is loaded."""
    if not path.is_file():  # a pipe would be waited for
        raise NpcError(f"{path} is no file (a broken link, a pipe or a folder); remove it, or name a single policy")
    stat = path.stat()
    match = _NUMBERED.fullmatch(path.name)
    if stat.st_size > MAX_BYTES:
        raise NpcError(f"{path} has {stat.st_size} bytes; a policy has at most {MAX_BYTES}")
    facts: dict[str, Any] = {"epoch": int(match[1])} if match else {}
    return Candidate(
        name=_file_name(path),
        uri=f"file://{path}",
        version=int(match[1]) if match else None,
        created=datetime.fromtimestamp(stat.st_mtime, tz=UTC).isoformat(timespec="milliseconds"),
        num_bytes=stat.st_size,
        metadata=facts | read_facts(path, stat.st_size),
        path=path,
    )


def read_facts(path: Path, size: int) -> dict[str, Any]:
    """What a local policy file says about itself; nothing where it is none of ours."""

    def read_range(start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    with contextlib.suppress(CheckpointError):
        return dict(read_description(read_range, size, where=str(path))["flat"])
    return {}


def newest_checkpoint(directory: Path, asked: str) -> Path:
    """The newest checkpoint of a run directory or of its `checkpoints/`.

    Newest is the highest epoch in model_<epoch>.safetensors (or .pt; of one epoch the .safetensors). Without any such
    file it is `latest.safetensors`, or the one policy file that there is.
    """
    folder = _checkpoint_folder(directory)
    names = _names_in(folder)
    files = _policy_files(names)
    if files and (len(files) == 1 or _NUMBERED.fullmatch(files[-1])):
        return folder / files[-1]
    if "latest.safetensors" in names:
        return folder / "latest.safetensors"
    if files:
        raise NpcNotFoundError(f"{asked}: {folder} holds several policy files ({_listed(files)}); name one of them")
    jobs = [name for name in names if (folder / name / "checkpoints").is_dir()]
    if jobs:
        raise NpcNotFoundError(
            f"{asked}: no checkpoint of its own, it holds the runs {_listed(jobs)}; name one of them"
        )
    raise NpcNotFoundError(f"{asked}: no checkpoint in {folder}; {_holds('it', names)}")


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unreadable(uri: str, error: OSError) -> NpcError:
    """The error for a policy that stands there but cannot be read."""
    return NpcError(f"{uri} cannot be read: {error.strerror or type(error).__name__}; check its access rights")


def _path(uri: NpcUri, base: Path | None) -> Path:
    try:
        return (base or Path.cwd()) / Path(uri.path).expanduser()
    except (OSError, RuntimeError) as error:
        raise NpcError(f"{uri.text}: {error}; give an absolute path") from error


def _checkpoint_folder(directory: Path) -> Path:
    return directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory


def _policy_files(names: Iterable[str]) -> list[str]:
    """The numbered checkpoints by epoch (one file of each), else all policy files by name."""
    names = list(names)
    numbered = {}
    for match in sorted(filter(None, map(_NUMBERED.fullmatch, names)), key=lambda match: match[2] == "safetensors"):
        numbered[int(match[1])] = match[0]
    if numbered:
        return [numbered[epoch] for epoch in sorted(numbered)]
    return [name for name in names if name.endswith((".safetensors", ".pt"))]


def _numbered_twin(path: Path) -> Path:
    """The model_<epoch> file beside `path` with the same bytes, the newest first; `path` itself if there is none."""
    size = path.stat().st_size
    names = [name for name in _names_in(path.parent) if _NUMBERED.fullmatch(name) and name.endswith(path.suffix)]
    digest = None
    for name in sorted(names, key=lambda name: int(name[len("model_") :].split(".")[0]), reverse=True):
        twin = path.parent / name
        if twin.is_file() and twin.stat().st_size == size:
            digest = digest or file_digest(path)
            if file_digest(twin) == digest:
                return twin
    return path


def _file_name(path: Path) -> str:
    """<run>.<stem> for a file in a run's `checkpoints/`, else its stem; letters that metrics cannot hold become _."""
    name = f"{path.parent.parent.name}.{path.stem}" if path.parent.name == "checkpoints" else path.stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64] or "npc"


def _what_is_there(path: Path) -> str:
    """Why `path` is not there, and what stands beside it or beside its first missing parent."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = _names_in(missing.parent)
    if missing == path and (twins := [name for name in names if Path(name).stem == path.stem]):
        return f"no such file; {twins[0]} stands beside it, name that one"
    what = "no such file" if missing == path else f"{missing} does not exist"
    near = difflib.get_close_matches(missing.name, [one for one in names if _may_be_meant(missing.parent / one)], n=1)
    mend = f"did you mean {near[0]}? " if near else ""
    return f"{what}; {mend}{_holds(missing.parent, names)}"


def _may_be_meant(path: Path) -> bool:
    """False for a run without a checkpoint, such as the one that asks."""
    checkpoints = path / "checkpoints"
    with contextlib.suppress(OSError):
        return not checkpoints.is_dir() or bool(_policy_files(_names_in(checkpoints)))
    return True


def _holds(folder: Path | str, names: list[str]) -> str:
    return f"{folder} holds {_listed(names)}" if names else f"{folder} is empty"


def _listed(names: Iterable[str]) -> str:
    """Up to MAX_LISTED names and the count of the others."""
    names = list(names)
    others = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(ascii(name) if not name.isprintable() else name for name in names[:MAX_LISTED]) + others


def _names_in(folder: Path) -> list[str]:
    """Names of what stands in a folder, sorted; hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry, _ in zip(entries, range(MAX_SCANNED), strict=False) if entry.name[0] != ".")
