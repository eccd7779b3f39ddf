"""TensorBoard: every figure of a run by agent_step, in event files under <run>/tensorboard/.

Beside W&B an outlet of `RunLog`. The event file is made again from the run directory whenever the run is opened:
metrics.jsonl and timing.jsonl know every step once, whatever a killed process had written, wherever the run goes on,
and whenever `tensorboard` was switched on. So the folder need not travel with a run's mirror.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dual_policy_plugin import files
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.matches import eval_metrics
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.report.tables import format_table
from dual_policy_plugin.run.directory import RunDirectory

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import FileWriter

FOLDER_NAME = "tensorboard"


class TensorBoardLogger:
    """The open event file of a run; does nothing where `tensorboard` is false."""

    def __init__(self, writer: FileWriter | None, run: RunDirectory) -> None:
        """Takes over an open writer; users call `open`."""
        self._writer, self._folder = writer, run.path / FOLDER_NAME

    @classmethod
    def open(cls, run: RunDirectory, pinned: Sequence[PinnedPolicy], *, is_on: bool) -> Self:
        """Begins the event file: the config and the NPCs as text, and what the run has done so far.

        Args:
            run: its metrics are cut back to the iteration after which it goes on.
            pinned: the NPCs.
            is_on: the key `tensorboard`.

        Raises:
            ConfigError: the package tensorboard is not installed.
            RunError: the folder cannot be written.
        """
        if not is_on:
            return cls(None, run)
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from torch.utils.tensorboard.summary import text
            from torch.utils.tensorboard.writer import FileWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard=true needs the package tensorboard; install it with "
                "`pip install 'dual-policy-plugin[tensorboard]'`, or use tensorboard=false"
            ) from error
        folder = run.path / FOLDER_NAME
        try:
            _clear(folder)
            writer = FileWriter(str(folder), max_queue=1000)
            # a TensorBoard that is looking on drops what it has read of the file before
            writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=0)
            config = (run.path / "config.yaml").read_text(encoding="utf-8")
            for name, content in (("config", config), ("npcs", _npc_table(pinned))):
                writer.add_summary(text(name, _as_code(content)), 0)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise files.file_error(error, folder, "written") from error
        logger = cls(writer, run)
        for step, figures, when in _history(run):
            logger._add(figures, step, when)
        logger._flush()
        return logger

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Writes figures at an agent_step; once this returns they are in the file, as metrics.jsonl has its lines.

        Raises:
            RunError: they cannot be written.
        """
        if self._writer is not None:
            self._add(figures, step, None)
            self._flush()

    def close(self) -> None:
        """Ends the event file; may be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, figures: Mapping[str, float], step: int, when: float | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._writer is not None
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        try:
            self._writer.add_summary(Summary(value=values), step, when)
        except OSError as error:
            raise files.file_error(error, self._folder, "written") from error

    def _flush(self) -> None:
        assert self._writer is not None
        try:
            self._writer.flush()
        except OSError as error:
            raise files.file_error(error, self._folder, "written") from error


def _clear(folder: Path) -> None:
    """Empties the event files of earlier processes; a TensorBoard that reads one stays with it while it is there, so
    that it goes only when the next process comes.
    """
    for path in folder.glob("events.out.tfevents.*"):
        if path.stat().st_size:
            os.truncate(path, 0)
        else:
            path.unlink()


def _history(run: RunDirectory) -> Iterator[tuple[int, dict[str, float], float]]:
    """(agent_step, figures, seconds since 1970) of every iteration so far.

    The times are such that TensorBoard's axis of relative time shows the training time, without the pauses between a
    stop and its continuation.
    """
    timings: dict[int, dict[str, float]] = {}  # of work that was done again, the newest
    elapsed_s = 0.0
    for line in _lines(run, "timing.jsonl"):
        elapsed_s = line["timing/elapsed_s"]
        if "timing/rollout_s" in line:  # else it is of a start or of the end
            timings[line.pop("iteration")] = line
    begin = time.time() - elapsed_s
    result = files.read_json(run.path / "result.json") or {}
    for line in _lines(run, "metrics.jsonl"):
        iteration = line.pop("iteration")
        step, timing = int(line["charts/agent_step"]), timings.get(iteration, {})
        if result.get("iterations") == iteration:
            line |= eval_metrics(result["evals"])  # of the end that the run had before it was made longer
        yield step, line | timing, begin + timing.get("timing/elapsed_s", elapsed_s)


def _lines(run: RunDirectory, name: str) -> Iterator[dict[str, Any]]:
    path = run.path / name
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def _npc_table(pinned: Sequence[PinnedPolicy]) -> str:
    if not pinned:
        return "no NPC"
    return format_table(("Name", "URI", "SHA-256"), [(one.name, one.uri, one.sha256) for one in pinned])


def _as_code(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
