"""A sweep's own files, here and in the mirror of `trainer.sync_uri`, so that the sweep goes on on another machine.

The mirror has them under the sweep's name, beside those of its jobs (`run/mirror.py`):

    npc.lock.json, curriculum.json   pins and decisions; jobs and lock are sent first, since the state refers to them
    mirror/owner.json                which process may write them (`mirror/lease.py`)
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dual_policy_plugin.config import Config
from dual_policy_plugin.curriculum.request import LOCK_KEY, SweepRequest, check_same
from dual_policy_plugin.curriculum.state import STATE_NAME, SweepState, parse_state, read_state, write_state
from dual_policy_plugin.errors import RunError, StorageError
from dual_policy_plugin.files import file_error, publish
from dual_policy_plugin.hydra_app.overrides import text_override
from dual_policy_plugin.mirror.lease import Lease
from dual_policy_plugin.mirror.listing import STATE_NAME as RUN_STATE_NAME
from dual_policy_plugin.mirror.places import Place
from dual_policy_plugin.mirror.transfer import RESULT_NAME, saved_iteration
from dual_policy_plugin.policies.npcs import LOCK_NAME
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run.lock import check_unlocked, is_locked
from dual_policy_plugin.run.mirror import RunMirror, check_apart, open_place
from dual_policy_plugin.waiting import waiting

_NAMES = (LOCK_NAME, STATE_NAME)
_LAST_TRIES = 3
"""At the end of a sweep, each with the attempts of every request."""
log = logging.getLogger(__name__)


class SweepFiles:
    """Writes the sweep's state, and sends it where the sweep has a mirror.

    A context manager: leaving it gives the mirror back. Used by the main thread only.
    """

    def __init__(self, folder: Path, config: Config, mirror: tuple[Place, Lease] | None = None) -> None:
        """Takes over a held lease; users call `open`."""
        self._folder, self._config, self._mirror = folder, config, mirror
        self._sent: dict[str, bytes] = {}
        self._whole_jobs: set[int] = set()

    @classmethod
    def open(cls, request: SweepRequest, config: Config) -> Self:
        """Takes the mirror of the sweep, and brings its folder up to what that has; without `sync_uri` does nothing.

        Args:
            request: the sweep.
            config: of one of its jobs.

        Raises:
            RunError: another process has the sweep, the storage refuses, or what stands there is damaged or is that of
                another sweep or folder.
            StorageError: it cannot be reached.
        """
        sync_uri, run = config.trainer.sync_uri, config.run
        if sync_uri is None:
            return cls(request.folder, config)
        place = open_place(sync_uri, run)
        check_apart(place, request.folder)
        check_unlocked(request.folder)
        lease = Lease(place)
        with waiting(f"waiting for {place.where}"):
            lease.take()
        files = cls(request.folder, config, (place, lease))
        try:
            place.clean_up()
            _restore_files(place, request)
            _restore_jobs(request.folder, config)
        except BaseException:
            lease.release()
            raise
        return files

    def write(self, state: SweepState) -> None:
        """Publishes the state and sends it; where the storage cannot be reached, it goes with the next one.

        Raises:
            RunError: it cannot be written, the storage refuses it, or another machine has taken the sweep over.
        """
        write_state(self._folder, state)
        try:
            self._send(state)
        except StorageError as error:
            log.warning("%s; it will be tried again with the sweep's next state", error)

    def finish(self, state: SweepState) -> None:
        """Sends what has not arrived.

        Raises:
            StorageError: the storage cannot be reached.
            RunError: it refuses, or another machine has taken the sweep over.
        """
        for attempt in range(1, _LAST_TRIES + 1):
            try:
                return self._send(state)
            except StorageError as error:
                if attempt == _LAST_TRIES:
                    mend = "the sweep is complete here, and the same command sends what is missing there"
                    raise StorageError(f"{error}; {mend}") from error
                time.sleep(2.0**attempt)

    def _send(self, state: SweepState) -> None:
        if self._mirror is None:
            return
        place, lease = self._mirror
        for job in state.jobs:
            if job.status == "finished" and job.num not in self._whole_jobs:
                self._send_job(job.num)
        for name in _NAMES:
            data = _read(self._folder / name)
            if self._sent.get(name) != data:
                self._sent.pop(name, None)
                place.put(name, data, lease)
                self._sent[name] = data

    def _send_job(self, num: int) -> None:
        """Makes sure that the mirror has a finished job's files, which the job may not have been able to send."""
        folder = self._folder / str(num)
        if is_locked(folder):
            return  # its process still sends them
        if not open_place(str(self._config.trainer.sync_uri), f"{self._config.run}/{num}").has(RESULT_NAME):  # the last
            with _job_mirror(folder, self._config) as mirror:
                mirror.finish()
        self._whole_jobs.add(num)

    def __enter__(self) -> Self:
        """The open files."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives the mirror back."""
        if self._mirror is not None:
            self._mirror[1].release()


