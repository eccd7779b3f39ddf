"""What follows a gate, and where an attempt starts from: pure functions of the sweep's state and settings.

A visit to a stage has up to `max_attempts` attempts. A stage that the sweep was sent back to begins a new visit, whose
attempts count anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.curriculum.state import ChosenPolicy, EarlierRung, Gate, Job, SweepState
from dual_policy_plugin.evaluation.sequential import GateVerdict


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """Where a sweep stands after a decision."""

    stage: int
    attempt: int
    demotions: int
    status: str
    """running | finished | stopped."""


def num_tries(gates: Sequence[Gate], stage: int) -> int:
    """Which try of this visit the next gate of `stage` is: one more than the repeats at the end of `gates`."""
    tries = 1
    for gate in reversed(gates):
        if gate.stage != stage or gate.decision != "repeat":
            break
        tries += 1
    return tries


def decide(
    verdict: GateVerdict, forgotten: Sequence[EarlierRung], state: SweepState, settings: CurriculumConfig
) -> tuple[str, str]:
    """(promote | repeat | stop | advance | demote, one sentence that says why with its figures)."""
    lost = [one for one in forgotten if not one.ok]
    figures = _figures(verdict, lost, settings)
    if verdict.passed and not lost:
        return "promote", figures
    tries = num_tries(state.gates, state.stage)
    if tries < settings.max_attempts:
        return "repeat", f"{figures}; attempt {tries} of {settings.max_attempts}"
    figures += f"; {tries} of {settings.max_attempts} attempts"
    if settings.on_fail != "demote":
        return settings.on_fail, f"{figures}, on_fail={settings.on_fail}"
    if state.stage == 1:
        return "stop", f"{figures}, and there is no stage before the first to go back to"
    if state.demotions >= settings.max_demotions:
        return "stop", f"{figures}, and max_demotions={settings.max_demotions} is used up"
    return "demote", f"{figures}, demotion {state.demotions + 1} of {settings.max_demotions}"


def next_place(decision: str, state: SweepState, num_stages: int) -> Place:
    """Where the sweep stands after `decision`, the gate that led to it already among `state.gates`."""
    if decision == "stop":
        return Place(stage=state.stage, attempt=state.attempt, demotions=state.demotions, status="stopped")
    stage = state.stage + {"repeat": 0, "promote": 1, "advance": 1, "demote": -1}[decision]
    if stage > num_stages:
        return Place(stage=state.stage, attempt=state.attempt, demotions=state.demotions, status="finished")
    attempt = 1 + max((gate.attempt for gate in state.gates if gate.stage == stage), default=0)
    demotions = state.demotions + (decision == "demote")
    return Place(stage=stage, attempt=attempt, demotions=demotions, status="running")


def starts_from(state: SweepState, settings: CurriculumConfig) -> Job | ChosenPolicy | None:
    """Whose policy the jobs of the attempt to come start from; None: from what the config says.

    The first attempt of a visit starts from the policy that the sweep has come to, a further one from the best of the
    stage so far.
    """
    if settings.carry == "nothing":
        return None
    return state.policy if num_tries(state.gates, state.stage) == 1 else state.best_job(state.stage)


def _figures(verdict: GateVerdict, lost: Sequence[EarlierRung], settings: CurriculumConfig) -> str:
    text = f"win rate {verdict.win_rate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}] over {verdict.episodes} episodes"
    if verdict.rule == "wilson":
        text += f", the lower bound {'exceeds' if verdict.passed else 'does not exceed'}"
        text += f" promote_at={settings.promote_at:g}"
    else:
        found = {True: "is above", False: "is not above", None: "is not shown to be above"}[verdict.passed]
        text += f", which by SPRT {found} promote_at={settings.promote_at:g}"
        text += f" (log likelihood ratio {verdict.statistic:.2f}, bounds {verdict.bounds[0]:.2f}"
        text += f" and {verdict.bounds[1]:.2f})"
    for one in lost:
        least = 0.5 - settings.forget_tolerance
        text += f"; {one.opponent} is forgotten, {one.win_rate:.3f} is below {least:g}"
    return text
