"""The figures of one iteration: what depends on the run alone, and what depends on the clock.

Takes counters, losses and episode sums; gives the two dicts that RunLog writes.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin.config import Config
from dual_policy_plugin.distributed import Ranks, sum_over_ranks
from dual_policy_plugin.errors import DivergedError
from dual_policy_plugin.experience import Experience
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
        DivergedError: a loss or the gradient is not finite.
    """
    sums, num_losses = metrics.take_sums(ranks), len(losses)
    weights = experience.weights
    steps = sums.new_full((), experience.actions.numel()) if weights is None else weights.sum(dtype=torch.float64)
    steps = sum_over_ranks(steps, ranks)
    numbers = torch.cat([torch.stack(list(losses.values())).double(), steps.view(1), sums.flatten()]).cpu()
    counters.add_iteration(
        int(numbers[num_losses]), experience.horizon * spec.num_envs * spec.num_agents * ranks.world_size
    )
    values = numbers[:num_losses].tolist()
    figures = {f"losses/{name}": value for name, value in zip(losses, values, strict=True)}
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    if broken:
        raise DivergedError(
            f"iteration {counters.iteration}: {', '.join(broken)} is not finite; the last checkpoint is healthy: "
            "continue from it as trainer.initial_policy with a lower trainer.learning_rate"
        )
    charts = {
        "charts/agent_step": float(counters.agent_step),
        "charts/env_agent_step": float(counters.env_agent_step),
        "charts/epoch": float(counters.iteration),
        "charts/learning_rate": learning_rate,
    }
    sums = numbers[num_losses + 1 :].view(sums.shape)
    return {**charts, **figures, **metrics.figures(sums)}, sums


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


def iteration_timing(
    config: Config, counters: Counters, experience: Experience, spec: EnvSpec, ranks: Ranks, laps: Laps
) -> dict[str, float]:
    """Rates and costs of the iteration whose rollout and update are in `laps`."""
    rollout_s, update_s = laps.take()
    steps_per_s = experience.horizon * ranks.world_size / (rollout_s + update_s)
    timing = {
        "charts/learner_SPS": steps_per_s * experience.num_rows,
        "charts/env_agent_SPS": steps_per_s * spec.num_envs * spec.num_agents,
        "timing/rollout_s": rollout_s,
        "timing/update_s": update_s,
    }
    if config.hourly_cost is not None:
        timing["cost/hourly_total"] = config.hourly_cost * ranks.num_machines
        timing["cost/accrued_total"] = timing["cost/hourly_total"] * counters.elapsed_s / 3600
    return timing


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
