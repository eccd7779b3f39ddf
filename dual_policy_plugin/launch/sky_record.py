"""What a sweep on SkyPilot remembers of its jobs: `skypilot_jobs.json` in its folder, and how jobs are named.

`sky_jobs` publishes it before and after every launch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.files import publish_json, read_json

RECORD_NAME = "skypilot_jobs.json"
RECORD_VERSION = 1
GONE = "GONE"
"""Beside SkyPilot's statuses: the queue does not know the job."""


@dataclass(kw_only=True, slots=True)
class Entry:
    """What the record knows of a job."""

    name: str
    """In SkyPilot's queue."""
    digest: str
    """Of the job's words."""
    attempt: int
    """From 1; a job that failed, and was said to have, is launched again under another name."""
    job: int | None = None
    """SkyPilot's id; None: about to be launched."""
    status: str | None = None
    """In which it ended; None: not yet, as far as this sweep has seen."""
    before: str | None = None
    """Digest of the result that stood in its storage before it was launched, which is not its own; None: none did."""


@dataclass(kw_only=True, slots=True)
class Record:
    """The file that a sweep finds its jobs by."""

    path: Path
    cluster: str | None
    """Whose queue the ids are of; None: the managed jobs'."""
    entries: dict[int, Entry] = field(default_factory=dict)
    """By the job's number."""

    def publish(self) -> None:
        """Writes the file."""
        jobs = {str(num): asdict(entry) for num, entry in sorted(self.entries.items())}
        publish_json(self.path, {"version": RECORD_VERSION, "cluster": self.cluster, "jobs": jobs})


def read_record(folder: Path, cluster: str | None) -> Record:
    """The record of the sweep in `folder`, a new one where there is none.

    Raises:
        RunError: it cannot be read, or is of jobs in another queue.
    """
    record = Record(path=folder / RECORD_NAME, cluster=cluster)
    stored = read_json(record.path)
    if stored is None:
        return record
    try:
        if stored["version"] != RECORD_VERSION:
            raise RunError(f"{record.path}: its version is not {RECORD_VERSION}, which this package reads")
        record.entries = {int(num): Entry(**entry) for num, entry in stored["jobs"].items()}
        before = stored["cluster"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{record.path} is not as a sweep writes it ({error}); restore it, or use another run="
        ) from error
    if before != cluster and any(entry.status is None for entry in record.entries.values()):
        where = "managed jobs" if before is None else f"jobs on the cluster {before}"
        raise RunError(
            f"{record.path} knows of {where} that have not ended; go on with the same hydra.launcher.mode and cluster, "
            "or use another run="
        )
    return record


def job_name(run: str, digest: str, attempt: int) -> str:
    """A name that SkyPilot takes, another for every run, command line and attempt."""
    readable = re.sub(r"[^a-z0-9]+", "-", run.lower())[-24:].strip("-")
    return "-".join(part for part in ("dp", readable, digest[:10], str(attempt)) if part)


def digest_words(run: str, words: Sequence[str]) -> str:
    """Names what a job does."""
    return hashlib.sha256(json.dumps([run, *words]).encode()).hexdigest()
