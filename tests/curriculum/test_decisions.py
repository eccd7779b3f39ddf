"""What follows a gate, on hand-made tables: every outcome of a gate with every on_fail, and whole walks."""

from __future__ import annotations

import re

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.curriculum.decisions import (
    best_of_visit,
    decide,
    next_place,
    num_tries,
    reopen,
    starts_from,
)
from dual_policy_plugin.curriculum.state import ChosenPolicy, EarlierRung, Gate, Job, SweepState
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.evaluation.sequential import GateVerdict, sprt, wilson_gate

PASS, FAIL = "pass", "fail"
FORGET = "forget"  # passes its own gate, loses to an earlier NPC


def settings(**values: object) -> CurriculumConfig:
    return CurriculumConfig(ladder=(PolicySource(uri="builtin://arena/weak"),), **values)  # type: ignore[arg-type]


def verdict(passed: bool | None) -> GateVerdict:
    return GateVerdict(
        passed=passed, win_rate=0.6, low=0.56, high=0.64, episodes=100, statistic=0.56, bounds=(0.5, 0.5), rule="wilson"
    )


def earlier(win_rate: float, ok: bool, opponent: str = "weak") -> EarlierRung:
    return EarlierRung(opponent=opponent, win_rate=win_rate, low=0.0, high=1.0, episodes=100, ok=ok)


def gate(stage: int, attempt: int, decision: str) -> Gate:
    return Gate(
        stage=stage, attempt=attempt, job=0, opponent="weak", rule="wilson", promote_at=0.5, win_rate=0.5, low=0.4,
        high=0.6, episodes=10, passed=decision == "promote", forgotten=[], decision=decision, why="",
    )  # fmt: skip


def walk(config: CurriculumConfig, outcomes: list[str], num_stages: int) -> tuple[list[tuple[int, int, str]], str]:
    """(stage, attempt, decision) of each gate with these outcomes, and the status behind the last."""
    state, steps = SweepState(request={}), []
    for outcome in outcomes:
        assert state.status == "running", f"nothing follows {steps}"
        forgotten = [earlier(0.1, ok=False)] if outcome == FORGET else []
        decision, _ = decide(verdict(outcome != FAIL), forgotten, state, config)
        steps.append((state.stage, state.attempt, decision))
        state.gates.append(gate(state.stage, state.attempt, decision))
        place = next_place(decision, state, num_stages)
        state.stage, state.attempt, state.demotions = place.stage, place.attempt, place.demotions
        state.status = place.status
    return steps, state.status


