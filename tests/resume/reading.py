"""What stands in the directory of a run that was killed, and what may stand there.

Each file is read as its readers read it. What it may hold, the run in peace has shown: all versions of all files.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dual_policy_plugin import files
from dual_policy_plugin.checkpoint import decode_policy
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.run_state import decode_state

_CLOCK = (rb'"when": "[^"]*"', rb"when: [^\n]*", rb'"elapsed_s": [0-9.]+')
"""What depends on the clock in files that are else the same."""


@dataclass(kw_only=True, slots=True)
class Faults:
    """What should not be."""

    unreadable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Bytes that the run in peace never wrote, or something that was saved and is gone."""

    def all(self) -> list[str]:
        """Both kinds."""
        return self.unreadable + self.wrong


@dataclass(kw_only=True, slots=True)
class Peace:
    """What the run in peace left, and how it went."""

    run: Path
    versions: dict[str, set[str]]
    """By a file's name in the run directory: the digests of everything that ever stood in it."""
    metrics: list[bytes]
    saves: list[tuple[str, int]]
    """Each file that was saved, in turn: its kind, and how many calls that took."""
    calls: list[tuple[str, str, bool]]
    """Each call of the operating system, in turn: its name, the kind of the file, whether that is a temporary one."""
    length_s: dict[str, float]
    """Median seconds of a save, by kind of file."""
    start_s: float
    """From the fork to the first save."""


def digest(data: bytes) -> str:
    """The sha256 of a file but for its times."""
    for pattern in _CLOCK:
        data = re.sub(pattern, b"", data) if len(data) < 10**5 else data
    return hashlib.sha256(data).hexdigest()


def look(run: Path, peace: Peace, before: int, faults: Faults) -> int:
    """Reads every file of a run that was killed; adds to what is unreadable and what is wrong.

    Args:
        run: its directory.
        peace: what may stand there.
        before: iteration of the state after the kill before; less than 0: there was none.
        faults: takes the faults.

    Returns:
        The iteration of the state; less than 0: there is none.
    """
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", path.name) or name in ("run.lock", "npc_cache.json"):
            continue  # rubbish of the killed process; a note for people, without a reader
        data = path.read_bytes()
        try:
            _read_as_its_readers(path, data)
        except (DualPolicyError, ValueError, KeyError, yaml.YAMLError) as error:
            faults.unreadable.append(f"{name}: {error}")
            continue
        if path.suffix == ".jsonl" or path.name == "checkpoints.json":
            continue  # grow line by line, see below; may name a checkpoint that is to be made again
        if digest(data) not in peace.versions.get(name, ()):
            faults.wrong.append(f"{name} has bytes that the run in peace never wrote")
    iteration = _iteration(run / "state/training.safetensors")
    lines = files.read_lines(run / "metrics.jsonl")
    if lines != peace.metrics[: len(lines)]:
        faults.wrong.append("metrics.jsonl has lines that the run in peace never wrote")
    if len(lines) < iteration:
        faults.wrong.append(f"metrics.jsonl has {len(lines)} lines, the state is of iteration {iteration}")
    if iteration < before:
        faults.wrong.append(f"the state is of iteration {iteration}, it was of {before}")
    return iteration


def _read_as_its_readers(path: Path, data: bytes) -> None:
    if path.name == "training.safetensors":
        decode_state(data, path.name)
    elif path.suffix == ".safetensors":
        decode_policy(data, path.name)
    elif path.suffix == ".jsonl":
        for line in files.read_lines(path):
            json.loads(line)
    elif path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".yaml" and not isinstance(yaml.safe_load(data), dict):
        raise ValueError("holds no mapping")


def _iteration(state: Path) -> int:
    """That a state was saved after; less than 0: it is not there, or cannot be read."""
    try:
        return decode_state(state.read_bytes(), state.name).counters.iteration
    except (DualPolicyError, FileNotFoundError):
        return -1


def differences(peace: Path, other: Path) -> list[str]:
    """Files of two finished runs that are not the same, but for times."""
    digests = [
        {
            str(path.relative_to(run)): digest(path.read_bytes())
            for path in run.rglob("*")
            if path.is_file() and path.name not in ("timing.jsonl", "run.lock")
        }
        for run in (peace, other)
    ]
    names = sorted({*digests[0], *digests[1]})
    return [f"{name} is not as in peace" for name in names if digests[0].get(name) != digests[1].get(name)]
