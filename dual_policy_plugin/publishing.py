"""Sends a run's checkpoints away: to W&B as artifacts, to S3 as objects. Stands between the run directory and RunLog.

Each destination gets the checkpoints oldest first, in a thread of its own, so that training does not wait for a
network. What has arrived stands in state/published.json; a continued run sends what is missing. A checkpoint that has
not arrived is pinned, so that retention leaves it. What cannot be sent is said at once and tried again with the next
checkpoint; if it still fails at the end, the run ends with an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import DigestError, NpcError, RunError
from dual_policy_plugin.mirror.places import MAX_PUT_BYTES
from dual_policy_plugin.mirror.transfer import saved_iteration
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.header import read_description
from dual_policy_plugin.npc.sources import s3_client, s3_objects
from dual_policy_plugin.npc.sources.http import with_retries
from dual_policy_plugin.npc.uri import parse_uri, s3_name
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run_state import STATE_NAME
from dual_policy_plugin.waiting import waiting

_STATE_NAME = "published.json"
_OWNER = "publisher"
"""Of the pins of what has not arrived."""
_CHECKPOINT = re.compile(r"model_(\d{4,})\.safetensors")
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpoint:
    """One to be sent."""

    epoch: int
    path: Path
    is_best: bool
    """Whether it had the best score when it was handed over."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Destination:
    """Where checkpoints go."""

    name: str
    """In messages and in published.json: the URI without the part that tells checkpoints apart."""
    send: Callable[[Checkpoint], str]
    """Brings one there and gives its URI; RunError where that fails. Called from another thread."""


@dataclass(kw_only=True, slots=True)
class _Lane:
    """A destination with what it has and what is under way to it."""

    destination: Destination
    arrived: dict[int, str]
    thread: ThreadPoolExecutor
    under_way: Future[tuple[dict[int, str], RunError | None]] | None = None
    error: RunError | None = None


@dataclass(kw_only=True, slots=True)
class Publisher:
    """Sends the checkpoints of one run; every method is for the main thread."""

    run: RunDirectory
    lanes: list[_Lane] = field(default_factory=list)

    @classmethod
    def open(cls, run: RunDirectory, destinations: list[Destination]) -> Publisher:
        """Takes up what earlier processes of the run left, and sends what is missing before it returns.

        Raises:
            RunError: a checkpoint could not be sent; so nothing is trained that nobody would get.
        """
        stored = run.load_state(_STATE_NAME)
        state = {"arrived": {}} if stored is None else json.loads(stored)
        publisher = cls(run=run)
        for destination in destinations:
            arrived = {int(epoch): uri for epoch, uri in state["arrived"].get(destination.name, {}).items()}
            thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
            publisher.lanes.append(_Lane(destination=destination, arrived=arrived, thread=thread))
        try:
            with waiting("publishing what an earlier start left"):
                publisher.advance(run_epoch(run))
                publisher.wait()
        except BaseException:
            publisher.close()
            raise
        return publisher

    def advance(self, newest: int) -> None:
        """Notes what has arrived, and sends the checkpoints up to epoch `newest` that have not."""
        due = self._due(newest)
        for lane in self.lanes:
            if lane.under_way is not None and not lane.under_way.done():
                continue  # what is new goes with the next call
            self._note(lane)
            if batch := [checkpoint for checkpoint in due if checkpoint.epoch not in lane.arrived]:
                lane.under_way = lane.thread.submit(_send_all, lane.destination, batch)
        wanted = {c.epoch for c in due if any(c.epoch not in lane.arrived for lane in self.lanes)}
        self.run.pin(_OWNER, wanted)

    def wait(self) -> None:
        """Waits for what is under way.

        Raises:
            RunError: some of it did not arrive.
        """
        for lane in self.lanes:
            if lane.under_way is not None:
                lane.under_way.exception()
                self._note(lane)
        newest = run_epoch(self.run)
        missing = {c.epoch for c in self._due(newest) if any(c.epoch not in lane.arrived for lane in self.lanes)}
        self.run.pin(_OWNER, missing)
        errors = [lane.error for lane in self.lanes if lane.error is not None]
        if errors:
            raise RunError(f"{errors[0]}; the same command goes on and sends what is missing") from errors[0]

    def finish(self) -> None:
        """Sends all that is left, once more what failed, and waits for it.

        Raises:
            RunError: some of it could not be sent; it stands in the run directory.
        """
        newest = run_epoch(self.run)
        with waiting("publishing the last checkpoints"):
            for lane in self.lanes:
                if lane.under_way is not None:
                    lane.under_way.exception()  # waits
            self.advance(newest)
            self.wait()

    def close(self) -> None:
        """Ends the threads; what is being sent at this moment still arrives."""
        for lane in self.lanes:
            lane.thread.shutdown(wait=True, cancel_futures=True)

    def _due(self, newest: int) -> list[Checkpoint]:
        """The checkpoints on the disk up to epoch `newest`, oldest first."""
        best = self.run.best_checkpoint()
        matches = (_CHECKPOINT.fullmatch(path.name) for path in self.run.checkpoints.iterdir())
        epochs = sorted(epoch for match in matches if match and (epoch := int(match[1])) <= newest)
        return [
            Checkpoint(
                epoch=epoch,
                path=self.run.checkpoint_path(epoch),
                is_best=best is not None and best[0] == epoch,
            )
            for epoch in epochs
        ]

    def _note(self, lane: _Lane) -> None:
        """Takes over the result of what was under way."""
        if lane.under_way is None:
            return
        arrived, lane.error = lane.under_way.result()
        lane.under_way = None
        lane.arrived |= arrived
        for uri in arrived.values():
            _logger.info("published %s", uri)
        if lane.error is not None:
            _logger.warning("%s; it will be tried again", lane.error)
        if arrived:
            self._store()

    def _store(self) -> None:
        stored = self.run.load_state(_STATE_NAME)
        arrived: dict[str, Any] = {} if stored is None else json.loads(stored)["arrived"]
        here = [checkpoint.epoch for checkpoint in self._due(sys.maxsize)]  # the rest can never be sent again
        arrived |= {
            lane.destination.name: {str(epoch): lane.arrived[epoch] for epoch in here if epoch in lane.arrived}
            for lane in self.lanes
        }
        self.run.save_state(_STATE_NAME, json.dumps({"arrived": arrived}, indent=1).encode())