@pytest.mark.parametrize(
    ("values", "outcomes", "num_stages", "steps", "status"),
    [
        # every gate is passed at once
        ({}, [PASS, PASS], 2, [(1, 1, "promote"), (2, 1, "promote")], "finished"),
        ({}, [PASS], 2, [(1, 1, "promote")], "running"),
        # repeats, up to max_attempts
        ({"max_attempts": 3}, [FAIL, FAIL, PASS], 1, [(1, 1, "repeat"), (1, 2, "repeat"), (1, 3, "promote")],
         "finished"),
        ({"max_attempts": 2}, [FAIL, FAIL], 2, [(1, 1, "repeat"), (1, 2, "stop")], "stopped"),
        ({"max_attempts": 1}, [FAIL], 2, [(1, 1, "stop")], "stopped"),
        ({"max_attempts": 1}, [FORGET], 2, [(1, 1, "stop")], "stopped"),
        # each stage has attempts of its own
        ({"max_attempts": 2}, [FAIL, PASS, FAIL, PASS], 2,
         [(1, 1, "repeat"), (1, 2, "promote"), (2, 1, "repeat"), (2, 2, "promote")], "finished"),
        # advance
        ({"max_attempts": 2, "on_fail": "advance"}, [FAIL, FAIL, FAIL, FAIL], 2,
         [(1, 1, "repeat"), (1, 2, "advance"), (2, 1, "repeat"), (2, 2, "advance")], "finished"),
        ({"max_attempts": 1, "on_fail": "advance"}, [FORGET, PASS], 2, [(1, 1, "advance"), (2, 1, "promote")],
         "finished"),
        # demote: attempts are numbered on and counted anew
        ({"max_attempts": 2, "on_fail": "demote"}, [PASS, FAIL, FAIL, FAIL, PASS, PASS], 2,
         [(1, 1, "promote"), (2, 1, "repeat"), (2, 2, "demote"), (1, 2, "repeat"), (1, 3, "promote"),
          (2, 3, "promote")], "finished"),
        ({"max_attempts": 1, "on_fail": "demote"}, [PASS, PASS, FAIL, FAIL, PASS, PASS, PASS], 3,
         [(1, 1, "promote"), (2, 1, "promote"), (3, 1, "demote"), (2, 2, "demote"), (1, 2, "promote"),
          (2, 3, "promote"), (3, 2, "promote")], "finished"),
        # there is nothing before the first stage
        ({"max_attempts": 2, "on_fail": "demote"}, [FAIL, FAIL], 2, [(1, 1, "repeat"), (1, 2, "stop")], "stopped"),
        # the bound on demotions
        ({"max_attempts": 1, "on_fail": "demote", "max_demotions": 2}, [PASS, FAIL, PASS, FAIL, PASS, FAIL], 2,
         [(1, 1, "promote"), (2, 1, "demote"), (1, 2, "promote"), (2, 2, "demote"), (1, 3, "promote"),
          (2, 3, "stop")], "stopped"),
        ({"max_attempts": 1, "on_fail": "demote", "max_demotions": 0}, [PASS, FAIL], 2,
         [(1, 1, "promote"), (2, 1, "stop")], "stopped"),
    ],
)  # fmt: skip
def test_walks(
    values: dict[str, object],
    outcomes: list[str],
    num_stages: int,
    steps: list[tuple[int, int, str]],
    status: str,
) -> None:
    assert walk(settings(**values), outcomes, num_stages) == (steps, status)


@pytest.mark.parametrize("max_demotions", [0, 1, 5])
@pytest.mark.parametrize("max_attempts", [1, 3])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_sweep_whose_last_gate_stays_shut_ends(max_demotions: int, max_attempts: int, num_stages: int) -> None:
    """With demote there are max_demotions + 1 visits to the last stage, and no attempt has a number twice."""
    config = settings(on_fail="demote", max_attempts=max_attempts, max_demotions=max_demotions)
    state, seen = SweepState(request={}), []
    while state.status == "running":
        decision, _ = decide(verdict(state.stage < num_stages), [], state, config)
        seen.append((state.stage, state.attempt))
        state.gates.append(gate(state.stage, state.attempt, decision))
        place = next_place(decision, state, num_stages)
        state.stage, state.attempt, state.demotions = place.stage, place.attempt, place.demotions
        state.status = place.status
        assert len(seen) < 1000
    assert state.status == "stopped"
    assert state.demotions == max_demotions
    assert len(seen) == len(set(seen))
    assert sum(stage == num_stages for stage, _ in seen) == (max_demotions + 1) * max_attempts


@pytest.mark.parametrize(
    ("gates", "stage", "expected"),
    [
        ([], 1, 1),
        ([(1, "repeat")], 1, 2),
        ([(1, "repeat"), (1, "repeat")], 1, 3),
        ([(1, "repeat"), (1, "promote")], 2, 1),
        ([(1, "promote"), (2, "repeat"), (2, "demote")], 1, 1),
        ([(1, "repeat"), (1, "promote"), (2, "demote"), (1, "repeat")], 1, 2),
    ],
)
def test_tries_are_counted_within_a_visit(gates: list[tuple[int, str]], stage: int, expected: int) -> None:
    made = [gate(number, i, decision) for i, (number, decision) in enumerate(gates, 1)]
    assert num_tries(made, stage) == expected


