"""The directory of one run (D10) and its one owner: lock, config, checkpoints, metrics, state, result.

`train.py` opens it before anything is built and holds it to the end. Layout:

    config.yaml  run.lock  metrics.jsonl  timing.jsonl  result.json
    checkpoints/model_<epoch:04d>.safetensors  checkpoints/{latest,best}.safetensors
    state/       what a continued run needs; state/checkpoints.json is this module's own

A checkpoint exists once its numbered file does. `latest` and `best` are whole copies of numbered files (object-store
mounts have no links), written after it; a crash between the two is mended at the next `open`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from omegaconf import OmegaConf

from dual_policy_plugin import files
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.run.config_diff import add_to_config, diff_configs, show_diff
from dual_policy_plugin.run.lock import lock_run, unlock_run
from dual_policy_plugin.run.mirror import RunMirror

MAY_CHANGE = (
    "run",
    "train_dir",
    "trainer.total_timesteps",
    "trainer.checkpoint_interval",
    "trainer.state_interval_s",
    "trainer.keep_checkpoints",
    "trainer.evaluate_interval",
    "trainer.grace_s",
    "trainer.num_workers",
    "trainer.publish_uri",
    "trainer.sync_uri",
    "evals",
    "evals.*",
    "wandb",
    "wandb.*",
    "tensorboard",
    "report",
    "hourly_cost",
)
"""Keys that a continued run may have otherwise than it had before: its length, its logging, where it stands."""

LOCK_KEY = "trainer.dual_policy.lock"
"""Where config.yaml records the pinned NPCs; a run's own record is no difference to the config of now."""

_CHECKPOINT = re.compile(r"model_(\d{4,})\.safetensors")
_logger = logging.getLogger(__name__)


