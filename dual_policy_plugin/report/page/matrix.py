"""Who beats whom: the evaluations of runs as a heat map, rating differences, and a cross-play's own ratings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.files import file_error
from dual_policy_plugin.report.page.charts import Plot, draw_intervals, draw_matrix
from dual_policy_plugin.report.page.html import Section, paragraph, table
from dual_policy_plugin.report.page.runs import Match, Run

MAX_SIDE = 40
"""Rows and columns of a heat map; of more the first are drawn."""
_DIFFERENCE = (
    "400 log10(p / (1 - p)) of the win rate p and of its interval's ends: how many Elo points the learner is above "
    "that opponent, by these games alone. A rate of 0 or 1 is counted as half a game away from it."
)


def evaluation_section(runs: Sequence[Run]) -> Section:
    """The evaluations at the end of runs: runs against opponents."""
    evaluated = [run for run in runs if run.evals]
    opponents = list(dict.fromkeys(match.opponent for run in evaluated for match in run.evals))
    section = Section(anchor="matrix", title="Evaluation")
    if not evaluated:
        return section
    rates = np.full((len(evaluated), len(opponents)), np.nan)
    for row, run in enumerate(evaluated):
        for match in run.evals:
            rates[row, opponents.index(match.opponent)] = match.win_rate
    held_out = sorted({entry.name for run in evaluated for entry in run.policies if entry.role == "held_out"})
    rows = [_match_row(run, match) for run in evaluated for match in run.evals]
    section.intro = "Games at the end of a run, the learner against each opponent, both seatings, on fixed seeds."
    heat = _heat(rates, evaluated, opponents) if rates.size > 1 else None  # of one cell the table tells as much
    section.shown = [plot for plot in (heat, _differences(evaluated)) if plot]
    section.blocks = [
        table(
            ["run", "opponent", "win rate", "95 % interval", "episodes", "rating difference"],
            rows,
            numbers=[2, 3, 4, 5],
        ),
        paragraph(f"Held out, never played in training: {', '.join(held_out)}.") if held_out else "",
    ]
    return section


def read_cross_play(path: Path) -> Mapping[str, Any]:
    """What `dual-policy evaluate out=FILE.json` wrote.

    Raises:
        RunError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise file_error(error, path, "read") from error
    except (ValueError, RecursionError) as error:
        raise _no_cross_play(path) from error
    try:
        names = [str(one["name"]) for one in value["policies"]]
        ratings = [
            (
                str(one["name"]),
                float(one["rating"]),
                float(one["low"]),
                float(one["high"]),
                bool(one["anchored"]),
                one["worst_case"],
            )
            for one in value["ratings"]
        ]
        rates = np.array(value["win_rate"], dtype=np.float64)
        if rates.shape != (len(names), len(names)) or not names:
            raise ValueError("another shape")
        roles = [str(role) for role in value["roles"]]
        return {
            "names": names, "ratings": ratings, "rates": rates, "roles": roles, "env": str(value["env"]),
            "episodes": int(value["episodes"]), "cycles": float(value["intransitive_share"]),
            "sure_cycles": float(value["sure_intransitive_share"]),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _no_cross_play(path) from error


def cross_play_section(cross: Mapping[str, Any]) -> Section:
    """The win rates of all pairs and the ratings that were fitted to them."""
    names, roles, ratings = cross["names"], cross["roles"], cross["ratings"]
    order = list(range(len(names))) if roles else sorted(range(len(names)), key=lambda k: -ratings[k][1])
    order, left_out = order[:MAX_SIDE], len(names) - MAX_SIDE
    shown = [names[k] for k in order]
    sides = f" Rows play {roles[0]}, columns {roles[1]}." if roles else ""
    by_rating = sorted(ratings, key=lambda one: -one[1])
    rows = [
        (name, f"{rating:.0f}", "given" if anchored else f"{low:.0f} to {high:.0f}", _share(worst))
        for name, rating, low, high, anchored, worst in by_rating
    ]
    games, rates = f"{cross['episodes']} episodes a cell; a draw is half a win.{sides}", cross["rates"]
    heat = draw_matrix("cross_play", "Win rate of row against column", games, rates[np.ix_(order, order)], shown, shown)
    ranks = draw_intervals(
        "ratings",
        "Ratings",
        "Bradley-Terry strengths of all pairs together with 95 % intervals; 400 points are odds of ten to one.",
        [one[:4] for one in by_rating[:MAX_SIDE]],
        unit="Elo points",
    )
    cycles = f"{cross['cycles']:.0%} of all triples, {cross['sure_cycles']:.0%} beyond chance."
    cycles = f"Cycles (a beats b beats c beats a): {cycles}"
    more = paragraph(f"The heat map leaves out the last {left_out} policies.") if left_out > 0 else ""
    return Section(
        anchor="cross_play",
        title="Cross-play",
        intro=f"All against all on {cross['env']}.",
        plots=[heat, ranks],
        blocks=[
            table(["policy", "rating", "95 % interval", "worst case"], rows, numbers=[1, 2, 3]),
            paragraph(cycles),
            more,
        ],
    )


def rating_difference(rate: float, episodes: float) -> float:
    """400 log10(p / (1 - p)); a rate of 0 or 1 is taken half a game away from it."""
    edge = 0.5 / max(episodes, 1.0)
    rate = min(max(rate, edge), 1 - edge)
    return 400 * math.log10(rate / (1 - rate))


def _heat(rates: Any, runs: Sequence[Run], opponents: Sequence[str]) -> Plot | None:
    left_out = len(runs) > MAX_SIDE or len(opponents) > MAX_SIDE
    more = f" The first {MAX_SIDE} of each are drawn; the table has all." if left_out else ""
    return draw_matrix(
        "evaluation",
        "Win rate of run against opponent",
        f"Red below one half, blue above.{more}",
        rates[:MAX_SIDE, :MAX_SIDE],
        [run.name for run in runs[:MAX_SIDE]],
        opponents[:MAX_SIDE],
    )


def _differences(runs: Sequence[Run]) -> Plot | None:
    rows = []
    for run in runs:
        for match in run.evals:
            name = match.opponent if len(runs) == 1 else f"{run.name} - {match.opponent}"
            rows.append((name, *_difference(match)))
    return draw_intervals(
        "rating_differences", "Rating differences", _DIFFERENCE, rows[:MAX_SIDE], unit="Elo points above the opponent"
    )


def _difference(match: Match) -> tuple[float, float, float]:
    value, low, high = (rating_difference(rate, match.episodes) for rate in (match.win_rate, match.low, match.high))
    return value, low, high


def _match_row(run: Run, match: Match) -> tuple[str, ...]:
    value, low, high = _difference(match)
    interval = f"{match.low:.3f} to {match.high:.3f}"
    elo = f"{value:+.0f} ({low:+.0f} to {high:+.0f})"
    return run.name, match.opponent, f"{match.win_rate:.3f}", interval, f"{match.episodes:.0f}", elo


def _share(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _no_cross_play(path: Path) -> RunError:
    return RunError(
        f"{path} is no cross-play; name a file that `dual-policy evaluate policies=[...] out=FILE.json` wrote"
    )
