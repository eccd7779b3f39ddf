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
    dual-policy report DIR...              runs and sweeps as one HTML file
    dual-policy replay POLICY --npc URI    episodes as a page to watch
    dual-policy doctor                     what of this machine works, and what to do about the rest
    dual-policy completion SHELL           the script that lets the Tab key complete all of this

A mistake of the user ends with one line on stderr and exit code 2; a defect of ours keeps its traceback. Heavy modules
are imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dual_policy_plugin import __version__
from dual_policy_plugin.commands.completing import COMPLETING, answer
from dual_policy_plugin.commands.console import configure_logging, is_shown, show_error
from dual_policy_plugin.commands.words import choose_command
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.heartbeat import note_exit


def main(argv: list[str] | None = None) -> int:
    """Runs `dual-policy` with `argv` (the words behind the program's name) and returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if COMPLETING in os.environ:
        answer(_dispatch)
    # Read when torch is imported. A waiting thread spins for microseconds, not milliseconds, before it sleeps: on cores
    # that are shared it would keep the thread it waits for from running, ten times slower in all (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return _dispatch(words)
    except DualPolicyError as error:
        if not is_shown(error):
            show_error(error)
        note_exit(error.exit_code)
        return error.exit_code
    except SystemExit as leaving:
        if leaving.code:
            raise
        return 0  # argparse leaves so when it has printed a help
    except KeyboardInterrupt:
        again = "; the same command continues the run from where it was stopped" if words[:1] == ["train"] else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130


def run_train(words: list[str]) -> int:
    """`dual-policy train`: a run, or the jobs of a sweep."""
    from dual_policy_plugin.commands.train import run

    return run(words)


def run_import(words: list[str]) -> int:
    """`dual-policy import`: a .pt file becomes a policy file of ours."""
    from dual_policy_plugin.commands.import_policy import run

    return run(words)


def run_demo(words: list[str]) -> int:
    """`dual-policy demo`: a minute of training, and who wins."""
    from dual_policy_plugin.commands.demo import run

    return run(words)


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


def run_report(words: list[str]) -> int:
    """`dual-policy report`: runs and sweeps as one HTML file."""
    configure_logging()

    from dual_policy_plugin.commands.report import run

    return run(words)


def run_replay(words: list[str]) -> int:
    """`dual-policy replay`: recorded episodes as a page to watch."""
    configure_logging()

    from dual_policy_plugin.commands.replay import run

    return run(words)


def run_doctor(words: list[str]) -> int:
    """`dual-policy doctor`: what of this machine works, and what to do about the rest."""
    from dual_policy_plugin.commands.doctor import run

    return run(words)


def run_completion(words: list[str]) -> int:
    """`dual-policy completion`: the script that lets a shell complete our commands."""
    from dual_policy_plugin.commands.completion import run

    return run(words)


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (run_train, "train a policy against a frozen one; takes Hydra overrides"),
    "import": (run_import, "turn a .pt state dict into a policy file"),
    "demo": (run_demo, "a minute of training against a built-in policy, and who wins"),
    "npc": (run_npc, "find, pin and look at policies; the cache of fetched ones"),
    "runs": (run_runs, "list the runs of a W&B project and what they published"),
    "evaluate": (run_evaluate, "play policies against each other: win rates and ratings"),
    "gate": (run_gate, "exit code 0 where a policy is not weaker than another"),
    "curriculum": (run_curriculum, "the stages, jobs and decisions of a curriculum sweep"),
    "launch": (run_launch, "check a run, pin its policies, launch it (SkyPilot, Slurm)"),
    "watch": (run_watch, "run a command under a heartbeat and a time limit"),
    "report": (run_report, "runs and sweeps as one HTML file"),
    "replay": (run_replay, "record episodes as a page to watch"),
    "doctor": (run_doctor, "check this machine: torch, CUDA, W&B, S3, Slurm, SkyPilot"),
    "completion": (run_completion, "the script that makes the Tab key complete all of this"),
}
_GROUPS = {
    "train and watch": ("demo", "train", "curriculum", "report", "replay"),
    "judge": ("evaluate", "gate"),
    "policies": ("npc", "import", "runs"),
    "clusters and clouds": ("launch", "watch"),
    "tools": ("doctor", "completion"),
}
_EXAMPLES = (
    "dual-policy demo",
    "dual-policy train +dual_policy=checkpoint run=first \\\n"
    "      trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak",
)


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"dual-policy {__version__}")
        return 0
    note = " `dual-policy --version` prints the version."
    command = choose_command("dual-policy", words, _COMMANDS, examples=_EXAMPLES, groups=_GROUPS, note=note)
    return command(words[1:]) if command else 0
