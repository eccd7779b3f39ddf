"""One line for what goes wrong between submitit, Slurm and a job; used by the command line and by jobs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from dual_policy_plugin.errors import DualPolicyError, LaunchError, LimitError

_KEYS = (
    (
        "array",
        "`scontrol show config | grep MaxArraySize`, which a sweep's jobs exceed; divide its values among sweeps",
    ),
    ("account", "hydra.launcher.account and hydra.launcher.qos; `sacctmgr show assoc user=$USER` lists yours"),
    ("partition", "hydra.launcher.partition; `sinfo` lists partitions"),
    ("qos", "hydra.launcher.qos; `sacctmgr show qos` lists them"),
    ("time limit", "hydra.launcher.timeout_min; `sinfo -o '%P %l'` shows the limits"),
    ("feature", "hydra.launcher.constraint; `sinfo -o '%P %f'` lists features"),
    ("gres", "hydra.launcher.gpus_per_node and hydra.launcher.gres; `sinfo -o '%P %G'` shows what nodes have"),
    ("memory", "hydra.launcher.mem_gb; `sinfo -o '%P %D %m'` shows what nodes have"),
    ("cpu count", "hydra.launcher.cpus_per_task and tasks_per_node; `sinfo -o '%P %D %c'` shows what nodes have"),
    ("node", "hydra.launcher.nodes, cpus_per_task, gpus_per_node and mem_gb; `sinfo -o '%P %D %c %m %G'` shows nodes"),
)
"""A word of sbatch's message, and the keys to look at; the first that fits."""
_MENDS = {
    "OUT_OF_MEMORY": "raise hydra.launcher.mem_gb or lower env.num_envs, then the same command goes on",
    "TIMEOUT": "raise hydra.launcher.signal_delay_s, that it can save in time; the same command goes on",
}


def explain(error: BaseException) -> DualPolicyError | None:
    """The one line for an error of submitit's, on the launching side; None for any other error.

    What a submission that Slurm refused has left in the sweep's folder is removed.
    """
    if isinstance(error, RuntimeError) and 'Could not detect "srun"' in str(error):
        if folder := _sweep_folder(error):
            remove_sweep(folder)
        return no_slurm()
    if not type(error).__module__.startswith("submitit."):
        return None
    cause = error.__cause__
    if isinstance(cause, subprocess.CalledProcessError) and cause.cmd[0] == "sbatch":
        remove_submission(Path(cause.cmd[-1]))
        return _refused(str(error))
    return _lost(str(error))


def no_slurm() -> LaunchError:
    """That the commands of Slurm are not here."""
    return LaunchError(
        "Slurm's sbatch and srun are not on this machine; start this on a login node of the cluster, or leave "
        "hydra/launcher= away to train here"
    )


def job_error(error: Exception) -> DualPolicyError | None:
    """In a process that submitit started: what an error becomes for whoever waits for the job; None elsewhere."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    import submitit

    with contextlib.suppress(KeyError, RuntimeError):  # another process that has the variable
        env = submitit.JobEnvironment()
        if "timed-out too many times" in str(error):
            return LimitError(
                f"job {env.job_id} ran out of its time (hydra.launcher.timeout_min) and is not queued again; its state "
                "is saved and the same command goes on; hydra.launcher.max_num_timeout=N, or "
                "hydra/launcher=dual_policy_slurm, queues it again"
            )
        reason = str(error).strip().partition("\n")[0]
        return LaunchError(
            f"job {env.job_id} ended with {type(error).__name__}: {reason}; its log is {env.paths.stderr}"
        )
    return None


def _refused(text: str) -> LaunchError:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines() if line.strip()]
    lines = [line.removeprefix("Batch job submission failed: ") for line in lines]
    says = "; ".join(dict.fromkeys(line.strip() for line in lines)) or "no reason given"
    mend = next((keys for word, keys in _KEYS if word in says.lower()), "")
    return LaunchError(f"Slurm refuses the job: {says}" + (f"; see {mend}" if mend else ""))


def remove_submission(script: Path, number: str = "") -> None:
    """Removes what was written for jobs that never ran, and folders that are empty then.

    Hydra's multirun.yaml goes too where nothing else stands beside it: the sweep has not begun.

    Args:
        script: what sbatch was given.
        number: of the job that was cancelled; empty: there was none.
    """
    folder = script.parent
    with contextlib.suppress(OSError):
        script.unlink()
        for path in folder.iterdir():
            if number and path.name.partition("_")[0] == number:
                shutil.rmtree(path)
            elif re.fullmatch(r"[0-9a-f]{32}\.pkl", path.name):  # has a job's number once there is one
                path.unlink()
        folder.rmdir()
        remove_sweep(folder.parent)


def remove_sweep(folder: Path) -> None:
    """Removes the folder of a sweep that has not begun: Hydra's multirun.yaml is all that stands there."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == ["multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            folder.rmdir()


def _sweep_folder(error: BaseException) -> Path | None:
    """The folder of the sweep that was being launched when `error` arose; its message does not say."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == "launch" and "self" in frame.tb_frame.f_locals:
            return Path(str(frame.tb_frame.f_locals["self"].config.hydra.sweep.dir))
        frame = frame.tb_next
    return None


def _lost(text: str) -> LaunchError:
    """For a job that failed outside of our code, or was ended from outside."""
    match = re.search(r"Job (\S+) \(task: \d+\) with path (\S+)_\d+_result\.pkl", text)
    if match is None:  # an error before our code began: while submitit unpacked the job
        trace = [line for line in text.partition("----\n")[2].partition("\n----")[0].splitlines() if line.strip()]
        path = re.search(r"- (\S+\.err)", text)
        return LaunchError(
            f"a job could not begin: {trace[-1] if trace else text.partition(chr(10))[0]}"
            + (f"; its log is {path[1]}" if path else "")
        )
    state = re.search(r"\(state: ([A-Z_]+)", text)
    log = Path(f"{match[2]}_0_log.err")
    told = _last_error(log)
    mend = _MENDS.get(state[1] if state else "", "the same command goes on with what has no result")
    return LaunchError(
        f"job {match[1]} ended without a result (state {state[1] if state else 'unknown'}); "
        + (f"it said: {told}; " if told else "")
        + f"{mend}; its log is {log}"
    )


def _last_error(log: Path) -> str:
    """The last error line of ours in a job's log; empty where there is none."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
    return ""
