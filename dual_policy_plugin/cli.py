"""The `dual-policy` command: which subcommand runs, and how its errors reach the user.

    dual-policy train [key=value ...]      a Hydra app over `configs/`; `-m` sweeps, `--dry-run` shows a curriculum
    dual-policy import OLD.pt NEW.safetensors
    dual-policy demo
    dual-policy npc {resolve,inspect,lock,cache} ...
    dual-policy runs                       the runs of a W&B project and what they published
    dual-policy evaluate policies=[URI,...]
    dual-policy gate NEW --not-weaker-than OLD
    dual-policy curriculum status DIR      the stages, jobs and decisions of a curriculum sweep
    dual-policy launch {sky TASK,slurm}    a run on other machines, checked and pinned before anything is launched
    dual-policy watch -- COMMAND...        a command under a heartbeat and a limit of its time, for launchers

A mistake of the user ends with one line on stderr and exit code 2; a defect of ours keeps its traceback. Heavy modules
are imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dual_policy_plugin import __version__
from dual_policy_plugin.commands.words import choose_command, parse_words
from dual_policy_plugin.errors import EXIT_AGAIN, ConfigError, DualPolicyError
from dual_policy_plugin.heartbeat import note_exit

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dual_policy_plugin.config import Config

_ONE_LINE = "DUAL_POLICY_ONE_LINE"  # set where HYDRA_FULL_ERROR=1 is our wish and not the user's

_MANY_JOBS = 50  # to compose them takes seconds, a tenth of one for each

_shown: list[BaseException] = []  # errors of jobs whose line is already on stderr


def main(argv: list[str] | None = None) -> int:
    """Runs `dual-policy` with `argv` (the words behind the program's name) and returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    # Read when torch is imported. A waiting thread spins for microseconds, not milliseconds, before it sleeps: on cores
    # that are shared it would keep the thread it waits for from running, ten times slower in all (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return _dispatch(words)
    except DualPolicyError as error:
        if error not in _shown:
            show_error(error)
        note_exit(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        again = "; the same command continues the run from where it was stopped" if words[:1] == ["train"] else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130


def show_error(error: DualPolicyError, job: str = "") -> None:
    """Prints the one line of a user's error to stderr; with HYDRA_FULL_ERROR=1 or LOG_LEVEL=DEBUG its traceback too."""
    is_full = os.environ.get("HYDRA_FULL_ERROR") == "1" and _ONE_LINE not in os.environ
    if is_full or os.environ.get("LOG_LEVEL", "").upper() == "DEBUG":
        traceback.print_exception(error)
    print(f"error: {job}{error}", file=sys.stderr, flush=True)


def configure_logging() -> None:
    """Sends log lines to stderr from the level that LOG_LEVEL names (INFO).

    Raises:
        ConfigError: LOG_LEVEL names no level.
    """
    name = os.environ.get("LOG_LEVEL") or "INFO"
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        raise ConfigError(f"LOG_LEVEL={name} is no log level; use DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(levels[name.upper()])


def run_train(words: list[str]) -> int:
    """`dual-policy train`: composes the config and trains, once or, with -m, for every job of a sweep."""
    import hydra
    from hydra._internal.utils import get_args_parser

    from dual_policy_plugin.composition import CONFIG_DIR, PRIMARY_CONFIG, count_jobs, mend
    from dual_policy_plugin.slurm.errors import explain

    if "--info" not in words:  # Hydra prints it through a logger of its own
        configure_logging()
    is_dry = "--dry-run" in words
    flags, overrides = _split_flags([word for word in words if word != "--dry-run"], get_args_parser())
    if is_dry:
        overrides += ["hydra.mode=MULTIRUN", "hydra.sweeper.dry_run=true"]
    _shown.clear()
    if (num_jobs := count_jobs(overrides)) > _MANY_JOBS:
        logging.getLogger(__name__).info(
            "preparing %d jobs: Hydra composes each once before the first starts", num_jobs
        )
    app = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=PRIMARY_CONFIG)(_train_job)
    try:
        with _as_hydra_program([*flags, *overrides]), _watched_jobs():
            app()
    except DualPolicyError:
        raise
    except SystemExit as leaving:  # --help, --cfg and the like
        return leaving.code if isinstance(leaving.code, int) else 0
    except Exception as error:
        line = None if error in _shown else explain(error) or mend(error, overrides)
        if line is None:
            raise
        raise line from error
    return 0


def run_import(words: list[str]) -> int:
    """`dual-policy import`: turns a .pt file with a state dict into a policy file of ours."""
    parser = argparse.ArgumentParser(
        prog="dual-policy import",
        description="Turns a .pt file that holds a state dict into a policy file (.safetensors).",
        epilog="Overrides describe env and net as in `dual-policy train`, for example env.num_agents=8 agent=mlp.",
    )
    parser.add_argument("old", type=Path, metavar="OLD.pt")
    parser.add_argument("new", type=Path, metavar="NEW.safetensors")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--agent", default="fast", help="architecture of the state dict (fast)")
    parser.add_argument("--env", default="arena", help="env whose observations and actions it was made for (arena)")
    args = parse_words(parser, words)

    import torch

    from dual_policy_plugin.composition import compose_config
    from dual_policy_plugin.envs.build import make_env
    from dual_policy_plugin.policies.loading import import_policy

    config, _ = compose_config([f"env={args.env}", f"agent={args.agent}", "env.num_envs=1", *args.overrides])
    env = make_env(config.env, device=torch.device("cpu"), num_workers=1)
    try:
        space, actions = env.spec.observation_space, env.spec.actions
    finally:
        env.close()
    import_policy(
        args.old, args.new, agent=config.agent.name, args=config.agent.args, observation_space=space, actions=actions
    )
    print(f"{args.new}: imported from {args.old} as agent {config.agent.name} for env {config.env.name}")
    return 0


def run_demo(words: list[str]) -> int:
    """`dual-policy demo`: trains against a built-in NPC for a minute and measures the win rate."""
    parser = argparse.ArgumentParser(prog="dual-policy demo", description="Trains against builtin://arena/medium.")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--train-dir", type=Path, default=Path("train_dir"), help="where runs stand (train_dir)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `dual-policy train`")
    args = parse_words(parser, words)
    configure_logging()

    from dual_policy_plugin.demo import demo

    return demo(args.seed, args.train_dir, args.overrides)


def run_npc(words: list[str]) -> int:
    """`dual-policy npc`: what a URI or a selector names, what a policy file holds, locks and the cache."""
    configure_logging()

    from dual_policy_plugin.commands.npc import run

    return run(words)


def run_runs(words: list[str]) -> int:
    """`dual-policy runs`: the runs of a W&B project and the URIs of what they published."""
    configure_logging()

    from dual_policy_plugin.commands.runs import run

    return run(words)


def run_curriculum(words: list[str]) -> int:
    """`dual-policy curriculum`: how far a curriculum sweep is, and why."""
    from dual_policy_plugin.commands.curriculum import run

    return run(words)


def run_evaluate(words: list[str]) -> int:
    """`dual-policy evaluate`: every policy against every other, with ratings."""
    configure_logging()

    from dual_policy_plugin.commands.evaluate import run

    return run(words)


def run_gate(words: list[str]) -> int:
    """`dual-policy gate`: exit code 0 where a policy is not weaker than another."""
    configure_logging()

    from dual_policy_plugin.commands.gate import run

    return run(words)


def run_launch(words: list[str]) -> int:
    """`dual-policy launch`: a run on other machines, checked and pinned before anything is launched."""
    from dual_policy_plugin.commands.launch import run

    return run(words, main)


def run_watch(words: list[str]) -> int:
    """`dual-policy watch`: a command under a heartbeat and a limit of its time."""
    from dual_policy_plugin.commands.watch import run

    return run(words)


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (run_train, "train a policy against a frozen one; takes Hydra overrides"),
    "import": (run_import, "turn a .pt state dict into a policy file"),
    "demo": (run_demo, "train against a built-in NPC for a minute and report the win rate"),
    "npc": (run_npc, "find, pin and look at policies; the cache of those that were fetched"),
    "runs": (run_runs, "list the runs of a W&B project and the URIs of what they published"),
    "evaluate": (run_evaluate, "play policies against each other: win rates, ratings, worst cases, cycles"),
    "gate": (run_gate, "exit code 0 where a policy is not weaker than another, by a sequential test"),
    "curriculum": (run_curriculum, "the stages, jobs and decisions of a curriculum sweep"),
    "launch": (run_launch, "check a run, pin its policies, and launch it with SkyPilot or Slurm"),
    "watch": (run_watch, "run a command that must show signs of life and may take so long; for launchers"),
}


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"dual-policy {__version__}")
        return 0
    command = choose_command("dual-policy", words, _COMMANDS, note=" `dual-policy --version` prints the version.")
    return command(words[1:]) if command else 0


