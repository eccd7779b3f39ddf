"""What a directory holds (a run, a sweep, a curriculum sweep) and the facts of a run in it.

Only reads: a run that is still going is shown as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.errors import NpcError, RunError
from dual_policy_plugin.files import file_error, read_json
from dual_policy_plugin.npc.lock import LockEntry, read_lock
from dual_policy_plugin.report.page.series import Floats, Lines, read_series
from dual_policy_plugin.run.lock import is_locked

CURRICULUM_NAME = "curriculum.json"
CROSS_PLAY_NAME = "cross_play.json"
RUN_FILES = ("config.yaml", "metrics.jsonl", "result.json")
"""A directory with one of these is a run."""
FINISHED, GOING, STOPPED = "finished", "still going", "stopped"
_MAX_NAMED = 4


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """A directory that the user named."""

    folder: Path
    runs: tuple[tuple[str, Path], ...]
    """Name in the page and directory of each run."""
    is_sweep: bool
    is_curriculum: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class Match:
    """A win rate against an opponent, with its 95 % interval."""

    opponent: str
    win_rate: float
    low: float
    high: float
    episodes: float


@dataclass(kw_only=True, slots=True, frozen=True)
class Run:
    """What is known of one run."""

    name: str
    folder: Path
    status: str
    """finished | still going | stopped."""
    config_text: str
    """config.yaml as it stands; "" where there is none."""
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None
    evals: tuple[Match, ...]
    """Of result.json."""
    evals_step: float | None
    """Learner steps after which they were played."""
    metrics: Lines
    timing: Lines
    policies: tuple[LockEntry, ...]
    """Of npc.lock.json."""
    notes: tuple[str, ...] = ()
    """What the reader should know of the files."""
    steps: Floats = field(repr=False)
    """Learner steps of each line of metrics."""

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the config; None: it has none."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    def fact(self, metric: str, result_key: str = "") -> float | None:
        """The newest value of a metric, of the clock or not, else what result.json says."""
        value = self.metrics.last(metric)
        value = self.timing.last(metric) if value is None else value
        found = None if value is not None or self.result is None else self.result.get(result_key)
        return value if found is None else _number(found)


def find_runs(folder: Path) -> Found:
    """The runs that a directory holds.

    Raises:
        RunError: it is no directory, it is empty, or it is no run; names the nearest that is one.
    """
    if not folder.exists():
        raise RunError(f"{folder} is not there; name a run directory, train_dir/<run>")
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; name the run directory, for example {folder.parent}")
    whole = folder.absolute()
    name = f"{whole.parent.name}/{whole.name}" if whole.name.isdecimal() else whole.name
    try:
        is_curriculum = (folder / CURRICULUM_NAME).is_file()
        jobs = [one for one in folder.iterdir() if re.fullmatch(r"\d+", one.name) and _is_run(one)]
        if _is_run(folder) and not is_curriculum:
            return Found(folder=folder, runs=((name, folder),), is_sweep=False)
        if is_curriculum or jobs:
            jobs.sort(key=lambda one: int(one.name))
            runs = tuple((f"{name}/{one.name}", one) for one in jobs)
            return Found(folder=folder, runs=runs, is_sweep=True, is_curriculum=is_curriculum)
        inside = sorted(
            {path.parent for one in RUN_FILES for deep in ("*", "*/*") for path in folder.glob(f"{deep}/{one}")}
        )
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise file_error(error, folder, "read") from error
    if inside:
        more = f" and {len(inside) - _MAX_NAMED} more" if len(inside) > _MAX_NAMED else ""
        shown = ", ".join(map(str, inside[:_MAX_NAMED]))
        raise RunError(f"{folder} is no run directory; there are runs in it: {shown}{more}")
    if is_empty:
        raise RunError(f"{folder} is empty, no run has begun there; name a run directory, train_dir/<run>")
    above = next((one for one in folder.absolute().parents[:2] if _is_run(one)), None)
    near = f"did you mean {above}?" if above else "name one, train_dir/<run>"
    raise RunError(f"{folder} is no run directory, it has none of {', '.join(RUN_FILES)}; {near}")


def read_run(name: str, folder: Path, *, is_own: bool = False) -> Run:
    """The facts of the run at `folder`.

    Args:
        name: in the page.
        folder: that `find_runs` gave.
        is_own: this process has the run, and it is complete.

    Raises:
        RunError: a file of it cannot be read.
    """
    metrics, timing = read_series(folder / "metrics.jsonl"), read_series(folder / "timing.jsonl")
    result = read_json(folder / "result.json")
    text, config = _read_config(folder / "config.yaml")
    notes = [
        f"the last line of {file_name} is half written, and left out"
        for file_name, lines in (("metrics.jsonl", metrics), ("timing.jsonl", timing))
        if lines.torn_bytes
    ]
    if not metrics.num_lines:
        notes.append("there are no metrics yet")
    played_at, played_step = _ends(result, folder / "result.json")
    newest = metrics.last("iteration")
    if played_at is not None and newest is not None and newest > played_at:
        notes.append(
            f"the evaluation of result.json is of iteration {played_at:.0f}; the run has gone on to {newest:.0f} since"
        )
    status = FINISHED if is_own else _status(folder, played_at, newest)
    return Run(
        name=name,
        folder=folder,
        status=status,
        config_text=text,
        config=config,
        result=result if isinstance(result, dict) else None,
        evals=() if result is None else _evals(result, folder / "result.json"),
        evals_step=played_step,
        metrics=metrics,
        timing=timing,
        policies=_policies(folder),
        notes=tuple(notes),
        steps=metrics.column("charts/agent_step"),
    )


def unique_names(found: Sequence[Found]) -> list[tuple[str, Path]]:
    """All runs, each once, by names that differ: where two are alike, the paths as the user gave them."""
    if len(found) == 1 and found[0].is_sweep and len(found[0].runs) > 1:
        return [(f"job {folder.name}", folder) for _, folder in found[0].runs]
    runs: dict[Path, tuple[str, Path]] = {}
    for one in found:
        for name, folder in one.runs:
            runs.setdefault(folder.resolve(), (name, folder))
    names = [name for name, _ in runs.values()]
    return [(name if names.count(name) == 1 else str(folder), folder) for name, folder in runs.values()]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _status(folder: Path, reached: float | None, newest: float | None) -> str:
    if is_locked(folder):
        return GOING
    return FINISHED if reached is not None and (newest is None or reached >= newest) else STOPPED


def _ends(result: Any, path: Path) -> tuple[float | None, float | None]:
    """The iteration and the learner steps that result.json is of; None where it does not say."""
    if not isinstance(result, dict):
        return None, None
    try:
        reached, steps = (
            None if result.get(key) is None else _number(result[key]) for key in ("iterations", "agent_step")
        )
    except ValueError as error:
        raise _no_result(path, error) from error
    return reached, steps


def _read_config(path: Path) -> tuple[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        config: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except FileNotFoundError:
        return "", {}
    except OSError as error:
        raise file_error(error, path, "read") from error
    except (ValueError, AssertionError, yaml.YAMLError, OmegaConfBaseException) as error:
        why = (str(error) or "no mapping").splitlines()[0]
        raise RunError(f"{path} is no config of a run ({why}); restore it") from error
    return text, config if isinstance(config, dict) else {}


def _evals(result: Any, path: Path) -> tuple[Match, ...]:
    try:
        return tuple(
            Match(
                opponent=str(one["opponent"]),
                win_rate=_number(one["win_rate"]),
                low=_number(one["low"]),
                high=_number(one["high"]),
                episodes=_number(one["episodes"]),
            )
            for one in result["evals"]
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _no_result(path, error) from error


def _no_result(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} is not as a run writes it ({type(error).__name__}: {error}); remove it, and run the same command "
        "again to have it written anew"
    )


def _policies(folder: Path) -> tuple[LockEntry, ...]:
    path = folder / "npc.lock.json"
    if not path.is_file():
        return ()
    try:
        return read_lock(path)
    except NpcError as error:
        raise RunError(str(error)) from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!a} is no number")
    return float(value)
