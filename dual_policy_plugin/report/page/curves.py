"""The curves of one run, and those of several over each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.report.page.charts import BOTH, LEARNER, NPC, Line, Plot, draw_lines
from dual_policy_plugin.report.page.html import Section, color_key, paragraph
from dual_policy_plugin.report.page.runs import Run
from dual_policy_plugin.report.page.series import Floats, Windows, pool_windows

EPISODES = "dual_policy/episodes"
WIN_EPISODES = 200
"""Episodes of a point of a win rate, at least: its interval is then narrower than +-0.07."""
FEW_EPISODES, MIN_POINTS = 20, 20
"""In a run that has too few for so many points: the least that a point has, and how many points there are then."""
MAX_CURVES = 7
"""In a figure: as many as there are colors."""
MAX_OTHERS = 12
WIN = (
    "A win is an episode in which the learner seats' mean return exceeds the NPC seats' mean return, or in which the "
    "env's own scores say so; a draw is half a win."
)
RETURNS = {
    "dual_policy/policy_a_reward": ("learner", LEARNER),
    "dual_policy/npc_reward": ("NPC", NPC),
    "dual_policy/combined_reward": ("all agents", BOTH),
}
LOSSES = {
    "losses/policy_loss": ("policy loss", "PPO's clipped objective, negated; its size says little, its jumps do."),
    "losses/value_loss": ("value loss", "Squared error of the predicted returns."),
    "losses/entropy": ("entropy", "Of the action distribution, in nats; it falls as the policy becomes sure."),
    "losses/approx_kl": ("approx. KL", "How far an update moved the policy; above about 0.02 it moves fast."),
    "losses/clipfrac": ("clipped share", "Share of samples whose ratio left the clip range."),
    "losses/explained_variance": (
        "explained variance",
        "Of the returns, by the value head: 1 is perfect, 0 no better than their mean.",
    ),
    "losses/grad_norm": ("gradient norm", "Before clipping to trainer.max_grad_norm."),
    "losses/weight_norm": ("weight norm", "Of all weights after the update."),
    "charts/learning_rate": ("learning rate", "Of the optimizer."),
}
RATES = {"charts/learner_SPS": ("learner steps/s", LEARNER), "charts/env_agent_SPS": ("env-agent steps/s", BOTH)}
LAPS = {"timing/rollout_s": ("rollout", LEARNER), "timing/update_s": ("update", NPC)}
COST = "cost/accrued_total"
_SHOWN = (
    r"iteration|dual_policy/(episodes|win_rate|(policy_a|npc|combined)_reward(_total)?|(policy_a|npc)_agent_count)"
    r"|dual_policy/npc/.+/(win_rate|episodes|share)|env/(policy_a|npc)/.+|evals/.+/(win_rate|low|high|episodes)"
    r"|charts/(agent_step|env_agent_step|epoch)"
)


def win_windows(run: Run, name: str = "") -> Windows:
    """The win rate of a run, pooled so that each point has many episodes (see `_least_episodes`).

    Args:
        run: which.
        name: of one NPC of a pool; "": all of them.
    """
    prefix = f"dual_policy/npc/{name}/" if name else "dual_policy/"
    metrics = run.metrics
    episodes = metrics.column(f"{prefix}episodes")
    least = _least_episodes(float(np.nansum(episodes)))
    return pool_windows(run.steps, metrics.column(f"{prefix}win_rate"), episodes, least=least)


def win_line(run: Run, label: str, color: int, *, name: str = "", style: int = 0, has_band: bool = True) -> Line:
    """The win rate as a curve with its interval."""
    found = win_windows(run, name)
    pairs = zip(found.means.tolist(), found.weights.tolist(), strict=True)
    bounds = np.array([wilson_interval(rate * games, games) for rate, games in pairs]).reshape(-1, 2)
    band = (bounds[:, 0], bounds[:, 1]) if has_band else None
    return Line(label=label, steps=found.steps, values=found.means, band=band, color=color, style=style)


def metric_line(run: Run, name: str, label: str, color: int, *, style: int = 0) -> Line:
    """A metric as a curve; what is of episodes is weighed by them and pooled as a win rate is, a rate by its time."""
    least = 0.0
    if name.startswith(("charts/learner_SPS", "charts/env_agent_SPS", "timing/", "cost/")):
        values, steps = run.timing.column(name), timing_steps(run)
        seconds = run.timing.column("timing/rollout_s") + run.timing.column("timing/update_s")
        weights = seconds if name in RATES else None
    else:
        values, steps = run.metrics.column(name), run.steps
        weights = run.metrics.column(EPISODES) if name.startswith(("dual_policy/", "env/")) else None
        if weights is not None and not np.isfinite(weights[np.isfinite(values)]).all():
            weights = None  # a figure that stands where no episode ended is none of episodes
        elif weights is not None:
            least = _least_episodes(float(np.nansum(weights)))
    found = pool_windows(steps, values, weights, least=least)
    return Line(label=label, steps=found.steps, values=found.means, color=color, style=style)


def timing_steps(run: Run) -> Floats:
    """(num_lines,) learner steps of each line of timing.jsonl, by its iteration; NaN where that is not known."""
    of_iteration = dict(zip(run.metrics.column("iteration").tolist(), run.steps.tolist(), strict=True))
    iterations = run.timing.column("iteration").tolist()
    return np.array([of_iteration.get(iteration, np.nan) for iteration in iterations], dtype=np.float64)


def one_run(run: Run) -> list[Section]:
    """All curves of a run."""
    names = run.metrics.names
    losses = [
        draw_lines(_file(name), title, what, [metric_line(run, name, title, LEARNER)], is_small=True)
        for name, (title, what) in LOSSES.items()
    ]
    counters = sorted({name.split("/", 2)[2] for name in names if re.fullmatch(r"env/(policy_a|npc)/.+", name)})
    return [
        Section(anchor="wins", title="Win rate", intro=WIN, plots=[_wins(run), _evaluations(run), *_npc_plots(run)]),
        Section(anchor="returns", title="Returns", plots=_returns(run)),
        Section(anchor="losses", title="Losses", intro="Means over each iteration's updates.", plots=losses),
        Section(
            anchor="env",
            title="What the env counted",
            intro="Mean per agent and episode, by who acted; episodes pooled as for the win rate.",
            plots=[_counter(run, name) for name in counters],
        ),
        Section(anchor="rates", title="Rates and cost", plots=_rates(run)),
        _others(run),
    ]


def several_runs(runs: Sequence[Run], note: str) -> list[Section]:
    """The curves of several runs over each other; the same color means the same run throughout.

    Args:
        runs: those that are drawn.
        note: which of all runs these are.
    """

    def compare(name: str, title: str, what: str, *, is_small: bool = False) -> Plot | None:
        lines = [metric_line(run, name, run.name, k, style=k // MAX_CURVES) for k, run in enumerate(runs)]
        return draw_lines(_file(name), title, what, lines, is_small=is_small)

    wins = [win_line(run, run.name, k, style=k // MAX_CURVES, has_band=len(runs) <= 4) for k, run in enumerate(runs)]
    band = " The bands are Wilson's 95 % intervals." if len(runs) <= 4 else ""
    pooled = f"Training episodes, pooled: {WIN_EPISODES} or more a point, in a short run {FEW_EPISODES} or more.{band}"
    training = draw_lines("win_rate", "Win rate in training", pooled, wins, limits=(0, 1), even=0.5)
    losses = [compare(name, title, what, is_small=True) for name, (title, what) in LOSSES.items()]
    key = color_key([run.name for run in runs]) if any(plot and plot.unnamed for plot in [training, *losses]) else ""
    return [
        Section(
            anchor="wins",
            title="Win rate",
            intro=f"{WIN} {note}".strip(),
            plots=[training],
            blocks=[key],
        ),
        Section(
            anchor="returns",
            title="Returns",
            plots=[
                compare(name, f"Return per agent: {who}", "Summed reward of an episode, mean over its agents; pooled.")
                for name, (who, _) in RETURNS.items()
            ],
        ),
        Section(
            anchor="losses", title="Losses", intro="Colors as in the key of the win rate." if key else "", plots=losses
        ),
        Section(
            anchor="rates",
            title="Rates and cost",
            plots=[
                *(
                    compare(name, title, "Steps over the time of rollout and update.")
                    for name, (title, _) in RATES.items()
                ),
                compare(COST, "Cost", "Dollars since the run began."),
            ],
        ),
    ]


def _least_episodes(total: float) -> float:
    """Episodes that a point of a win rate has at least, in a run that has so many."""
    return min(max(total / MIN_POINTS, FEW_EPISODES), WIN_EPISODES)


def _wins(run: Run) -> Plot | None:
    found = win_windows(run)
    typical = float(np.median(found.weights)) if len(found.weights) else 0.0
    pooled = (
        f"Training episodes against whoever played, pooled: a point is about {found.iterations} iterations and "
        f"{typical:.0f} episodes. The band is Wilson's 95 % interval of those episodes."
    )
    line = win_line(run, "win rate", LEARNER)
    return draw_lines("win_rate", "Win rate in training", pooled, [line], limits=(0, 1), even=0.5)


def _npc_plots(run: Run) -> list[Plot | None]:
    """Win rates against, and shares of, each NPC of a pool; of many those that played most."""
    names = [found[1] for name in run.metrics.names if (found := re.fullmatch(r"dual_policy/npc/(.+)/share", name))]
    played = {name: float(np.nansum(run.metrics.column(f"dual_policy/npc/{name}/episodes"))) for name in names}
    most = sorted(sorted(names, key=lambda name: -played[name])[:MAX_CURVES], key=names.index)
    rest = f" The {len(most)} of {len(names)} NPCs that played most." if len(names) > len(most) else ""
    wins = [win_line(run, name, k, name=name, has_band=len(most) <= 4) for k, name in enumerate(most)]
    shares = [metric_line(run, f"dual_policy/npc/{name}/share", name, k) for k, name in enumerate(most)]
    bands = ", with Wilson's 95 % interval" if len(most) <= 4 else ""
    pooled = f"Training episodes against that NPC, pooled{bands}."
    return [
        draw_lines("npc_win_rates", "Win rate against each NPC", pooled + rest, wins, limits=(0, 1), even=0.5),
        draw_lines(
            "npc_shares", "Who was played", f"Share of the ended episodes, pooled.{rest}", shares, limits=(0, 1)
        ),
    ]


def _returns(run: Run) -> list[Plot | None]:
    lines = [metric_line(run, name, who, color) for name, (who, color) in RETURNS.items()]
    totals = [metric_line(run, f"{name}_total", who, color) for name, (who, color) in RETURNS.items()]
    counts = [
        metric_line(run, f"dual_policy/{key}_agent_count", who, color)
        for key, who, color in (("policy_a", "learner", LEARNER), ("npc", "NPC", NPC))
    ]
    is_changing = any(len(line.values) and np.ptp(line.values) > 0 for line in counts)
    mean = "Summed reward of an episode, mean over the agents of each side; episodes pooled as for the win rate."
    total = "The same, as a sum over them."
    return [
        draw_lines("returns", "Return per agent", mean, lines),
        draw_lines("return_totals", "Return per side", total, totals),
        draw_lines("agent_counts", "Agents", "Of an env, by who acts for them.", counts) if is_changing else None,
    ]


def _counter(run: Run, name: str) -> Plot | None:
    sides = (("policy_a", "learner", LEARNER), ("npc", "NPC", NPC))
    lines = [metric_line(run, f"env/{key}/{name}", who, color) for key, who, color in sides]
    return draw_lines(_file(f"env_{name}"), name, "", lines, is_small=True)


def _evaluations(run: Run) -> Plot | None:
    """`evals/<opponent>/*` lines, and behind them what result.json has."""
    names = [found[1] for name in run.metrics.names if (found := re.fullmatch(r"evals/(.+)/win_rate", name))]
    final = {match.opponent: match for match in run.evals}
    lines = []
    for k, name in enumerate(names[:MAX_CURVES]):
        columns = [run.steps, *(run.metrics.column(f"evals/{name}/{part}") for part in ("win_rate", "low", "high"))]
        points = np.stack(columns)[:, np.isfinite(np.stack(columns)).all(axis=0)]
        points = points[:, _spread(points.shape[1])]
        if name in final and run.evals_step is not None:
            end = final[name]
            points = np.append(points, [[run.evals_step], [end.win_rate], [end.low], [end.high]], axis=1)
            points = points[:, np.argsort(points[0], kind="stable")]  # the run may have gone on since
        steps, values, low, high = points
        lines.append(Line(label=name, steps=steps, values=values, band=(low, high), color=k, is_dotted=True))
    rest = f" The first {MAX_CURVES} of {len(names)} opponents." if len(names) > MAX_CURVES else ""
    what = f"Games on fixed seeds, both seatings, with their 95 % intervals (see evals.episodes).{rest}"
    return draw_lines("evaluations", "Win rate in evaluations", what, lines, limits=(0, 1), even=0.5)


def _spread(count: int, at_most: int = 100) -> list[int]:
    """Evaluations that are drawn, each a measurement of its own; of many every so many-th, and the newest."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, at_most))})