class RunDirectory:
    """The open directory of a run; no other process can open it until `close`.

    Attributes:
        path: the directory.
        is_new: no checkpoint stood in it when it was opened, so the run starts from the beginning.
        mirror: its copy on a storage that outlives the machine; None: it has none.
    """

    def __init__(self, path: Path, *, lock: int, keep_checkpoints: int, mirror: RunMirror | None = None) -> None:
        """Takes over the held `lock` (a file descriptor); users call `open`."""
        self.path = path
        self.mirror = mirror
        self._lock: int | None = lock
        self._keep_checkpoints = keep_checkpoints
        self._scores: dict[int, float | None] = {}
        self._pinned: dict[str, set[int]] = {}  # by owner
        self._read_index()
        self.is_new = self.newest_checkpoint() is None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        config_yaml: str,
        keep_checkpoints: int = 5,
        may_change: tuple[str, ...] = MAY_CHANGE,
        mirror: RunMirror | None = None,
        now: Callable[[], float] = time.time,
    ) -> Self:
        """Creates or continues the run at `path`, holding its lock.

        A directory without a checkpoint takes any config: nothing was trained under the old one.

        Args:
            path: the directory, train_dir/<run>[/<job>].
            config_yaml: the run's config, as it is to stand in config.yaml.
            keep_checkpoints: how many of the newest checkpoints stay.
            may_change: keys (with * for any rest) that may differ from the config of the run so far.
            mirror: what the directory has been brought up to; whoever opened it closes it.
            now: seconds since 1970, for the note in the lock.

        Raises:
            RunError: another process has the run, another config made it, or the directory cannot be written.
        """
        try:
            for folder in (path, path / "checkpoints", path / "state"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.file_error(error, path, "created") from error
        lock = lock_run(path, now())
        try:
            _clean_up(path)
            run = cls(path, lock=lock, keep_checkpoints=keep_checkpoints, mirror=mirror)
            run._take_config(config_yaml, may_change)
            run._mend_copies()
        except BaseException:
            unlock_run(lock)
            raise
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint_path(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch stands, if there is one."""
        return self.checkpoints / f"model_{epoch:04d}.safetensors"

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """(epoch, file) of the checkpoint with the highest number; None if there is none."""
        epochs = self._epochs()
        return (epochs[-1], self.checkpoint_path(epochs[-1])) if epochs else None

    def best_checkpoint(self) -> tuple[int, float] | None:
        """(epoch, score) of the checkpoint with the highest score, the earliest of equals; None if none has a score."""
        scored = [(score, -epoch) for epoch, score in self._scores.items() if score is not None]
        if not scored:
            return None
        score, negative_epoch = max(scored)
        return -negative_epoch, score

    def save_checkpoint(self, epoch: int, data: bytes, *, score: float | None = None) -> Path:
        """Saves a checkpoint, makes it `latest` (and `best` if it is), removes those that need not stay; returns its
        file.

        Stay: the newest `keep_checkpoints`, epoch 0, the best by score, the pinned. Only finite weights are saved, so
        the newest is the last healthy one. The metrics up to now are brought to the disk first, so that a crash of
        the machine never leaves a checkpoint whose metrics are lost.

        Args:
            epoch: the iteration after which it was made; saving an epoch again replaces it.
            data: a policy file.
            score: the configured metric, larger is better; None or not finite: never `best` by this one.
        """
        self.sync_lines()
        path = self.checkpoint_path(epoch)
        is_scored = score is not None and math.isfinite(score)
        self._scores[epoch] = score if is_scored else None
        self._write_index()  # before the file: an entry without a file is dropped at the next open
        files.publish(path, data)
        files.publish(self.checkpoints / "latest.safetensors", data)
        best = self.best_checkpoint()
        if best is not None and best[0] == epoch:
            files.publish(self.checkpoints / "best.safetensors", data)
        self._apply_retention(epoch)
        return path

    def pin(self, owner: str, epochs: Iterable[int]) -> None:
        """Keeps the checkpoints of `epochs` whatever retention says, also after a restart; those that the owner pinned
        before and does not name now are given back to retention, which acts at the next save.

        Args:
            owner: who uses them: pool, publisher.
            epochs: of the checkpoints.
        """
        wanted = set(epochs)
        if wanted != self.pinned(owner):
            self._pinned[owner] = wanted
            self._write_index()

    def pinned(self, owner: str) -> set[int]:
        """The epochs that an owner has pinned."""
        return self._pinned.get(owner, set())

    def save_state(self, name: str, data: bytes) -> None:
        """Publishes state/<name>."""
        files.publish(self._state_path(name), data)

    def load_state(self, name: str) -> bytes | None:
        """The bytes of state/<name>; None if there is none."""
        path = self._state_path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise files.file_error(error, path, "read") from error

    def config(self) -> dict[str, Any]:
        """The run's config as config.yaml has it: plain values, and the text of what comes from the environment."""
        config: Any = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"), resolve=False)
        return dict(config)

    def record_lock(self, lock: Mapping[str, Any]) -> None:
        """Records the pinned NPCs in config.yaml, where a run of this config takes them from (`npc/lock.py`)."""
        path = self.path / "config.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise files.file_error(error, path, "read") from error
        recorded = add_to_config(text, LOCK_KEY, lock)
        if recorded != text:
            files.publish(path, recorded.encode())

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; it must have "iteration" and nothing that depends on the clock."""
        assert "iteration" in record, "a metrics line says which iteration it belongs to"
        files.append_line(self.path / "metrics.jsonl", record)

    def sync_lines(self) -> None:
        """Brings metrics and timing up to now to the disk; to be called before what is never to stand without them."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            files.sync_file(self.path / name)

    def append_timing(self, record: Mapping[str, Any]) -> None:
        """Adds a line to timing.jsonl: rates, times, costs. Never cut back: redone work took its time too."""
        files.append_line(self.path / "timing.jsonl", record)

    def truncate_metrics(self, iteration: int) -> int:
        """Drops the lines at the end of metrics.jsonl that are of an iteration after `iteration`; returns how many."""
        path = self.path / "metrics.jsonl"
        num_cut, kept_bytes = 0, 0
        for end, line in files.lines_backwards(path):
            if _iteration(line, end, path) <= iteration:
                kept_bytes = end
                break
            num_cut += 1
        if num_cut:
            files.keep_first(path, kept_bytes)
        return num_cut

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Publishes result.json."""
        files.publish_json(self.path / "result.json", result)

    def close(self) -> None:
        """Gives the run free for other processes; may be called twice."""
        if self._lock is not None:
            unlock_run(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """The open run."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the run."""
        self.close()

    def _state_path(self, name: str) -> Path:
        assert Path(name).name == name, f"{name!r} is no plain file name"
        return self.path / "state" / name

    def _epochs(self) -> list[int]:
        """Epochs of all checkpoints that exist, ascending."""
        matches = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _read_index(self) -> None:
        """Reads scores and pins, without those of checkpoints that do not exist."""
        index = files.read_json(self.path / "state" / "checkpoints.json") or {"scores": {}, "pinned": {}}
        scores = {int(epoch): score for epoch, score in index["scores"].items()}
        self._scores = {epoch: scores.get(epoch) for epoch in self._epochs()}
        self._pinned = {owner: set(epochs) for owner, epochs in index["pinned"].items()}

    def _write_index(self) -> None:
        scores = {str(epoch): self._scores[epoch] for epoch in sorted(self._scores)}
        pinned = {owner: sorted(epochs) for owner, epochs in sorted(self._pinned.items()) if epochs}
        files.publish_json(self.path / "state" / "checkpoints.json", {"scores": scores, "pinned": pinned})

    def _apply_retention(self, saved: int) -> None:
        """`saved` stays, though a run that was killed may have left newer ones, which it has yet to make again."""
        epochs = self._epochs()
        best = self.best_checkpoint()
        kept = {0, saved, *epochs[-self._keep_checkpoints :], *([best[0]] if best else [])}
        kept = kept.union(*self._pinned.values())
        for epoch in epochs:
            if epoch not in kept:
                path = self.checkpoint_path(epoch)
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise files.file_error(error, path, "removed") from error
                self._scores.pop(epoch, None)

    def _mend_copies(self) -> None:
        """Makes `latest` and `best` again where a crash kept them from following the numbered files."""
        newest, best = self.newest_checkpoint(), self.best_checkpoint()
        for name, epoch in (("latest", newest and newest[0]), ("best", best and best[0])):
            if epoch is None:
                continue
            path, copy = self.checkpoint_path(epoch), self.checkpoints / f"{name}.safetensors"
            try:
                data = path.read_bytes()
                is_equal = copy.exists() and copy.stat().st_size == len(data) and copy.read_bytes() == data
            except OSError as error:
                raise files.file_error(error, path, "read") from error
            if not is_equal:
                files.publish(copy, data)

    def _take_config(self, config_yaml: str, may_change: tuple[str, ...]) -> None:
        """Stores the config, or refuses it if the run so far was made by another."""
        path = self.path / "config.yaml"
        try:
            stored = path.read_text(encoding="utf-8") if path.exists() else None
        except OSError as error:
            raise files.file_error(error, path, "read") from error
        if stored == config_yaml:
            return
        if not self.is_new:
            if stored is None:
                raise RunError(f"{self.path} has checkpoints but no config.yaml; use another run= name")
            changes = diff_configs(stored, config_yaml, path)
            changes = {key: one for key, one in changes.items() if not f"{key}.".startswith(f"{LOCK_KEY}.")}
            if not changes:
                return  # it says the same, and has the record of the NPCs besides
            refused = {
                key: change
                for key, change in changes.items()
                if not any(fnmatchcase(key, pattern) for pattern in may_change)
            }
            if refused:
                raise RunError(
                    f"{self.path} was made by another config: {show_diff(refused)}; "
                    f"use another run= name, or the old values to continue it"
                )
            _logger.info("%s continues with another config: %s", self.path, show_diff(changes))
        files.publish(path, config_yaml.encode())


def _iteration(line: bytes, end: int, path: Path) -> int:
    """Of a line that ends at byte `end` of the file."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        number = path.read_bytes()[:end].count(b"\n")
        raise RunError(f"{path} line {number} has no iteration; restore the file, or use another run= name") from error


def _clean_up(path: Path) -> None:
    """Removes what a crash of an earlier process left: temporary files and torn last lines."""
    try:
        for folder in (path, path / "checkpoints", path / "state"):
            files.remove_temporary_files(folder)
    except OSError as error:
        raise files.file_error(error, path, "cleaned") from error
    for name in ("metrics.jsonl", "timing.jsonl"):
        files.cut_torn_tail(path / name)
