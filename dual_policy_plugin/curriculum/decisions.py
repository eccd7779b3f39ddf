"""What follows a gate, and where an attempt starts from: pure functions of the sweep's state and settings.

A visit to a stage has up to `max_attempts` attempts. A stage that the sweep was sent back to begins a new visit, whose
attempts count anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.curriculum.state import ChosenPolicy, EarlierRung, Gate, Job, SweepState
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.evaluation.sequential import GateVerdict

AFTER_GATE = ("max_attempts", "on_fail", "max_demotions")
"""Settings that say what follows a gate; see `reopen`."""


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


def best_of_visit(state: SweepState) -> Job | None:
    """The best job of the stage that the sweep is at, over the attempts of this visit; None: none has finished.

    Jobs of an earlier visit are left out: the sweep was sent back since their policy led to no passage further on.
    """
    return state.best_job(state.stage, since=state.attempt + 1 - num_tries(state.gates, state.stage))


def follow(*, is_passed: bool, tries: int, stage: int, demotions: int, settings: CurriculumConfig) -> str:
    """Promote | repeat | stop | advance | demote, by the settings alone.

    Args:
        is_passed: the gate was passed, and no earlier NPC is forgotten.
        tries: which try of this visit it was, from 1.
        stage: which.
        demotions: how many there were before.
        settings: of the sweep.
    """
    if is_passed:
        return "promote"
    if tries < settings.max_attempts:
        return "repeat"
    if settings.on_fail == "demote" and (stage == 1 or demotions >= settings.max_demotions):
        return "stop"
    return settings.on_fail


def decide(
    verdict: GateVerdict, forgotten: Sequence[EarlierRung], state: SweepState, settings: CurriculumConfig
) -> tuple[str, str]:
    """(promote | repeat | stop | advance | demote, one sentence that says why with its figures)."""
    lost = [one for one in forgotten if not one.ok]
    tries = num_tries(state.gates, state.stage)
    decision = follow(
        is_passed=bool(verdict.passed) and not lost,
        tries=tries,
        stage=state.stage,
        demotions=state.demotions,
        settings=settings,
    )
    figures = _figures(verdict, lost, settings)
    if decision == "promote":
        return decision, figures
    return decision, f"{figures}; {_reason(decision, tries, state.stage, state.demotions, settings)}"


def reopen(state: SweepState, settings: CurriculumConfig) -> Gate | None:
    """Takes the decision that stopped a sweep anew, where the settings now say something else; gives its gate.

    `max_attempts`, `on_fail` and `max_demotions` say what follows a gate and bear on nothing before it, so a sweep that
    goes on with others is one that had them from the start. That holds as long as all decisions but the one that
    stopped it would have been the same.

    Raises:
        RunError: another decision would not have been the same.
    """
    demotions = 0
    for i, gate in enumerate(state.gates):
        tries = num_tries(state.gates[:i], gate.stage)
        is_passed = gate.passed and all(one.ok for one in gate.forgotten)
        decision = follow(is_passed=is_passed, tries=tries, stage=gate.stage, demotions=demotions, settings=settings)
        if decision != gate.decision:
            reason = _reason(decision, tries, gate.stage, demotions, settings)
            if gate.decision != "stop":
                raise RunError(
                    f"attempt {gate.attempt} at stage {gate.stage} was followed by {gate.decision}, and by these "
                    f"settings it is {decision} ({reason}); use the old values of {', '.join(AFTER_GATE)} to continue "
                    "it, or another run= name"
                )
            gate.decision, gate.why = decision, f"{gate.why}; taken anew: {reason}"
            return gate
        demotions += decision == "demote"
    return None


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
    visit so far.
    """
    if settings.carry == "nothing":
        return None
    return state.policy if num_tries(state.gates, state.stage) == 1 else best_of_visit(state)


def _reason(decision: str, tries: int, stage: int, demotions: int, settings: CurriculumConfig) -> str:
    """Why a gate that was not passed has this decision."""
    if decision == "repeat":
        return f"attempt {tries} of {settings.max_attempts}"
    used = f"{tries} of {settings.max_attempts} attempts"
    if settings.on_fail != "demote":
        return f"{used}, on_fail={settings.on_fail}"
    if stage == 1:
        return f"{used}, and there is no stage before the first to go back to"
    if decision == "stop":
        return f"{used}, and max_demotions={settings.max_demotions} is used up"
    return f"{used}, demotion {demotions + 1} of {settings.max_demotions}"


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