def _train_job(cfg: DictConfig) -> float:
    """One job: checks the config, trains, and gives the objective to whatever sweeps."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from dual_policy_plugin.interpolation import config_text, hide_variables, keep_requested
    from dual_policy_plugin.run_lock import check_unlocked
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
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            check_unlocked(config.train_dir / config.run)  # on each rank: together they could wait for an hour only
        from dual_policy_plugin.train import train

        objective = train(config, resolved_yaml=config_text(cfg)).get("objective")
        return math.nan if objective is None else float(objective)  # no objective: another rank has the result
    except DualPolicyError as error:
        hide_variables(error, cfg)
        show_error(error, job)
        _shown.append(error)
        with contextlib.suppress(OSError):
            Path(hydra.runtime.output_dir).rmdir()  # Hydra made it; it stays where anything stands in it
        if is_sweep and error.exit_code == EXIT_AGAIN and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
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
        _shown.append(error)  # ours to mend, not the user's: run_train lets it pass
        raise


def _load_job_config(cfg: DictConfig, job_num: int | None) -> Config:
    import dataclasses

    from hydra.core.hydra_config import HydraConfig

    from dual_policy_plugin.composition import refuse_masked_choices
    from dual_policy_plugin.config_loading import load_config

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
    from dual_policy_plugin.composition import keep_run_names

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
        os.environ |= {"HYDRA_FULL_ERROR": "1", _ONE_LINE: "1"}
    sys.stderr = _WithoutTheirLines(old_stderr)
    try:
        yield
    finally:
        sys.argv, sys.stderr = old_argv, old_stderr
        HydraConfig.instance().cfg = old_config
        for name in ("HYDRA_FULL_ERROR", _ONE_LINE):
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
