"""Whether a curriculum helps: weak, medium, strong one after the other, beside each end of the ladder alone.

    python -m benchmarks.bench_curriculum [--out train_dir/bench_curriculum] [--stage-steps 1310720] [--seeds 5]
                                          [--episodes 1024] [--jobs 2]

All arms learn for equally many learner steps, each run by its own `dual-policy train` command on one CPU thread, so
that its bits do not depend on the cores. The final policies play against opponents that no arm met in training, then
against those that some arms met. Every finished run is one line of OUT/results.jsonl; the same command goes on from
there. Prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.report_table import command, commit, machine
from dual_policy_plugin.curriculum.state import read_state
from dual_policy_plugin.errors import DualPolicyError, RunError
from dual_policy_plugin.evaluate import SEED_OFFSET, evaluate_pinned
from dual_policy_plugin.files import read_json
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.hydra_app.overrides import text_override
from dual_policy_plugin.npc.resolver import resolve

LADDER = ("weak", "medium", "strong")
ARMS = {
    "curriculum": LADDER,
    "strong alone": ("strong",),
    "weak alone": ("weak",),
    "weak in stages": ("weak",) * len(LADDER),  # the curriculum's restarts without its opponents
}
"""What each learns against: one NPC for each stage, or one for a plain run."""
DIFFERENCES = (("curriculum", "strong alone"), ("curriculum", "weak alone"), ("curriculum", "weak in stages"))
HELD_OUT = ("forager", "hunter", "random")
OPPONENTS = (*HELD_OUT, *LADDER)
ITERATION = 128 * 4 * 32  # learner steps: envs, learner seats of each, horizon, all by default
EVAL_ENVS = 1536  # plays all opponents' games in few rounds
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 0.975 quantile of Student's t by degrees of freedom."""

Row = dict[str, Any]


def arm_command(arm: str, seed: int, out: Path, stage_steps: int) -> list[str]:
    """The command that trains an arm with a seed; all arms come to len(LADDER) * stage_steps learner steps."""
    npcs = [f"builtin://arena/{name}" for name in ARMS[arm]]
    words = [
        text_override("train_dir", str(out)), f"run={run_name(arm, seed)}", f"seed={seed}", "device=cpu",
        "trainer.threads=1", "evals.episodes=0", "trainer.dual_policy.enabled=true",
        "trainer.dual_policy.training_agents_pct=0.5",
        f"trainer.total_timesteps={len(LADDER) * stage_steps // len(npcs)}",
    ]  # fmt: skip
    if len(npcs) > 1:
        words += [
            "-m", "hydra/sweeper=dual_policy_curriculum", f"hydra.sweeper.ladder=[{','.join(npcs)}]",
            "hydra.sweeper.carry=policy", "hydra.sweeper.max_attempts=1", "hydra.sweeper.on_fail=advance",
            "hydra.sweeper.episodes=64",
        ]  # fmt: skip
    else:
        words += [f"trainer.dual_policy.checkpoint_npc.uri={npcs[0]}"]
    return [sys.executable, "-m", "dual_policy_plugin", "train", *words]


def run_name(arm: str, seed: int) -> str:
    """The name of an arm's folder."""
    return f"{arm.replace(' ', '_')}_{seed}"


def read_run(folder: Path) -> tuple[Path, int, list[float]]:
    """A finished run's final policy, its learner steps in all, and the win rates at its gates (a sweep has some)."""
    state = read_state(folder)
    if state is not None:
        assert state.policy is not None, f"{folder} ended without a policy"
        steps = sum(job.agent_step or 0 for job in state.jobs)
        return folder / state.policy.path, steps, [gate.win_rate for gate in state.gates]
    result = read_json(folder / "result.json")
    assert isinstance(result, dict), f"{folder} has no result"
    return folder / result["checkpoint"], result["agent_step"], []


