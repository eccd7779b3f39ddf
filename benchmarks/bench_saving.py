"""What it costs to save a run, and how long it takes to take one up again.

    python -m benchmarks.bench_saving [--pairs 3] [--iterations 150] [--state-mb 100] [--rounds 3] [--folder DIR]
        [key=value ...]

Saving: the default run (arena against an NPC) with checkpoint and state at the default intervals, and the same run that
saves at its beginning and end only, in turns; the seconds are those of the loop, from the first iteration's end to the
last one's. Two figures: the seconds that a run was inside the calls that save, as a share of its loop, and the median
over pairs of what the saving run took more. The first is exact; the second has all costs in it, and the noise of the
machine. Resuming: a run of one more iteration as a process of its own, from its start to the new line in metrics.jsonl,
for a state of about state-mb and for a small one, in turns; the difference is what the size costs, a larger net's own
start and iteration included. DIR says on which disk; the runs are removed from it. Overrides change the default run.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import dual_policy_plugin.train as program
from benchmarks.measure import wrapped
from dual_policy_plugin.envs.arena import make_arena
from dual_policy_plugin.files import read_lines
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.report.run_log import RunLog
from dual_policy_plugin.run_state import STATE_NAME

NPC = ("+dual_policy=checkpoint", "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/medium")
COMMON = ("device=cpu", "wandb=off", "evals.episodes=0")
NEVER = ("trainer.checkpoint_interval=1000000000", "trainer.state_interval_s=86400")
SMALL = ("env.num_envs=8", "trainer.horizon=8", "trainer.num_minibatches=2")
ITERATION_STEPS = 8 * 8 * 8
"""Learner steps of an iteration of SMALL where all eight agents learn."""
SMALL_WIDTH = 16
_TIMEOUT_S = 300.0


def run_loop(folder: Path, run: str, iterations: int, words: Sequence[str]) -> dict[str, float]:
    """A default run of some iterations: the seconds of its loop, and those inside saves (`saving_s`), and how many.

    The saves at the beginning are not in it, the last iteration's are left out of both.
    """
    config, text = compose_config([*NPC, *COMMON, f"train_dir={folder}", f"run={run}", *words])
    learner_steps = config.env.num_envs * config.trainer.horizon * 4  # half of the arena's eight agents
    config, text = compose_config(
        [
            *NPC,
            *COMMON,
            f"train_dir={folder}",
            f"run={run}",
            *words,
            f"trainer.total_timesteps={iterations * learner_steps}",
        ]
    )
    saves: list[tuple[float, float]] = []
    ends: list[float] = []

    def timing(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            saves.append((start, time.perf_counter() - start))
            return result

        return timed

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            ends.append(time.perf_counter())
            return call(*args, **kwargs)

        return noted

    with ExitStack() as stack:
        for name in ("save_checkpoint", "save_state"):
            stack.enter_context(wrapped(program, name, timing))
        stack.enter_context(wrapped(RunLog, "record", noting))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        program.train(config, resolved_yaml=text)
    inside = [seconds for start, seconds in saves if ends[0] < start < ends[-1]]
    return {"loop_s": ends[-1] - ends[0], "saving_s": sum(inside), "num_saves": len(inside)}


def measure_saving(folder: Path, pairs: int, iterations: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Runs that save and runs that do not, in turns; the first pair warms up and does not count."""
    rows = []
    for pair in range(pairs + 1):
        order: list[tuple[str, Sequence[str]]] = [("with", ()), ("without", NEVER)]
        rows.append(
            {
                name: run_loop(folder, f"{name}_{pair}", iterations, [*overrides, *words])
                for name, words in (order if pair % 2 else order[::-1])
            }
        )
    saving = [row["with"]["saving_s"] / row["with"]["loop_s"] for row in rows[1:]]
    longer = [row["with"]["loop_s"] / row["without"]["loop_s"] - 1 for row in rows[1:]]
    return {
        "loop_s": statistics.median(row["with"]["loop_s"] for row in rows[1:]),
        "num_saves": rows[-1]["with"]["num_saves"],
        "saving_fraction": statistics.median(saving),
        "longer_fraction": statistics.median(longer),
        "least_longer": min(longer),
        "most_longer": max(longer),
    }


def first_iteration_s(folder: Path, run: str, width: int, iterations: int) -> float:
    """Seconds from a process's start to the metrics line of iteration number `iterations`, its last."""
    words = [*COMMON, *SMALL, f"agent.hidden_size={width}", f"train_dir={folder}", f"run={run}"]
    lines = folder / run / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dual_policy_plugin", "train", *words,
         f"trainer.total_timesteps={iterations * ITERATION_STEPS}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while len(read_lines(lines)) < iterations:
            if process.poll() is not None or time.perf_counter() - start > _TIMEOUT_S:
                raise RuntimeError(f"the run ended before iteration {iterations}: {process.communicate()[1].decode()}")
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        process.wait(_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    return seconds


def megabytes_of(width: int) -> float:
    """Weights and Adam's two moments of the arena's net of that hidden size."""
    spec = make_arena(num_envs=1, device=torch.device("cpu"), args={}).spec
    policy = build_policy("fast", {"hidden_size": width}, spec.observation_space, spec.actions)
    return 3 * 4 * sum(weights.numel() for weights in policy.parameters()) / 1e6


def width_for(state_mb: float) -> int:
    """A hidden size whose state has about that many MB."""
    width = 512
    for _ in range(3):  # about as the square of the width
        width = max(SMALL_WIDTH, round(width * math.sqrt(state_mb / megabytes_of(width)) / 16) * 16)
    return width


def measure_resume(folder: Path, state_mb: float, rounds: int) -> dict[str, float]:
    """Continues a run with a large state and one with a small state, in turns."""
    widths = {"large": width_for(state_mb), "small": SMALL_WIDTH}
    seconds: dict[str, list[float]] = {name: [] for name in widths}
    for round_number in range(1, rounds + 2):
        for name, width in widths.items():
            seconds[name].append(first_iteration_s(folder, name, width, round_number))  # the first one begins the run
    large, small = (statistics.median(seconds[name][1:]) for name in ("large", "small"))
    state = folder / "large/state" / STATE_NAME
    return {"state_mb": state.stat().st_size / 1e6, "large_s": large, "small_s": small, "more_s": large - small}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--state-mb", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the default run")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs go; else a temporary folder")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench_saving_", dir=args.folder) as temporary:
        os.environ.setdefault("DUAL_POLICY_CACHE", f"{temporary}/cache")
        saving = measure_saving(Path(temporary), args.pairs, args.iterations, args.overrides)
        resume = measure_resume(Path(temporary), args.state_mb, args.rounds)
    print("| what | figure |\n|---|---|")
    print(f"| default run, {args.iterations} iterations: loop | {saving['loop_s']:.1f} s |")
    print(f"| saves in it (checkpoint, state) | {saving['num_saves']:.0f} |")
    print(f"| inside saves | {saving['saving_fraction']:.2%} of the loop |")
    print(
        f"| longer than without saving, median of {args.pairs} pairs | {saving['longer_fraction']:+.1%} "
        f"({saving['least_longer']:+.1%} to {saving['most_longer']:+.1%}) |"
    )
    print(f"| state of the large run | {resume['state_mb']:.0f} MB |")
    print(f"| start to first iteration, large state | {resume['large_s']:.2f} s |")
    print(f"| start to first iteration, small state | {resume['small_s']:.2f} s |")
    print(f"| what the size of the state costs | {resume['more_s']:.2f} s |")


if __name__ == "__main__":
    main()
