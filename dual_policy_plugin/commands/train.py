"""`dual-policy train`: a Hydra app over `configs/`, for one run or for the jobs of a sweep.

dual-policy train [key=value ...]      `-m` sweeps, `--dry-run` shows a curriculum
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dual_policy_plugin.commands.console import (
    ONE_LINE,
    configure_logging,
    forget_shown,
    is_shown,
    mark_shown,
    show_error,
)
from dual_policy_plugin.commands.words import parse_words
from dual_policy_plugin.errors import EXIT_AGAIN, ConfigError, DualPolicyError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dual_policy_plugin.config import Config

_SWEEP_FLAGS = {"-m", "--multirun"}
_MANY_JOBS = 50  # to compose them takes seconds, a tenth of one for each


def run(words: list[str]) -> int:
    """Composes the config and trains, once or, with -m, for every job of a sweep."""
    import hydra
    from hydra._internal.utils import get_args_parser

    from dual_policy_plugin.hydra_app.mends import mend
    from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR, PRIMARY_CONFIG, count_jobs
    from dual_policy_plugin.slurm.errors import explain

    if "--info" not in words:  # Hydra prints it through a logger of its own
        configure_logging()
    is_dry = "--dry-run" in words
    parser = get_args_parser()
    parser.prog = "dual-policy train"
    parser.add_argument("--dry-run", action="store_true", help="Show the stages of a curriculum")
    flags, overrides = _split_flags([word for word in words if word != "--dry-run"], parser)
    if is_dry:
        overrides += ["hydra.mode=MULTIRUN", "hydra.sweeper.dry_run=true"]
    forget_shown()
    if (num_jobs := count_jobs(overrides)) > _MANY_JOBS:
        logging.getLogger(__name__).info(
            "preparing %d jobs: Hydra composes each once before the first starts", num_jobs
        )
    app = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=PRIMARY_CONFIG)(_train_job)
    try:
        with _as_hydra_program([*flags, *overrides]), _watched_jobs():
            if flags and set(flags) <= _SWEEP_FLAGS:
                from dual_policy_plugin.commands.grid import check_grid  # takes torch, which --help and --cfg do not

                check_grid(overrides)
            app()
    except DualPolicyError:
        raise
    except SystemExit as leaving:  # --help, --cfg and the like
        return leaving.code if isinstance(leaving.code, int) else 0
    except Exception as error:
        line = None if is_shown(error) else explain(error) or mend(error, overrides)
        if line is None:
            raise
        raise line from error
    return 0


def _train_job(cfg: DictConfig) -> float | None:
    """One job: checks the config, trains, and gives the objective to whatever sweeps; None where there is none."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from dual_policy_plugin.hydra_app.interpolation import config_text, hide_variables, keep_requested
    from dual_policy_plugin.run.lock import check_unlocked, is_slurm_job
    from dual_policy_plugin.slurm.errors import job_error

    hydra = HydraConfig.get()
    is_sweep = hydra.mode == RunMode.MULTIRUN
    told: Any = OmegaConf.to_container(hydra.job, resolve=False)  # without what its variables hold
    job = f"job {hydra.job.num} ({told['override_dirname']}): " if is_sweep else ""
    try:
        configure_logging()  # a launcher may have started us in a process of its own
        if commit := os.environ.get("DUAL_POLICY_COMMIT"):
            logging.getLogger(__name__).info("code: commit %s", commit)
        cfg = keep_requested(cfg)
        config = _load_job_config(cfg, hydra.job.num if is_sweep else None)
        if is_slurm_job():
            check_unlocked(config.train_dir / config.run)  # on each rank: together they could wait for an hour only
        from dual_policy_plugin.train import train

        objective = train(config, resolved_yaml=config_text(cfg)).get("objective")
        return None if objective is None else float(objective)  # no NaN: Optuna's sweeper would end the study
    except DualPolicyError as error:
        hide_variables(error, cfg)
        show_error(error, job)
        mark_shown(error)
        with contextlib.suppress(OSError):
            Path(hydra.runtime.output_dir).rmdir()  # Hydra made it; it stays where anything stands in it
        if is_sweep and error.exit_code == EXIT_AGAIN and is_slurm_job():
            from dual_policy_plugin.slurm.requeue import requeue_job

            if requeue_job():  # who waits for the job is not to have a result of it
                raise SystemExit(EXIT_AGAIN) from error
        raise
    except Exception as error:
        hide_variables(error, cfg)
        line = job_error(error)
        if line is not None:  # whoever waits for this process gets the line, its log has the rest
            traceback.print_exc()
            show_error(line, job)
            raise line from error
        mark_shown(error)  # ours to mend, not the user's: `run` lets it pass
        raise


