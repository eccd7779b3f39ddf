"""What a curriculum sweep remembers: `curriculum.json` in its folder, whole at every moment.

`stages.py` writes it after every change; `dual-policy curriculum status` reads it. Stages, attempts and rungs count
from 1, jobs from 0. Paths are relative to the sweep's folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dual_policy_plugin.errors import DualPolicyError, RunError
from dual_policy_plugin.files import publish_json, read_json
from dual_policy_plugin.hydra_app.nodes import build

STATE_NAME = "curriculum.json"
STATE_VERSION = 1
T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class Rung:
    """One stage's NPC, pinned."""

    name: str
    requested: str
    """As the user wrote it; with a selector, see `npc.resolver.request_text`."""
    uri: str
    sha256: str
    rating: float | None = None
    """Elo; None: not measured."""
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True, slots=True)
class Job:
    """One training run of the sweep; its number is its folder's name."""

    num: int
    stage: int
    attempt: int
    overrides: list[str]
    status: str = "planned"
    """planned | finished | failed."""
    objective: float | None = None
    checkpoint: str | None = None
    """The last one's file."""
    sha256: str | None = None
    agent_step: int | None = None
    elapsed_s: float | None = None


@dataclass(kw_only=True, slots=True)
class EarlierRung:
    """A promoted policy's record against an earlier stage's NPC."""

    opponent: str
    win_rate: float
    low: float
    high: float
    episodes: int
    ok: bool
    """The win rate is at least 0.5 - forget_tolerance."""


@dataclass(kw_only=True, slots=True)
class Gate:
    """An evaluation of a stage's best policy, and what was decided by it."""

    stage: int
    attempt: int
    job: int
    opponent: str
    rule: str
    promote_at: float
    win_rate: float
    low: float
    high: float
    episodes: int
    passed: bool
    """By its win rate against the stage's NPC."""
    forgotten: list[EarlierRung]
    """Records against earlier NPCs; empty where there are none, or it did not pass anyway."""
    decision: str
    """promote | repeat | stop | advance | demote."""
    why: str
    """One sentence with its figures."""


@dataclass(kw_only=True, slots=True)
class ChosenPolicy:
    """What the sweep has come to so far."""

    path: str
    sha256: str
    job: int
    stage: int


@dataclass(kw_only=True, slots=True)
class SweepState:
    """The whole file but for its version."""

    request: dict[str, Any]
    """sweeper, overrides, config: what the sweep was asked for; a sweep that goes on must be asked for the same."""
    rungs: list[Rung] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    stage: int = 1
    attempt: int = 1
    """Counts on when a stage is visited again, so that no two attempts at it are the same."""
    demotions: int = 0
    status: str = "running"
    """running | finished | stopped."""
    policy: ChosenPolicy | None = None

    def of_stage(self, stage: int) -> list[Job]:
        """The jobs of all attempts at a stage."""
        return [job for job in self.jobs if job.stage == stage]

    def best_job(self, stage: int, since: int = 1) -> Job | None:
        """The finished job of a stage with the highest objective, from attempt `since` on; None: none finished.

        Of equals it is one of the newest attempt, which has learned longer where policies are carried on, and there the
        one with the lowest number.
        """
        done = [job for job in self.of_stage(stage) if job.status == "finished" and job.attempt >= since]
        return max(done, key=lambda job: (_objective(job), job.attempt, -job.num), default=None)


def write_state(folder: Path, state: SweepState) -> None:
    """Publishes the state of the sweep at `folder`."""
    publish_json(folder / STATE_NAME, {"version": STATE_VERSION, **asdict(state)})


def read_state(folder: Path) -> SweepState | None:
    """The state of the sweep at `folder`; None if it has none.

    Raises:
        RunError: the file cannot be read, or is not as `write_state` writes it.
    """
    value = read_json(folder / STATE_NAME)
    return None if value is None else parse_state(value, str(folder / STATE_NAME))


def parse_state(value: Any, where: str) -> SweepState:
    """The state that the JSON of `where` says.

    Raises:
        RunError: it is not as `write_state` writes it.
    """
    mend = "restore it, or use another run= name"
    if not isinstance(value, dict) or value.get("version") != STATE_VERSION:
        raise RunError(f"{where} is no state of version {STATE_VERSION}, which this package reads; {mend}")
    try:
        gates = [_read(Gate, {**one, "forgotten": _read_all(EarlierRung, one["forgotten"])}) for one in value["gates"]]
        policy = value["policy"]
        return _read(
            SweepState,
            {name: one for name, one in value.items() if name != "version"}
            | {"rungs": _read_all(Rung, value["rungs"]), "jobs": _read_all(Job, value["jobs"]), "gates": gates}
            | {"policy": None if policy is None else _read(ChosenPolicy, policy)},
        )
    except (KeyError, TypeError, AttributeError, DualPolicyError) as error:
        raise RunError(f"{where} is not as a curriculum sweep writes it ({error}); {mend}") from error


def _read_all(cls: type[T], values: list[dict[str, Any]]) -> list[T]:
    return [_read(cls, one) for one in values]


def _read(cls: type[T], value: dict[str, Any]) -> T:
    """`value` as a dataclass; its scalars are checked, its lists of dataclasses are ready."""
    ready = {name: one for name, one in value.items() if isinstance(one, list | dict) or is_dataclass(one)}
    missing = [name for name in get_type_hints(cls) if name not in value]
    if missing:
        raise TypeError(f"{cls.__name__} has no {missing[0]}")
    return build(cls, {name: one for name, one in value.items() if name not in ready}, "", **ready)


def _objective(job: Job) -> float:
    return float("-inf") if job.objective is None else job.objective
