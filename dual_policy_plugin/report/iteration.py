"""The figures of one iteration: what depends on the run alone, and what depends on the clock.

Takes counters, losses and episode sums; gives the two dicts that RunLog writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin.errors import DivergedError
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.ranks.distributed import Ranks, sum_over_ranks
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.run_state import Counters
from dual_policy_plugin.types import EnvSpec


def iteration_figures(
    counters: Counters,
    learning_rate: float,
    losses: dict[str, Tensor],
    metrics: EpisodeMetrics,
    experience: Experience,
    spec: EnvSpec,
    ranks: Ranks,
) -> tuple[dict[str, float], Tensor]:
    """Counts the iteration. All numbers leave the device in one transfer, the iteration's only.

    Returns:
        The iteration's metrics by name; the episodes' sums of all ranks, (num_npcs, num_fields) as EpisodeMetrics has
        them, on the host.

    Raises:
        DivergedError: a loss, the gradient, the weights or a reward is not finite, on every rank.
    """
    sums, num_losses = metrics.take_sums(ranks), len(losses)
    weights = experience.weights
    steps = sums.new_full((), experience.actions.numel()) if weights is None else weights.sum(dtype=torch.float64)
    # one reduction: learner steps, and a sum that shows whether any reward of a running episode is not finite
    totals = sum_over_ranks(torch.stack([steps, metrics.returns.sum()]), ranks)
    numbers = torch.cat([torch.stack(list(losses.values())).double(), totals, sums.flatten()]).cpu()
    counters.add_iteration(
        int(numbers[num_losses]), experience.horizon * spec.num_envs * spec.num_agents * ranks.world_size
    )
    values = numbers[:num_losses].tolist()
    sums = numbers[num_losses + 2 :].view(sums.shape)
    charts = {
        "charts/agent_step": float(counters.agent_step),
        "charts/env_agent_step": float(counters.env_agent_step),
        "charts/epoch": float(counters.iteration),
        "charts/learning_rate": learning_rate,
    }
    of_update = {f"losses/{name}": value for name, value in zip(losses, values, strict=True)}
    of_env = metrics.figures(sums)
    _check_finite(counters.iteration, of_update, {"reward": float(numbers[num_losses + 1]), **of_env})
    return {**charts, **of_update, **of_env}, sums


def _check_finite(iteration: int, of_update: dict[str, float], of_env: dict[str, float]) -> None:
    """Raises a DivergedError where a figure of the update or of the env is not finite."""
    from_env = [name for name, value in of_env.items() if not math.isfinite(value)]
    broken = from_env + [name for name, value in of_update.items() if not math.isfinite(value)]
    if not broken:
        return
    mend = "mend the env's rewards, then" if from_env else "lower trainer.learning_rate, and"
    raise DivergedError(
        f"iteration {iteration}: {', '.join(broken[:6])} {'is' if len(broken) == 1 else 'are'} not finite; the last "
        f"checkpoint is healthy: {mend} begin a new run from it with trainer.initial_policy.uri="
    )


class Laps:
    """Times the rollout and the update of an iteration on the device that runs them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []  # events, or seconds of the host's clock

    def mark(self) -> None:
        """Ends a lap and begins the next; on CUDA nothing waits for it."""
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def take(self) -> list[float]:
        """The laps since the last call, in seconds; on CUDA after the host has waited for the device."""
        marks, self._marks = self._marks, []
        if self._is_cuda:
            marks[-1].synchronize()
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]
        return [second - first for first, second in pairwise(marks)]


def iteration_rates(experience: Experience, spec: EnvSpec, ranks: Ranks, laps: Laps) -> dict[str, float]:
    """Rates of the iteration whose rollout and update are in `laps`."""
    rollout_s, update_s = laps.take()
    steps_per_s = experience.horizon * ranks.world_size / (rollout_s + update_s)
    return {
        "charts/learner_SPS": steps_per_s * experience.num_rows,
        "charts/env_agent_SPS": steps_per_s * spec.num_envs * spec.num_agents,
        "timing/rollout_s": rollout_s,
        "timing/update_s": update_s,
    }


class RunClock:
    """Wall-clock seconds and cost of a run over all its restarts; neither ever falls.

    They stand in timing.jsonl, which nothing cuts back, and not in the run's state: what a killed run has to do again
    took its time too.
    """

    def __init__(self, hourly_cost: float | None, ranks: Ranks) -> None:
        """Args: hourly_cost: of one machine now; a restart may be on a machine with another price."""
        self._hourly = None if hourly_cost is None else hourly_cost * ranks.num_machines
        self._since = time.perf_counter()
        self._elapsed_s = self._accrued = 0.0
        self._start: dict[str, float] = {}

    def go_on(self, last: Mapping[str, float], iteration: int) -> int:
        """Continues from the newest line of timing.jsonl; {} in a new run.

        Returns:
            How often the run has been begun after `iteration`, this time included: more often than once where it ended
            before it saved a later state.
        """
        self._elapsed_s = last.get("timing/elapsed_s", 0.0)
        self._accrued = last.get("cost/accrued_total", 0.0)
        before = last.get("timing/starts", 0) if last.get("timing/from_iteration") == iteration else 0
        self._start = {"timing/from_iteration": iteration, "timing/starts": before + 1}
        return int(before) + 1

    def read(self) -> dict[str, float]:
        """The totals up to now, by name."""
        now = time.perf_counter()
        passed_s, self._since = now - self._since, now
        self._elapsed_s += passed_s
        totals = {"timing/elapsed_s": self._elapsed_s, **self._start}
        if self._hourly is not None:
            self._accrued += self._hourly * passed_s / 3600
            totals |= {"cost/hourly_total": self._hourly, "cost/accrued_total": self._accrued}
        return totals


def add_to_score(counters: Counters, figures: dict[str, float], name: str) -> None:
    """Adds an iteration to the score of the next checkpoint, weighed by its episodes.

    Args:
        counters: of the run; they keep the sums.
        figures: of the iteration.
        name: of the metric that chooses `best`; an iteration without it adds nothing.
    """
    if name in figures:
        weight = figures.get("dual_policy/episodes", 1.0)
        counters.score_sum += weight * figures[name]
        counters.score_weight += weight


def take_score(counters: Counters) -> float | None:
    """The mean of the metric over the iterations since it was last taken; None where the metric did not occur."""
    score = counters.score_sum / counters.score_weight if counters.score_weight else None
    counters.score_sum = counters.score_weight = 0.0
    return score