def _send_all(destination: Destination, batch: list[Checkpoint]) -> tuple[dict[int, str], RunError | None]:
    """Sends in order up to the first failure, so that the newest version there is always the newest checkpoint."""
    arrived: dict[int, str] = {}
    for checkpoint in batch:
        try:
            arrived[checkpoint.epoch] = destination.send(checkpoint)
        except RunError as error:
            return arrived, error
    return arrived, None


def run_epoch(run: RunDirectory) -> int:
    """The epoch that the run continues from; a checkpoint after it is made again, maybe with other bytes. -1: none."""
    return saved_iteration(run.path / "state" / STATE_NAME)


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: plain names (epoch, step, architecture, ..., sha256), and `metrics` by name.

    Metrics stand apart because W&B takes a hundred names in all; `flat_metadata` puts them back beside the others.
    """
    data = path.read_bytes()
    flat = read_description(lambda start, stop: data[start:stop], len(data), where=path.name)["flat"]
    facts: dict[str, Any] = {name: value for name, value in flat.items() if "/" not in name}
    metrics = {name: value for name, value in flat.items() if "/" in name}
    return facts | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "metrics": metrics}


def plain_name(run: str) -> str:
    """A run's name as artifacts have it: its letters, digits, _ . - and a - for each other."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", run)[:128]


def s3_destination(publish_uri: str, run: str) -> Destination:
    """A destination under an s3:// prefix: <prefix>/<run>/model_<epoch>.safetensors.

    Args:
        publish_uri: s3://bucket/prefix/ (the last slash may be left out).
        run: the run's name.

    Raises:
        NpcError: it is no such URI.
    """
    name = s3_name(parse_uri(publish_uri if publish_uri.endswith("/") else f"{publish_uri}/"))
    place = f"s3://{name.bucket}/{name.key}" + "".join(f"{plain_name(part)}/" for part in Path(run).parts)

    def send(checkpoint: Checkpoint) -> str:
        uri = place + checkpoint.path.name
        put_new_object(uri, checkpoint.path)
        return uri

    return Destination(name=place, send=send)


def put_new_object(uri: str, path: Path) -> None:
    """Makes an S3 object of a file, on the condition that there is none; the same bytes there already are as good.

    Raises:
        RunError: other bytes stand there, or S3 refuses or cannot be reached.
    """
    name, what = s3_name(parse_uri(uri)), f"{path.name} could not be published to {uri}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{what}: {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_PUT_BYTES:  # only one request can be made on the condition that the key is new
        raise RunError(f"{what}: it has {len(data)} bytes, an object made in one request at most {MAX_PUT_BYTES}")
    digest = hashlib.sha256(data).hexdigest()

    def put() -> None:
        with s3_client.errors(what):
            s3_client.client().put_object(
                Bucket=name.bucket,
                Key=name.key,
                Body=data,
                IfNoneMatch="*",
                Metadata={s3_objects.SHA256_KEY: digest},  # a fetch compares it
            )

    try:
        with_retries(put, what)
    except DigestError:
        # The key is taken: maybe by an earlier attempt of ours whose answer was lost, or by a process that was killed.
        if _bytes_at(uri, what) != data:
            raise RunError(
                f"{what}: another file stands there and is not overwritten; use another run= or trainer.publish_uri="
            ) from None
    except NpcError as error:
        raise RunError(str(error)) from error


def _bytes_at(uri: str, what: str) -> bytes:
    try:
        return s3_objects.fetch(Candidate(name="published", uri=uri))
    except NpcError as error:
        raise RunError(f"{what}: what stands there cannot be read: {error}") from error
