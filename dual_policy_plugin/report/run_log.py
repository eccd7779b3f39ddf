"""Where a run's figures go: the run directory's files, the panel and W&B. Only the first rank has one that writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dual_policy_plugin.report.loggers import WandbLogger
from dual_policy_plugin.report.progress import Progress
from dual_policy_plugin.run_directory import RunDirectory


@dataclass(kw_only=True, slots=True, frozen=True)
class RunLog:
    """The outlets of one run."""

    run: RunDirectory
    progress: Progress
    wandb: WandbLogger

    def iteration(
        self, iteration: int, metrics: Mapping[str, float], timing: Mapping[str, float], checkpoint: str | None
    ) -> None:
        """Writes one iteration's figures: `metrics` depend on the run alone, `timing` on the clock."""
        self.run.append_metrics({"iteration": iteration, **metrics})
        self.run.append_timing({"iteration": iteration, **timing})
        self.wandb.log({**metrics, **timing}, int(metrics["charts/agent_step"]))
        self.progress.update(iteration, metrics, timing, checkpoint=checkpoint)

    def result(self, result: Mapping[str, Any]) -> None:
        """Writes the run's result."""
        self.run.write_result(result)
        self.wandb.finish(result)
