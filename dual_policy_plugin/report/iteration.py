"""The figures of one iteration: what depends on the run alone, and what depends on the clock.

Takes counters, losses and episode sums; gives the two dicts that RunLog writes.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from dual_policy_plugin.config import Config
from dual_policy_plugin.distributed import Ranks
from dual_policy_plugin.errors import DivergedError
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.run_state import Counters
from dual_policy_plugin.types import EnvSpec


def iteration_figures(
    counters: Counters, learning_rate: float, losses: dict[str, Tensor], episodes: dict[str, float]
) -> dict[str, float]:
    """One iteration's metrics; the losses leave the device in one transfer.

    Raises:
        DivergedError: a loss or the gradient is not finite.
    """
    values = torch.stack(list(losses.values())).tolist()
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
    return {**charts, **figures, **episodes}


def iteration_timing(
    config: Config,
    counters: Counters,
    experience: Experience,
    spec: EnvSpec,
    ranks: Ranks,
    started: float,
    collected: float,
) -> dict[str, float]:
    """Rates and costs of the iteration that began at `started` and whose rollout ended at `collected` (seconds)."""
    finished = time.perf_counter()
    steps_per_s = experience.horizon * ranks.world_size / (finished - started)
    timing = {
        "charts/learner_SPS": steps_per_s * experience.num_rows,
        "charts/env_agent_SPS": steps_per_s * spec.num_envs * spec.num_agents,
        "timing/rollout_s": collected - started,
        "timing/update_s": finished - collected,
    }
    if config.hourly_cost is not None:
        timing["cost/hourly_total"] = config.hourly_cost * ranks.num_machines
        timing["cost/accrued_total"] = timing["cost/hourly_total"] * counters.elapsed_s / 3600
    return timing


class Score:
    """The mean of the metric that chooses `best`, over the iterations since it was last taken."""

    def __init__(self, name: str) -> None:
        self.name, self.total, self.weight = name, 0.0, 0.0

    def add(self, figures: dict[str, float]) -> None:
        """Adds an iteration in which the metric exists, weighed by its episodes."""
        if self.name in figures:
            weight = figures.get("dual_policy/episodes", 1.0)
            self.total, self.weight = self.total + weight * figures[self.name], self.weight + weight

    def take(self) -> float | None:
        """The mean, None where the metric did not occur."""
        score = self.total / self.weight if self.weight else None
        self.total = self.weight = 0.0
        return score