def _restore_files(place: Place, request: SweepRequest) -> None:
    """Takes state and lock from the mirror where that is further than the folder."""
    there, lock = place.get(STATE_NAME), place.get(LOCK_NAME)
    if there is None:
        return
    where = f"{place.where}{STATE_NAME}"
    mirrored, own = parse_state(_parse(there.data, where), where), read_state(request.folder)
    if lock is None:
        raise RunError(f"{place.where}{LOCK_NAME} is missing beside {STATE_NAME}; use another run= name")
    _check_same_folder(mirrored, where, request)
    check_same(request, mirrored, where)
    if own is not None:
        _check_same_sweep(mirrored, own, where, request.folder)
        if _progress(own) >= _progress(mirrored):
            return
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, request.folder, "created") from error
    publish(request.folder / LOCK_NAME, lock.data)
    publish(request.folder / STATE_NAME, there.data)
    log.info("%s continues from its mirror %s", request.folder, place.where)


def _restore_jobs(folder: Path, config: Config) -> None:
    """Brings back the finished jobs that are not here: later ones start from their policies, the report shows them."""
    state = read_state(folder)
    for job in state.jobs if state is not None else ():
        if job.status == "finished" and not _is_whole(folder / str(job.checkpoint)):
            path = folder / str(job.num)
            with _job_mirror(path, config):
                text = _read(path / "config.yaml").decode()
                RunDirectory.open(path, config_yaml=text).close()  # makes `latest` and `best`, which are not mirrored


def _is_whole(checkpoint: Path) -> bool:
    """Whether the files of a finished job are here: its state, which comes last, is that of its last checkpoint."""
    iteration = saved_iteration(checkpoint.parents[1] / RUN_STATE_NAME)
    return checkpoint.is_file() and checkpoint.name == f"model_{iteration:04d}.safetensors"


def _job_mirror(folder: Path, config: Config) -> RunMirror:
    """Takes the mirror of the job at `folder`, and brings the folder up to what it has."""
    trainer = config.trainer
    return RunMirror.open(str(trainer.sync_uri), f"{config.run}/{folder.name}", folder, grace_s=trainer.grace_s)


def _progress(state: SweepState) -> tuple[int, ...]:
    """Grows with every state that a sweep writes as it goes on."""
    num_rated = sum(rung.rating is not None for rung in state.rungs)
    return len(state.gates), len(state.jobs), sum(job.status == "finished" for job in state.jobs), num_rated


def _check_same_sweep(mirrored: SweepState, own: SweepState, where: str, folder: Path) -> None:
    """Raises a RunError unless one of the two states came out of the other."""
    for one, other in zip(_history(mirrored), _history(own), strict=True):
        if any(here != there for here, there in zip(one, other, strict=False)):
            raise RunError(
                f"{where} and {folder / STATE_NAME} are of two sweeps; use another run= name, "
                "or remove the one that is not wanted"
            )


def _history(state: SweepState) -> tuple[list[Any], ...]:
    """What a sweep never changes again: its jobs, and the games of its gates."""
    gates = [(gate.stage, gate.attempt, gate.job, gate.win_rate, gate.episodes) for gate in state.gates]
    return [job.overrides for job in state.jobs], gates


def _check_same_folder(state: SweepState, where: str, request: SweepRequest) -> None:
    """Raises a RunError where the jobs name files of the sweep by another folder."""
    words = state.jobs[0].overrides if state.jobs else []
    said = next((word for word in words if word.startswith(f"{LOCK_KEY}=")), None)
    if said is not None and said != text_override(LOCK_KEY, str(request.lock)):
        raise RunError(
            f"{where} is of a sweep whose jobs name {said.partition('=')[2]}, here it would be {request.lock}; "
            "run the command in a folder of the same path, or use another run= name"
        )


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise RunError(f"{where} holds no JSON ({error}); use another run= name") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(error, path, "read") from error