def test_the_reason_has_the_figures() -> None:
    state, config = SweepState(request={}), settings(promote_at=0.55)
    assert decide(wilson_gate(70, 100, promote_at=0.55), [], state, config) == (
        "promote", "win rate 0.700 [0.604, 0.781] over 100 episodes, the lower bound exceeds promote_at=0.55"
    )  # fmt: skip
    assert decide(wilson_gate(60, 100, promote_at=0.55), [], state, config) == (
        "repeat",
        "win rate 0.600 [0.502, 0.691] over 100 episodes, the lower bound does not exceed promote_at=0.55; "
        "attempt 1 of 2",
    )
    lost = [earlier(0.45, ok=True, opponent="weak"), earlier(0.35, ok=False, opponent="medium")]
    decision, why = decide(wilson_gate(70, 100, promote_at=0.55), lost, state, config)
    assert decision == "repeat"
    assert "; medium is forgotten, 0.350 is below 0.4;" in why
    assert "weak" not in why


@pytest.mark.parametrize(("wins", "said"), [(90, "is above"), (20, "is not above"), (58, "is not shown to be above")])
def test_the_reason_of_sprt(wins: int, said: str) -> None:
    config = settings(promote_at=0.55, rule="sprt")
    found = sprt(wins, 100, p0=0.55, p1=0.6, alpha=0.05, beta=0.05)
    decision, why = decide(found, [], SweepState(request={}), config)
    assert decision == ("promote" if wins == 90 else "repeat")
    assert f"which by SPRT {said} promote_at=0.55 (log likelihood ratio {found.statistic:.2f}" in why


def job(num: int, stage: int, objective: float | None, status: str = "finished", attempt: int = 1) -> Job:
    return Job(
        num=num, stage=stage, attempt=attempt, overrides=[], status=status, objective=objective, checkpoint=f"{num}/x"
    )


def test_the_best_job_is_of_the_stage_and_finished() -> None:
    jobs = [job(0, 1, 0.9), job(1, 2, 0.5), job(2, 2, 0.7), job(3, 2, 0.7), job(4, 2, 0.95, "failed"), job(5, 2, None)]
    state = SweepState(request={}, jobs=jobs)
    assert state.best_job(2) is jobs[2]  # of equals the first
    assert state.best_job(1) is jobs[0]
    assert state.best_job(3) is None
    assert SweepState(request={}, jobs=[job(7, 1, None), job(8, 1, -2.0)]).best_job(1).num == 8  # type: ignore[union-attr]


def test_of_equal_jobs_the_best_is_of_the_newest_attempt() -> None:
    jobs = [job(0, 1, 1.0), job(1, 1, 1.0), job(2, 1, 1.0, attempt=2), job(3, 1, 1.0, attempt=2)]
    state = SweepState(request={}, jobs=[*jobs, job(4, 1, 0.9, attempt=3)])
    assert state.best_job(1) is jobs[2]
    assert state.best_job(1, since=3) is state.jobs[4]
    assert state.best_job(1, since=4) is None


def test_a_stage_that_is_visited_again_has_its_best_of_this_visit() -> None:
    """Else the policy that did not lead further would be promoted again, and going back would change nothing."""
    jobs = [job(0, 1, 0.9), job(1, 2, 0.1), job(2, 1, 0.5, attempt=2), job(3, 1, 0.4, attempt=3)]
    state = SweepState(request={}, jobs=jobs, gates=[gate(1, 1, "promote"), gate(2, 1, "demote")], stage=1, attempt=2)
    assert best_of_visit(state) is jobs[2]
    state.gates.append(gate(1, 2, "repeat"))
    state.attempt = 3
    assert best_of_visit(state) is jobs[2]
    assert starts_from(state, settings()) is jobs[2]
    state.gates[-1].decision, state.gates[1].decision = "promote", "advance"
    assert best_of_visit(state) is jobs[3]


STOP = [(1, "promote"), (2, "repeat"), (2, "stop")]
BACK = [(1, "promote"), (2, "demote"), (1, "promote"), (2, "stop")]


