"""What K NPCs of one architecture cost beside one, at equal rows: a step of learner and NPCs, and the NPCs alone.

    python -m benchmarks.bench_pool [--device cpu|cuda] [--num-envs 1024] [--threads 1] [--rounds 15]

The arena's observations, half of the 8 agents NPCs: 4,096 NPC rows at 1,024 envs. Pools take turns; each figure is the
least of its rounds. An env gets another NPC at every step somewhere, as in training, so rows are sorted anew each time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import wait_for
from benchmarks.schemes import Cell, Scheme, make_ours
from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.memory import keep_freed_memory

POOLS = (1, 4, 16)
STEPS = 8


def step_both(scheme: Scheme, u_learner: torch.Tensor, u_npc: torch.Tensor) -> None:
    """One step of the learner and of all NPCs."""
    scheme.mixed.act(scheme.experience.obs[0], u_learner, u_npc)


def step_npcs(scheme: Scheme, _: torch.Tensor, u_npc: torch.Tensor) -> None:
    """One step of all NPCs."""
    assert scheme.mixed.pool is not None
    scheme.mixed.pool.act(scheme.mixed.npc_obs, u_npc)


def seconds(scheme: Scheme, step: Callable[[Scheme, torch.Tensor, torch.Tensor], None]) -> float:
    """Of one step, over STEPS of them, between which one env changes its NPC."""
    mixed, pool = scheme.mixed, scheme.mixed.pool
    assert pool is not None
    numbers = mixed.random_numbers(1, 0, STEPS)
    wait_for(scheme.cell.device)
    start = time.perf_counter()
    for t in range(STEPS):
        step(scheme, numbers.learner[t], numbers.npc[t])
        pool.npc_of_env[t] = (pool.npc_of_env[t] + 1) % len(pool.npcs)
    wait_for(scheme.cell.device)
    return (time.perf_counter() - start) / STEPS


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-envs", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = choose_device(options.device)
    schemes = {
        k: make_ours(Cell(pct=0.5, num_npcs=k, num_envs=options.num_envs, horizon=STEPS, device=device)) for k in POOLS
    }
    for scheme in schemes.values():
        scheme.mixed.learner.pack()  # type: ignore[operator]
    best = {(k, step): float("inf") for k in POOLS for step in (step_both, step_npcs)}
    for _ in range(options.rounds):
        for k, step in best:
            best[k, step] = min(best[k, step], seconds(schemes[k], step))
    rows = options.num_envs * 4
    print(f"{rows} learner rows and {rows} NPC rows a step, {options.threads} thread(s), {device}")
    print("|  K | both, ns/row | x one | NPCs alone, ns/row | x one |\n| ---: | ---: | ---: | ---: | ---: |")
    for k in POOLS:
        both, npcs = best[k, step_both], best[k, step_npcs]
        print(
            f"| {k} | {both / rows / 2 * 1e9:,.0f} | {both / best[1, step_both]:.2f} | {npcs / rows * 1e9:,.0f} | "
            f"{npcs / best[1, step_npcs]:.2f} |"
        )


if __name__ == "__main__":
    main()
