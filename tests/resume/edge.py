"""The operating system's edge of a run: every call that reaches one folder or a file in it, seen before it happens.

What looks on may note the call, end the process there, refuse it as a failing disk would, or have a write stop half
way. Nothing of the product is replaced: `os.open` and its like are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "ftruncate")
KINDS = (
    "checkpoint", "latest", "best", "state", "index", "metrics", "timing", "result", "config", "npc lock", "run lock",
    "folder", "other",
)  # fmt: skip
_NAMES = {
    "latest.safetensors": "latest", "best.safetensors": "best", "training.safetensors": "state",
    "checkpoints.json": "index", "metrics.jsonl": "metrics", "timing.jsonl": "timing", "result.json": "result",
    "config.yaml": "config", "npc.lock.json": "npc lock", "run.lock": "run lock",
}  # fmt: skip
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")


@dataclass(kw_only=True, slots=True, frozen=True)
class Call:
    """A call of the operating system that is about to happen."""

    number: int
    """Counted from 1 over all files."""
    name: str
    """Of CALLS."""
    path: Path
    """The file that is meant; of a temporary one the file that it is to become."""
    is_temporary: bool
    """The file that the call gets is the temporary one."""
    kind: str
    """Of KINDS."""


Look = Callable[[Call], int | None]
"""Sees a call; may raise an OSError in its place, or give the number of bytes that a write takes at most."""


def kind_of(path: Path) -> str:
    """What a file of a run directory is, of KINDS."""
    if re.fullmatch(r"model_\d+\.safetensors", path.name):
        return "checkpoint"
    return _NAMES.get(path.name) or ("folder" if path.is_dir() else "other")


class Edge:
    """While it is entered, `os` has every call that means `folder` or what is in it looked at."""

    def __init__(
        self, folder: Path, before: Look, after: Callable[[Call, bool], None] = lambda call, done: None
    ) -> None:
        """Args: before, after: see each call right before it, and right after it, when it is known if it was done."""
        self._folder, self._before, self._after = folder.resolve(), before, after
        self._real = {name: getattr(os, name) for name in CALLS}
        self._open: dict[int, Path] = {}
        self._number = 0

    def __enter__(self) -> Edge:
        """Stands between."""
        for name in CALLS:
            look = self._by_path if name in ("open", "replace", "unlink") else self._by_descriptor
            setattr(os, name, partial(look, name))
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves `os` as it was."""
        for name, call in self._real.items():
            setattr(os, name, call)

    def _by_path(self, name: str, path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | Path) and Path(os.path.abspath(path)).is_relative_to(self._folder):
            return self._see(name, Path(os.path.abspath(path)), path, *args, **kwargs)
        return self._real[name](path, *args, **kwargs)

    def _by_descriptor(self, name: str, descriptor: int, *args: Any) -> Any:
        path = self._open.get(descriptor)
        if path is None:
            return self._real[name](descriptor, *args)
        return self._see(name, path, descriptor, *args)

    def _see(self, name: str, path: Path, *args: Any, **kwargs: Any) -> Any:
        match = _TEMPORARY.fullmatch(path.name)
        target = path.with_name(match[1]) if match else path
        self._number += 1
        call = Call(number=self._number, name=name, path=target, is_temporary=match is not None, kind=kind_of(target))
        most = self._before(call)
        if most is not None:
            args = (args[0], memoryview(args[1])[:most])
        try:
            result = self._real[name](*args, **kwargs)
        except OSError:
            self._after(call, False)
            raise
        if name == "open":
            self._open[result] = path
        elif name == "close":
            del self._open[args[0]]
        self._after(call, True)
        return result
