"""Finds where a policy's bytes are: one function per scheme, in one table. Second step: NpcUri -> Found -> resolver.

A new scheme is a new function in SOURCES (and a word in `uri.SCHEMES`). Whatever a URI means at the moment (a
directory, `latest.safetensors`) is decided here, once: what comes back names one file that does not change.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.errors import NpcError, NpcNotFoundError
from dual_policy_plugin.npc.uri import NpcUri

BUILTIN_ROOT = Path(__file__).resolve().parent.parent / "builtin"
"""Package data: <env>/<name>.safetensors."""
SCRIPTS = {"arena": ("random", "forager", "hunter")}
"""Builtins that are code, not weights."""
MAX_LISTED = 5
MAX_SCANNED = 10_000

_NUMBERED = re.compile(r"model_(\d{1,18})\.(safetensors|pt)")


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """What a URI meant when it was looked up."""

    uri: str
    """Immutable: means the same thing later."""
    name: str
    """A name for logs and metrics, if the user gives none."""
    path: Path | None = None
    script: str | None = None


def find_file(uri: NpcUri, base: Path | None) -> Found:
    """The file that a path means. A directory means its newest checkpoint (see `newest_checkpoint`).

    `latest.safetensors` and `best.safetensors` are overwritten while a run goes on; they are pinned to the
    model_<epoch> file beside them with the same content, where there is one. Links are followed.
    """
    path = (base or Path.cwd()) / Path(uri.path).expanduser()
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
    except OSError as error:
        raise NpcError(f"{uri.text}: {error.strerror or type(error).__name__}; check its path and access") from error
    return Found(uri=f"file://{path}", name=_file_name(path), path=path)


def newest_checkpoint(directory: Path, asked: str) -> Path:
    """The newest checkpoint of a run directory or of its `checkpoints/`.

    Newest is the highest epoch in model_<epoch>.safetensors (or .pt; of one epoch the .safetensors). Without any such
    file it is `latest.safetensors`, or the one policy file that there is.
    """
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    names = _names_in(folder)
    numbered = [
        (int(match[1]), match[2] == "safetensors", match[0]) for match in map(_NUMBERED.fullmatch, names) if match
    ]
    if numbered:
        return folder / max(numbered)[2]
    if "latest.safetensors" in names:
        return folder / "latest.safetensors"
    files = [name for name in names if name.endswith((".safetensors", ".pt"))]
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise NpcNotFoundError(f"{asked}: {folder} holds several policy files ({_listed(files)}); name one of them")
    jobs = [name for name in names if (folder / name / "checkpoints").is_dir()]
    if jobs:
        raise NpcNotFoundError(
            f"{asked}: no checkpoint of its own, it holds the runs {_listed(jobs)}; name one of them"
        )
    raise NpcNotFoundError(f"{asked}: no checkpoint in {folder}; {_holds(folder, names)}")


def find_builtin(uri: NpcUri, base: Path | None, *, root: Path = BUILTIN_ROOT) -> Found:
    """The package's own policy <env>/<name>: a script, or a file under `root`."""
    env, name = uri.path.split("/")
    text = f"builtin://{uri.path}"
    if name in SCRIPTS.get(env, ()):
        return Found(uri=text, name=name, script=name)
    path = root / env / f"{name}.safetensors"
    if path.is_file():
        return Found(uri=text, name=name, path=path)
    known = [f"{env}/{script}" for env, scripts in SCRIPTS.items() for script in scripts]
    known += [f"{path.parent.name}/{path.stem}" for path in sorted(root.glob("*/*.safetensors"))]
    near = difflib.get_close_matches(uri.path, known, n=1)
    mend = f"did you mean builtin://{near[0]}? " if near else ""
    raise NpcNotFoundError(f"{uri.text}: no such builtin; {mend}there are {', '.join(known)}")


SOURCES: dict[str, Callable[[NpcUri, Path | None], Found]] = {"file": find_file, "builtin": find_builtin}


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


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    near = difflib.get_close_matches(missing.name, names, n=1)
    mend = f"did you mean {near[0]}? " if near else ""
    return f"{what}; {mend}{_holds(missing.parent, names)}"


def _holds(folder: Path, names: list[str]) -> str:
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