@pytest.mark.parametrize(
    ("gates", "old", "new", "decision"),
    [
        (STOP, {"max_attempts": 2}, {"max_attempts": 3}, "repeat"),
        (STOP, {"max_attempts": 2}, {"max_attempts": 2, "on_fail": "advance"}, "advance"),
        (STOP, {"max_attempts": 2}, {"max_attempts": 2, "on_fail": "demote"}, "demote"),
        (STOP, {"max_attempts": 2}, {"max_attempts": 2, "on_fail": "demote", "max_demotions": 0}, None),
        (STOP, {"max_attempts": 2}, {"max_attempts": 2, "max_demotions": 9}, None),
        (STOP[:2], {"max_attempts": 2}, {"max_attempts": 5}, None),  # has not stopped: what comes is by the new ones
        (BACK, {"max_attempts": 1, "on_fail": "demote", "max_demotions": 1},
         {"max_attempts": 1, "on_fail": "demote", "max_demotions": 2}, "demote"),
    ],
)  # fmt: skip
def test_the_decision_that_stopped_a_sweep_is_taken_anew(
    gates: list[tuple[int, str]], old: dict[str, object], new: dict[str, object], decision: str | None
) -> None:
    made = [gate(stage, i, one) for i, (stage, one) in enumerate(gates, 1)]
    state = SweepState(request={}, gates=made)
    assert reopen(state, settings(**old)) is None  # the same settings decide the same
    found = reopen(state, settings(**new))
    assert (found and found.decision) == decision
    assert found is None or found is made[-1]
    assert reopen(state, settings(**new)) is None
    assert [one.decision for one in made[:-1]] == [one for _, one in gates[:-1]]


@pytest.mark.parametrize(
    ("gates", "new", "line"),
    [
        (STOP, {"max_attempts": 1}, "attempt 2 at stage 2 was followed by repeat, and by these settings it is stop"),
        (BACK, {"max_attempts": 2, "on_fail": "demote"}, "attempt 2 at stage 2 was followed by demote"),
        ([(1, "advance")], {"max_attempts": 1}, "by these settings it is stop (1 of 1 attempts, on_fail=stop); use"),
    ],
)
def test_settings_by_which_the_sweep_had_gone_another_way_are_refused(
    gates: list[tuple[int, str]], new: dict[str, object], line: str
) -> None:
    made = [gate(stage, i, one) for i, (stage, one) in enumerate(gates, 1)]
    with pytest.raises(RunError, match=re.escape(line)):
        reopen(SweepState(request={}, gates=made), settings(**new))
    assert [one.decision for one in made] == [one for _, one in gates]


def test_a_gate_that_was_passed_and_forgets_is_no_promotion_when_it_is_taken_anew() -> None:
    lost = gate(1, 1, "stop")
    lost.passed, lost.forgotten = True, [earlier(0.1, ok=False)]
    found = reopen(SweepState(request={}, gates=[lost]), settings(max_attempts=2))
    assert found is not None
    assert (found.decision, found.why) == ("repeat", "; taken anew: attempt 1 of 2")


def test_what_an_attempt_starts_from() -> None:
    policy = ChosenPolicy(path="0/x", sha256="0" * 64, job=0, stage=1)
    state = SweepState(request={}, jobs=[job(0, 1, 0.9), job(1, 2, 0.4)])
    assert starts_from(state, settings()) is None  # the first attempt of all
    state.gates = [gate(1, 1, "repeat")]
    assert starts_from(state, settings()) is state.jobs[0]  # the stage's best
    state.gates, state.stage, state.policy = [gate(1, 1, "promote")], 2, policy
    assert starts_from(state, settings()) is policy  # the policy that was promoted
    state.gates.append(gate(2, 1, "repeat"))
    assert starts_from(state, settings()) is state.jobs[1]
    state.gates.append(gate(2, 2, "demote"))
    state.stage = 1
    assert starts_from(state, settings()) is policy  # a new visit
    assert starts_from(state, settings(carry="nothing")) is None