def _rates(run: Run) -> list[Plot | None]:
    rates = [metric_line(run, name, label, color) for name, (label, color) in RATES.items()]
    laps = [metric_line(run, name, label, color) for name, (label, color) in LAPS.items()]
    cost = [metric_line(run, COST, "cost", LEARNER)]
    weighed = "Of all envs; env-agent steps count the NPC's agents too."
    return [
        draw_lines("rates", "Steps per second", weighed, rates),
        draw_lines("laps", "Seconds per iteration", "Filling the segments, and the updates that follow.", laps),
        draw_lines("cost", "Cost", "Dollars since the run began, over all restarts.", cost),
    ]


def _others(run: Run) -> Section:
    """Metrics that this page has no place for: drawn where they are few, else named."""
    known = {*LOSSES}
    names = [name for name in run.metrics.names if name not in known and not re.fullmatch(_SHOWN, name)]
    plots = [
        draw_lines(_file(f"other_{name}"), name, "", [metric_line(run, name, name, BOTH)], is_small=True)
        for name in names[:MAX_OTHERS]
    ]
    said = [("Not drawn: ", names[MAX_OTHERS:]), ("No numbers, and not drawn: ", run.metrics.not_numbers)]
    blocks = [paragraph(what + ", ".join(these[:50])) for what, these in said if these]
    return Section(anchor="other", title="Other", plots=plots, blocks=blocks)


def _file(name: str) -> str:
    """A metric's name as that of a file."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name.partition("/")[2] if "/" in name else name)[:80].strip("_") or "metric"
