"""What is said of runs in words and tables: the headline, who acts where, the policies, the config, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.report.figures import format_duration, format_number
from dual_policy_plugin.report.page.charts import LEARNER
from dual_policy_plugin.report.page.curves import COST, metric_line, win_windows
from dual_policy_plugin.report.page.html import Section, cards, listing, paragraph, table
from dual_policy_plugin.report.page.runs import FINISHED, GOING, Run
from dual_policy_plugin.rollout.assignment import assign

MAX_CARDS = 6
"""Opponents in the headline; all are in the table of the evaluation."""
_VERSIONS = ("dual-policy-plugin", "torch", "numpy", "matplotlib", "hydra-core", "omegaconf", "safetensors")
_DUAL = "trainer.dual_policy"
_NUMERIC = ("learner steps", "objective", "learner's return", "time", "cost")
_NOT_COMPARED = ("run", f"{_DUAL}.lock")


def headline(run: Run) -> Section:
    """The one look at a run."""
    facts = []
    for match in run.evals[:MAX_CARDS]:
        interval = f"[{match.low:.3f}, {match.high:.3f}] over {match.episodes:.0f} episodes"
        facts.append((f"win rate against {match.opponent}", f"{match.win_rate:.3f}", interval))
    if not facts and (newest := _newest_win_rate(run)):
        facts = [("win rate, newest training episodes", *newest)]
    total, steps = run.setting("trainer.total_timesteps"), run.fact("charts/agent_step", "agent_step")
    share = f"of {total:,}" if isinstance(total, int) else ""
    if steps is not None:
        facts.append(("learner steps", f"{steps:,.0f}", share))
    iterations = run.fact("iteration", "iterations")
    elapsed_s = run.fact("timing/elapsed_s", "elapsed_s")
    facts.append(("time", format_duration(elapsed_s), "" if iterations is None else f"{iterations:,.0f} iterations"))
    if (cost := run.fact(COST)) is not None:
        facts.append(("cost", f"${cost:.2f}", ""))
    facts.append(("state", run.status, _of_state(run, steps, total)))
    return Section(
        anchor="summary", title="Summary", blocks=[cards(facts), *(paragraph(note, "note") for note in run.notes)]
    )


def table_of_runs(runs: Sequence[Run]) -> Section:
    """All runs: what differs in their configs, and what they came to."""
    keys = differing_keys(runs)
    header = ["run", "state", "win rates", "learner's return", "objective", "learner steps", "time", "cost"]
    header += [key.removeprefix("trainer.") for key in keys]
    rows = [[*_result_cells(run), *(_short(run.setting(key)) for key in keys)] for run in runs]
    empty = {k for k in range(len(header)) if all(row[k] == "-" for row in rows)}
    numeric = [k for k, name in enumerate(header) if name in _NUMERIC and k not in empty]
    kept = [k for k in range(len(header)) if k not in empty]
    shown = table(
        [header[k] for k in kept], [[row[k] for k in kept] for row in rows], numbers=[kept.index(k) for k in numeric]
    )
    notes = [paragraph(f"{run.name}: {one}", "note") for run in runs for one in run.notes]
    return Section(anchor="summary", title="Summary", blocks=[shown, *notes])


def _result_cells(run: Run) -> list[str]:
    """What a run came to, under the first columns of `table_of_runs`."""
    objective = None if run.result is None else run.result.get("objective")
    wins = ", ".join(f"{one.opponent} {one.win_rate:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in run.evals)
    newest = _newest_win_rate(run)
    returns, cost = metric_line(run, "dual_policy/policy_a_reward", "", LEARNER).values, run.fact(COST)
    steps = run.fact("charts/agent_step", "agent_step")
    return [
        run.name,
        run.status,
        wins or (f"{newest[0]} in training" if newest else "-"),
        format_number(float(returns[-1])) if len(returns) else "-",
        f"{objective:.3f}" if isinstance(objective, float) else "-",
        "-" if steps is None else f"{steps:,.0f}",
        format_duration(run.fact("timing/elapsed_s", "elapsed_s")),
        "-" if cost is None else f"${cost:.2f}",
    ]


def policies_section(runs: Sequence[Run]) -> Section:
    """Every policy that the runs pinned, each once."""
    rows: dict[tuple[str, ...], tuple[str, ...]] = {}
    for run in runs:
        for entry in run.policies:
            made = ", ".join(
                f"{key} {entry.metadata[key]}"
                for key in ("architecture", "run", "epoch", "step")
                if key in entry.metadata
            )
            row = (entry.name, entry.role, entry.requested, entry.uri, entry.sha256, f"{entry.num_bytes:,}", made)
            rows.setdefault((*row[:5],), row)
    intro = (
        "Pinned before the first step and verified whenever they are read. npc: plays beside the learner; initial: "
        "what the learner started from; opponent, held_out: played in evaluations."
    )
    header = ["name", "role", "requested", "pinned to", "sha256", "bytes", "made by"]
    return Section(
        anchor="npcs",
        title="NPCs",
        intro=intro if rows else "",
        blocks=[table(header, list(rows.values()), numbers=[5])],
    )


def seats_section(run: Run) -> Section:
    """Who acts for which seat of an env, as the config splits them."""
    learners, npcs = (
        run.metrics.last("dual_policy/policy_a_agent_count"),
        run.metrics.last("dual_policy/npc_agent_count"),
    )
    if learners is None:
        return Section(anchor="seats", title="Seats")
    num = int(learners + (npcs or 0))
    layout = run.setting(f"{_DUAL}.assignment") or "first"
    rows = [
        ["learner", f"{learners:.0f}", "all" if not npcs else "-"],
        ["NPC", f"{npcs or 0:.0f}", "none" if not npcs else "-"],
    ]
    try:
        split = assign(num, learners / num, list(layout) if isinstance(layout, list) else str(layout))
        rows[0][2], rows[1][2] = _seats(split.learner_seats), _seats(split.npc_seats)
    except DualPolicyError:
        pass  # a share that an older version took: the counts are right all the same
    pct = run.setting(f"{_DUAL}.training_agents_pct")
    counts = run.metrics.column("dual_policy/policy_a_agent_count")
    is_changing = float(np.nanmin(counts)) < float(np.nanmax(counts))
    said = f"{num} agents in each of {run.setting('env.num_envs') or 'its'} envs; assignment {layout}"
    said += f", training_agents_pct {pct if pct is not None else 'by default'}"
    said += ", which changes during the run: the newest iteration's seats." if is_changing else "."
    return Section(
        anchor="seats",
        title="Seats",
        intro=said,
        blocks=[table(["acts", "agents of an env", "seats"], rows, numbers=[1])],
    )


def config_section(runs: Sequence[Run], *more: str) -> Section:
    """The configs as they stand, and which versions wrote this page."""
    texts = [
        listing(f"config.yaml of {run.name}" if len(runs) > 1 else "config.yaml", run.config_text) for run in runs[:4]
    ]
    rest = (
        paragraph(f"The other {len(runs) - 4} runs differ from these only by what the table of the runs shows.")
        if len(runs) > 4
        else ""
    )
    found = [("python", platform.python_version())]
    for name in _VERSIONS:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    shown = ", ".join(f"{name} {number}" for name, number in found)
    return Section(
        anchor="config", title="Config", blocks=[*texts, rest, *more, paragraph(f"Written {when} by {shown}.", "soft")]
    )


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Dotted keys of the configs whose values are not the same in all runs; at most 8."""
    flat = [_flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    found = [key for key in keys if len({repr(one.get(key)) for one in flat}) > 1]
    return [key for key in found if not any(f"{key}.".startswith(f"{skipped}.") for skipped in _NOT_COMPARED)][:8]


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in _NOT_COMPARED:
            found |= _flatten(value, f"{name}.")
        else:
            found[name] = value
    return found


def _newest_win_rate(run: Run) -> tuple[str, str] | None:
    windows = win_windows(run)
    if not len(windows.means):
        return None
    rate, games = float(windows.means[-1]), float(windows.weights[-1])
    low, high = wilson_interval(rate * games, games)
    return f"{rate:.3f}", f"[{low:.3f}, {high:.3f}] over {games:.0f} episodes"


def _of_state(run: Run, steps: float | None, total: Any) -> str:
    if run.status == FINISHED or not isinstance(total, int) or not total:
        return ""
    share = f"{(steps or 0) / total:.0%} of its steps"
    return share if run.status == GOING else f"after {share}; the same command goes on"


def _seats(seats: Sequence[int]) -> str:
    """Ascending numbers with ranges written short."""
    parts: list[list[int]] = []
    for seat in seats:
        if parts and seat == parts[-1][1] + 1:
            parts[-1][1] = seat
        else:
            parts.append([seat, seat])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts) or "none"


def _short(value: Any) -> str:
    shown = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:40]}...{shown[-16:]}"
