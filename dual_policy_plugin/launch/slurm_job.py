"""One run as one job of Slurm's: what Slurm is asked for, the script, and what runs on the node.

Settings are those of the Hydra launcher (`configs/hydra/launcher/dual_policy_slurm.yaml`), and so is what happens to a
job that is preempted or out of time: it saves, queues again under its number, and goes on in its run directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import EXIT_AGAIN, LaunchError
from dual_policy_plugin.files import publish
from dual_policy_plugin.hydra_app.composition import compose_hydra_node
from dual_policy_plugin.hydra_app.overrides import keep_run_names, text_override
from dual_policy_plugin.launch.checkout import COMMIT_VARIABLE
from dual_policy_plugin.launch.preflight import LOCK_KEY, Preflight, lock_bytes, lock_name
from dual_policy_plugin.slurm.errors import explain, no_slurm
from dual_policy_plugin.slurm.requeue import requeue_job

PRESET, GPU_PRESET = "dual_policy_slurm", "dual_policy_slurm_gpu"
_WITHOUT_PREFIX = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout",
)  # fmt: skip
"""Settings that submitit has for every kind of cluster; the others are Slurm's."""
_ASKED_FOR = ("partition", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")
_TIMEOUT_S = 20


class TrainJob:
    """What runs on the node: the command line that was launched, begun again after every requeue."""

    def __init__(self, main: Callable[[list[str]], int], words: Sequence[str], commit: str = "") -> None:
        """Keeps the command line.

        Args:
            main: the `dual-policy` command, a function at the top of a module.
            words: all of its words.
            commit: the code, for the run's log.
        """
        self.main, self.words, self.commit = main, tuple(words), commit

    def __call__(self) -> None:
        """Trains; the process ends with the run's own exit code, and on 75 the job is queued again."""
        if self.commit:
            os.environ[COMMIT_VARIABLE] = self.commit
        exit_code = self.main(list(self.words))
        if exit_code == EXIT_AGAIN:
            requeue_job()
        if exit_code:
            sys.exit(exit_code)

    def checkpoint(self) -> Any:
        """The same command again: it finds its own state."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(kw_only=True, slots=True, frozen=True)
class SlurmJob:
    """A job in Slurm's queue."""

    job_id: str
    out: Path
    err: Path


def read_settings(words: Sequence[str], run_words: Sequence[str]) -> dict[str, Any]:
    """The settings of Slurm's job: a preset with the overrides of `hydra/launcher=` and `hydra.launcher.*`.

    Args:
        words: those overrides.
        run_words: the run's own, which give the folder and the name.

    Raises:
        ConfigError: an unknown setting.
        LaunchError: another kind of launcher was chosen, or submitit is not installed.
    """
    _import_submitit()
    chosen = [word for word in words if word.startswith("hydra/launcher=")]
    preset = [] if chosen else [f"hydra/launcher={PRESET}"]
    settings = compose_hydra_node([*keep_run_names(run_words), *preset, *words], "launcher")
    target = str(settings.pop("_target_", ""))
    if not target.endswith("submitit_launcher.SlurmLauncher"):
        raise LaunchError(f"{chosen[-1]} is not one of Slurm's; use hydra/launcher={PRESET} or {GPU_PRESET}")
    return settings


def make_script(settings: Mapping[str, Any]) -> str:
    """The script that sbatch will be given; Slurm was asked whether it takes such a job.

    Raises:
        LaunchError: no Slurm here, or a setting that it does not take; nothing is in its queue.
    """
    executor = _executor(settings)._executor
    text = str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run")).rstrip() + "\n"
    done = _ask("sbatch", "--test-only", script=text)
    if done.returncode != 0:
        said = [re.sub(r"^(sbatch: )?(error: |allocation failure: )?", "", line) for line in done.stderr.splitlines()]
        wanted = ", ".join(f"{name}={settings[name]}" for name in _ASKED_FOR if settings.get(name) is not None)
        raise LaunchError(
            f"Slurm refuses the job: {'; '.join(filter(None, said)) or 'no reason given'} (hydra.launcher has "
            f"{wanted}); `sinfo -o '%P %D %c %m %G %l'` shows what there is"
        )
    return text


def submit(job: TrainJob, settings: Mapping[str, Any]) -> SlurmJob:
    """Puts the job into Slurm's queue, and comes back at once.

    Raises:
        LaunchError: Slurm is not here or refuses the job; nothing was launched, and what had been written is removed.
    """
    executor = _executor(settings)
    folder = Path(str(settings["submitit_folder"]).partition("%j")[0])
    made = missing_part(folder)
    try:
        submitted = executor.submit(job)
    except Exception as error:
        line = explain(error)  # and removes what submitit has written
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, subprocess.SubprocessError):
            raise LaunchError(f"{folder} cannot be written: {error.strerror or type(error).__name__}") from error
        if line is None:
            raise
        raise line from error
    return SlurmJob(job_id=str(submitted.job_id), out=Path(submitted.paths.stdout), err=Path(submitted.paths.stderr))


