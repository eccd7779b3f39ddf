"""How fast the arena alone is: agent-steps per second of stepping, and of stepping and observing.

    python -m benchmarks.bench_env [--num-envs 512] [--num-agents 8] [--threads 1] [--json FILE]

Actions are random and made beforehand. Episodes are staggered as in training, so their restarts are in the figures.
Each figure is the best of several rounds: what the code can do, not what the machine was busy with.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.envs.arena import Arena, make_arena

ROUNDS = 7
STEPS_PER_ROUND = 128


def measure(arena: Arena, num_seats: int) -> float:
    """Agent-steps per second while the first num_seats seats of every env are observed before each step."""
    num_envs, num_agents, device = arena.spec.num_envs, arena.spec.num_agents, arena.device
    actions = torch.randint(0, len(arena.spec.actions), (STEPS_PER_ROUND, num_envs, num_agents), device=device)
    seats = torch.arange(num_seats, device=device)
    seen = torch.zeros(num_envs * num_seats, *arena.spec.observation_space.shape, dtype=torch.uint8, device=device)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    arena.reset(1, stagger=True)
    best_s = float("inf")
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for chosen in actions:
            if num_seats:
                arena.observe(seats, seen)
            arena.step(chosen)
        wait()
        best_s = min(best_s, time.perf_counter() - start)
    return STEPS_PER_ROUND * num_envs * num_agents / best_s


def main() -> None:
    """Measures, prints one line per figure, and writes them to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=512)
    parser.add_argument("--num-agents", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    arena = make_arena(options.num_envs, {"num_agents": options.num_agents}, device)
    if device.type == "cuda":
        arena.use_kernels = True
    figures = {
        "step_only": measure(arena, 0),
        "observing_half": measure(arena, options.num_agents // 2),
        "observing_all": measure(arena, options.num_agents),
    }
    setting = f"{options.num_envs} envs x {options.num_agents} agents, {options.threads} threads, {options.device}"
    for name, rate in figures.items():
        print(f"arena {name}: {rate / 1e6:.2f} M agent-steps/s ({1e9 / rate:.0f} ns each; {setting})")
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({**settings, **facts, "agent_steps_per_s": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
