"""Where figures and checkpoints go: the run directory, the panel, TensorBoard, W&B, S3. Only the first rank has one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from dual_policy_plugin.config import Config
from dual_policy_plugin.evaluation.matches import eval_metrics
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.publishing import Publisher, s3_destination
from dual_policy_plugin.report.loggers import WandbLogger
from dual_policy_plugin.report.page.write import write_own_report
from dual_policy_plugin.report.progress import Progress
from dual_policy_plugin.report.tensorboard import TensorBoardLogger
from dual_policy_plugin.run.directory import RunDirectory


class RunLog:
    """The outlets of one run; a context manager around the training loop."""

    def __init__(self, run: RunDirectory, config: Config, pinned: list[PinnedPolicy]) -> None:
        self._run, self._has_report = run, config.report
        s3 = [s3_destination(uri, config.run)] if (uri := config.trainer.publish_uri) is not None else []
        self._board = TensorBoardLogger.open(run, pinned, is_on=config.tensorboard)
        with ExitStack() as begun:  # what is to be ended where a later one cannot begin
            begun.callback(self._board.close)
            self._wandb = WandbLogger.open(config.wandb, run, name=config.run, run_config=run.config())
            begun.callback(self._wandb.finish, exit_code=1)
            wandb = self._wandb.destination(config.run)
            self._publisher = Publisher.open(run, s3 if wandb is None else [wandb, *s3])
            begun.pop_all()
        self._progress = Progress(
            config.run,
            config.trainer.total_timesteps,
            npc=pinned[0].requested if pinned else None,
            digest=pinned[0].sha256 if pinned else None,
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self._publisher.close()
        self._board.close()
        self._wandb.finish(exit_code=int(kind is not None))

    def record(self, iteration: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Writes one iteration's figures: `metrics` depend on the run alone, `timing` on the clock."""
        self._run.append_metrics({"iteration": iteration, **metrics})
        self._run.append_timing({"iteration": iteration, **timing})
        step = int(metrics["charts/agent_step"])
        self._board.log({**metrics, **timing}, step)
        self._wandb.log({**metrics, **timing}, step)

    def show(
        self, iteration: int, metrics: Mapping[str, float], timing: Mapping[str, float], checkpoint: str | None
    ) -> None:
        """Shows one iteration, and the checkpoint that was made after it, to whoever watches."""
        self._progress.update(iteration, metrics, timing, checkpoint=checkpoint)
        if checkpoint is not None:
            self._publisher.advance(iteration)

    def message(self, text: str) -> None:
        """Says something to whoever watches."""
        self._progress.message(text)

    def result(self, result: Mapping[str, Any]) -> None:
        """Writes the run's result and report, says what it came to, and waits until every file is where it belongs.

        Raises:
            RunError: a checkpoint could not be published, or a file mirrored; the run itself is complete.
        """
        self._run.write_result(result)
        self._board.log(eval_metrics(result["evals"]), result["agent_step"])
        for match in result["evals"]:
            self.message(
                f"win rate against {match['opponent']} {match['win_rate']:.3f} "
                f"[{match['low']:.3f}, {match['high']:.3f}] over {match['episodes']} episodes"
            )
        self.message(f"result: {self._run.path / 'result.json'}")
        if self._has_report:
            self.message(write_own_report(self._run.path))
        try:
            self._publisher.finish()
        finally:
            self._wandb.finish(result)
        if self._run.mirror is not None:
            self._run.mirror.finish()