def _load_job_config(cfg: DictConfig, job_num: int | None) -> Config:
    import dataclasses

    from hydra.core.hydra_config import HydraConfig

    from dual_policy_plugin.hydra_app.composition import refuse_masked_choices
    from dual_policy_plugin.hydra_app.loading import load_config

    refuse_masked_choices()
    if job_num is None and HydraConfig.get().sweeper.get("ladder") is not None:
        raise ConfigError("hydra.sweeper.ladder is set, but one run walks through no stages; add -m")
    launcher = HydraConfig.get().runtime.choices.get("hydra/launcher")
    if job_num is None and launcher != "basic":
        raise ConfigError(f"hydra/launcher={launcher} starts the jobs of a sweep, of one job too; add -m")
    config = load_config(cfg)
    return config if job_num is None else dataclasses.replace(config, run=f"{config.run}/{job_num}")


def _split_flags(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Hydra's flags and the overrides, apart: so a flag may stand anywhere (`run=x -m seed=1,2`)."""
    if "--version" in words:
        return ["--version"], []
    hint = "overrides are written without dashes, for example trainer.horizon=32"
    args = parse_words(parser, words, hint, is_mixed=True)
    if args.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun would unpickle a file; run the command again with its overrides")
    flags = list(words)
    for override in args.overrides:
        flags.remove(override)
    from dual_policy_plugin.hydra_app.overrides import keep_run_names

    return flags, keep_run_names(args.overrides)


def _watched_jobs() -> contextlib.AbstractContextManager[None]:
    if shutil.which("squeue") is None:
        return contextlib.nullcontext()
    try:
        from dual_policy_plugin.slurm.states import watched_jobs
    except ImportError:  # submitit is not installed
        return contextlib.nullcontext()
    return watched_jobs()


@contextlib.contextmanager
def _as_hydra_program(words: list[str]) -> Iterator[None]:
    """Lets hydra.main read `words`, hand its exceptions to us, and say nothing of its own about them.

    Nothing of the program that it was stays: a second one in this process begins where that one was started.
    """
    from hydra.core.hydra_config import HydraConfig

    old_config = HydraConfig.instance().cfg
    old_argv, old_environ, old_stderr = sys.argv, dict(os.environ), sys.stderr
    sys.argv = ["dual-policy train", *words]
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        os.environ |= {"HYDRA_FULL_ERROR": "1", ONE_LINE: "1"}
    sys.stderr = _WithoutTheirLines(old_stderr)
    try:
        yield
    finally:
        sys.argv, sys.stderr = old_argv, old_stderr
        HydraConfig.instance().cfg = old_config
        for name in ("HYDRA_FULL_ERROR", ONE_LINE):
            if name in old_environ:
                os.environ[name] = old_environ[name]
            else:
                os.environ.pop(name, None)


class _WithoutTheirLines:
    """stderr without Hydra's line about a failed job and sbatch's about a refused one: ours has that, and the mend."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_cut = False  # the last text was dropped, and its line's end is to follow

    def write(self, text: str) -> int:
        is_end, self._is_cut = self._is_cut and text == "\n", False
        if text.startswith(("Error executing job with overrides:", "sbatch: error:")):
            self._is_cut = not text.endswith("\n")
        elif not is_end:
            return self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
