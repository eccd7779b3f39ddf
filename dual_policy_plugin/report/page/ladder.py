"""A curriculum sweep: its rungs, jobs, gates and decisions. Takes what curriculum.json holds, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dual_policy_plugin.report.figures import format_duration
from dual_policy_plugin.report.page.charts import draw_intervals
from dual_policy_plugin.report.page.html import Section, listing, paragraph, table

Node = Mapping[str, Any]


def ladder_section(name: str, state: Node, number: int = 0) -> Section:
    """How far a sweep came and why.

    Args:
        name: of the sweep.
        state: the fields of a SweepState, all of them plain values.
        number: of the section, where there are several.
    """
    rungs, jobs, gates = state["rungs"], state["jobs"], state["gates"]
    rated = [(rung["name"], rung["rating"], rung["low"], rung["high"]) for rung in rungs if rung["rating"] is not None]
    rated = [
        (rung, rating, rating if low is None else low, rating if high is None else high)
        for rung, rating, low, high in rated
    ]
    num_stages = max(len(rungs), state["request"].get("sweeper", {}).get("stages") or 0)
    policy = state["policy"]
    chosen = (
        f"It came to {policy['path']} (stage {policy['stage']}, job {policy['job']}, sha256 {policy['sha256'][:12]})."
        if policy
        else "No policy passed stage 1 yet."
    )
    where = {
        "finished": f"Finished, all of its {num_stages} stages.",
        "stopped": f"Stopped at stage {state['stage']} of {num_stages}.",
    }
    going = f"At stage {state['stage']} of {num_stages}, attempt {state['attempt']}."
    games = "Elo of each stage's NPC from games of all against all, with 95 % intervals."
    ratings = draw_intervals("ladder", "Ratings of the rungs", games, rated, unit="Elo points")
    return Section(
        anchor=f"curriculum{number or ''}",
        title="Curriculum" if not number else f"Curriculum {name}",
        intro=f"{where.get(state['status'], going)} {chosen}",
        plots=[ratings],
        blocks=[
            _rungs(rungs),
            "<h3>Decisions</h3>" if gates else "",
            _gates(gates),
            _forgotten(gates),
            "<h3>Jobs</h3>" if jobs else "",
            _jobs(jobs),
        ],
    )


def sweeper_settings(state: Node) -> str:
    """What the sweep was asked for, as text."""
    sweeper = state["request"].get("sweeper", {})
    return listing("settings of the sweep", "\n".join(f"{key}: {value}" for key, value in sweeper.items()))


def _rungs(rungs: Sequence[Node]) -> str:
    rows = [
        (
            stage,
            rung["name"],
            _interval(rung["rating"], rung["low"], rung["high"]),
            rung["requested"],
            rung["uri"],
            rung["sha256"],
        )
        for stage, rung in enumerate(rungs, 1)
    ]
    return table(["stage", "NPC", "rating", "requested", "pinned", "sha256"], rows, numbers=[0, 2])


def _gates(gates: Sequence[Node]) -> str:
    rows = [
        (
            gate["stage"], gate["attempt"], gate["job"], gate["opponent"],
            f"{gate['win_rate']:.3f} [{gate['low']:.3f}, {gate['high']:.3f}]", gate["decision"], gate["why"],
        )
        for gate in gates
    ]  # fmt: skip
    header = ["stage", "attempt", "job", "against", "win rate", "decision", "why"]
    return table(header, rows, numbers=[0, 1, 2, 4])


def _forgotten(gates: Sequence[Node]) -> str:
    """What promoted policies did against the NPCs of earlier stages."""
    rows = [
        (
            gate["stage"], gate["attempt"], one["opponent"],
            f"{one['win_rate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]", "yes" if one["ok"] else "forgotten",
        )
        for gate in gates
        for one in gate["forgotten"]
    ]  # fmt: skip
    shown = table(["stage", "attempt", "earlier NPC", "win rate", "still beaten"], rows, numbers=[0, 1, 3])
    return paragraph("Against the NPCs of earlier stages:") + shown if rows else ""


def _jobs(jobs: Sequence[Node]) -> str:
    rows = [
        (
            job["num"], job["stage"], job["attempt"], job["status"],
            "-" if job["objective"] is None else f"{job['objective']:.3f}",
            "-" if job["agent_step"] is None else f"{job['agent_step']:,}",
            format_duration(job["elapsed_s"]), job["checkpoint"] or "-",
        )
        for job in jobs
    ]  # fmt: skip
    header = ["job", "stage", "attempt", "status", "objective", "learner steps", "time", "checkpoint"]
    return table(header, rows, numbers=[0, 1, 2, 4, 5, 6])


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if low is None or high is None else f"{value:.0f} [{low:.0f}, {high:.0f}]"