def run_arm(arm: str, seed: int, out: Path, stage_steps: int, episodes: int) -> Row:
    """Trains an arm with a seed and plays its final policy against all opponents, on one thread; gives its line.

    Raises:
        RunError: the command failed; its log says why.
    """
    torch.set_num_threads(1)
    log = out / f"{run_name(arm, seed)}.log"
    start = time.perf_counter()
    with log.open("a") as stream:
        code = subprocess.run(arm_command(arm, seed, out, stage_steps), stdout=stream, stderr=stream).returncode
    if code:
        raise RunError(f"{arm}, seed {seed}: exit code {code}; see {log}")
    trained = time.perf_counter()
    policy, agent_step, gates = read_run(out / run_name(arm, seed))
    config, _ = compose_config([f"env.num_envs={EVAL_ENVS}"])
    results = evaluate_pinned(
        resolve(str(policy), name="learner"),
        [resolve(f"builtin://arena/{name}") for name in OPPONENTS],
        config,
        episodes=episodes,
        seed=SEED_OFFSET,  # the same maps for all arms and seeds
        device=torch.device("cpu"),
    )
    return {
        "arm": arm, "seed": seed, "stage_steps": stage_steps, "episodes": episodes, "agent_step": agent_step,
        "gates": gates, "train_s": trained - start, "evaluate_s": time.perf_counter() - trained,
        "win_rate": {name: result.win_rate for name, result in zip(OPPONENTS, results, strict=True)},
        "return": {name: result.learner_return for name, result in zip(OPPONENTS, results, strict=True)},
    }  # fmt: skip


def read_rows(path: Path, stage_steps: int, episodes: int) -> list[Row]:
    """The lines of earlier calls; a last line that was cut is dropped.

    Raises:
        RunError: they are of other settings.
    """
    rows: list[Row] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            rows.append(json.loads(line))
    for row in rows:
        if (row["stage_steps"], row["episodes"]) != (stage_steps, episodes):
            raise RunError(
                f"{path} has runs of --stage-steps {row['stage_steps']} --episodes {row['episodes']}; "
                "use these, or another --out"
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval, by Student's t over independent values."""
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def by_seed(rows: Sequence[Row], figure: str, arm: str, opponent: str, seeds: Sequence[int]) -> list[float]:
    """An arm's win_rate or return against an opponent, in the order of `seeds`."""
    found = {row["seed"]: row[figure][opponent] for row in rows if row["arm"] == arm}
    return [found[seed] for seed in seeds]


def complete_seeds(rows: Sequence[Row]) -> list[int]:
    """The seeds with which every arm has finished."""
    return sorted(set.intersection(*({row["seed"] for row in rows if row["arm"] == arm} for arm in ARMS)))


def table(rows: Sequence[Row], figure: str, opponents: Sequence[str]) -> str:
    """Markdown: a line per opponent with each arm's win_rate or return, and the differences paired by seed."""
    seeds = complete_seeds(rows)
    heads = [*ARMS, *(f"{one} - {other}" for one, other in DIFFERENCES)]
    lines = [f"| against | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for opponent in opponents:
        rates = {arm: by_seed(rows, figure, arm, opponent, seeds) for arm in ARMS}
        cells = ["{:.3f} ± {:.3f}".format(*mean_interval(rates[arm])) for arm in ARMS]
        for one, other in DIFFERENCES:
            mean, half = mean_interval([a - b for a, b in zip(rates[one], rates[other], strict=True)])
            cells.append(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
        lines.append(f"| {opponent} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("train_dir/bench_curriculum"), help="runs and results.jsonl")
    parser.add_argument("--stage-steps", type=int, default=80 * ITERATION, help="learner steps of a stage")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, len(T_975) + 2), metavar="2..10")
    parser.add_argument("--episodes", type=int, default=1024, help="per policy and opponent")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args(arguments)
    for name in ("stage_steps", "episodes", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: use 1 or more")
    if options.stage_steps % ITERATION:
        parser.error(f"--stage-steps {options.stage_steps}: use a multiple of {ITERATION}, or the arms' steps differ")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, writes a line for each, prints the tables."""
    options = parse(arguments)
    print(f"machine: {machine(torch.device('cpu'))}\ncommit: {commit()}")
    print(f"command: {command('benchmarks.bench_curriculum', arguments)}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    rows = read_rows(path, options.stage_steps, options.episodes)
    done = {(row["arm"], row["seed"]) for row in rows}
    todo = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in ARMS if (arm, seed) not in done]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(run_arm, *one, options.out, options.stage_steps, options.episodes) for one in todo]
        try:
            for run in as_completed(runs):
                row = run.result()
                rows.append(row)
                with path.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                rates = ", ".join(f"{name} {rate:.3f}" for name, rate in row["win_rate"].items())
                print(f"{row['arm']}, seed {row['seed']}: {row['agent_step']:,} learner steps; {rates}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs comes to its end
            raise
    for title, opponents in (("held out", HELD_OUT), ("seen in training by some arms", LADDER)):
        for figure in ("win_rate", "return"):
            print(f"\n{figure}, {title}, {len(complete_seeds(rows))} seeds\n\n{table(rows, figure, opponents)}")


if __name__ == "__main__":
    try:
        main()
    except DualPolicyError as error:
        print(f"benchmarks.bench_curriculum: {error}", file=sys.stderr)
        sys.exit(2)