def launch(main: Callable[[list[str]], int], preflight: Preflight, settings: Mapping[str, Any], commit: str) -> str:
    """Submits one run with its lock beside it; gives a line that says where to look.

    Raises:
        LaunchError: as `submit`; nothing stays behind.
    """
    words, lock, made = ["train", *preflight.words], None, None
    if preflight.entries:
        folder = Path(str(settings["submitit_folder"]).partition("%j")[0]).absolute()
        made, data = missing_part(folder), lock_bytes(preflight.entries)
        lock = folder / lock_name(data)
        made = lock if made is None and not lock.exists() else made
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(f"{folder} cannot be made: {error.strerror or type(error).__name__}") from error
        publish(lock, data)
        words.append(text_override(LOCK_KEY, str(lock)))
    try:
        job = submit(TrainJob(main, words, commit), settings)
    except BaseException:
        if made is not None and made.is_dir():
            shutil.rmtree(made, ignore_errors=True)
        elif made is not None:
            made.unlink(missing_ok=True)
        raise
    return (
        f"run {preflight.config.run}: Slurm job {job.job_id}; logs {job.out} and {job.err.name}; "
        f"`scancel {job.job_id}` ends it"
    )


def _executor(settings: Mapping[str, Any]) -> Any:
    submitit = _import_submitit()
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise no_slurm()
    _check_partition(settings.get("partition"))
    executor = submitit.AutoExecutor(
        folder=str(settings["submitit_folder"]), cluster="slurm", slurm_max_num_timeout=settings["max_num_timeout"]
    )
    given = {name: value for name, value in settings.items() if name not in ("submitit_folder", "max_num_timeout")}
    try:
        executor.update_parameters(
            **{name if name in _WITHOUT_PREFIX else f"slurm_{name}": value for name, value in given.items()}
        )
    except (ValueError, TypeError, NameError) as error:  # submitit's own checks
        raise LaunchError(f"submitit refuses the job: {str(error).splitlines()[0]}") from error
    return executor


def _import_submitit() -> Any:
    try:
        version("hydra-submitit-launcher")  # whose settings the preset extends
        import submitit
    except ImportError as error:  # PackageNotFoundError is one too
        raise LaunchError("launching on Slurm needs submitit: `pip install 'dual-policy-plugin[slurm]'`") from error
    return submitit


def _check_partition(partition: str | None) -> None:
    """Raises a LaunchError for a partition that the cluster does not have, or a cluster that does not answer."""
    done = _ask("sinfo", "--noheader", "--format=%R")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        reason = re.sub(r"^sinfo: (fatal: |error: )?", "", reason)
        raise LaunchError(f"Slurm does not answer: {reason}; is its controller up, and SLURM_CONF right?")
    there = done.stdout.split()
    wanted = [] if partition is None else str(partition).split(",")
    if absent := [name for name in wanted if name not in there]:
        raise LaunchError(f"--partition={absent[0]} is not on this cluster; there are {', '.join(there)}")


def _ask(*words: str, script: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=script, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"took over {_TIMEOUT_S} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        raise LaunchError(f"Slurm does not answer: {words[0]} {reason}; is its controller up?") from error


def missing_part(folder: Path) -> Path | None:
    """The first folder on the way to `folder` that is not there; None where all are."""
    absent = None
    for one in (folder, *folder.parents):
        if one.exists():
            return absent
        absent = one
    return absent
