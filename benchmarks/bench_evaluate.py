"""What cross-play costs beside its floor: stepping the same envs, and one forward pass per row.

    python -m benchmarks.bench_evaluate [--policies 4] [--num-envs 512] [--episode-steps 64] [--threads 1] [--rounds 5]

All pairs of P policies of one size play the arena from both seatings, in one env of about num-envs copies. The floor
steps an env of that size as often, lets it write all observations, and runs one policy once over all rows. Both take
turns; each figure is the least of its rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.envs.arena import Arena, make_arena
from dual_policy_plugin.evaluation.matches import plan_rounds, play_pairings, seatings_of
from dual_policy_plugin.memory import keep_freed_memory
from dual_policy_plugin.policies.build import build_policy, compute_dtype
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.rollout.assignment import assign


def make_policies(count: int, arena: Arena, device: torch.device) -> list[Npc]:
    """Frozen `fast` policies of random weights, in the device's own precision."""
    npcs = []
    for k in range(count):
        torch.manual_seed(k)
        policy = build_policy("fast", {}, arena.spec.observation_space, arena.spec.actions).eval().to(device)
        policy.requires_grad_(False)
        policy.compute_dtype = compute_dtype("auto", device)
        policy.pack()
        npcs.append(Npc(name=f"policy_{k}", policy=policy))
    return npcs


@torch.no_grad()
def floor_seconds(arena: Arena, npc: Npc, steps: int, device: torch.device) -> float:
    """Of `steps` steps of the env, each with all observations and one forward pass over all rows."""
    spec = arena.spec
    num_rows = spec.num_envs * spec.num_agents
    seats = torch.arange(spec.num_agents, device=device)
    obs = torch.zeros((num_rows, *spec.observation_space.shape), dtype=torch.uint8, device=device)
    state = torch.zeros(num_rows, npc.policy.state_size, device=device)  # type: ignore[arg-type]
    actions = torch.randint(0, len(spec.actions), (16, spec.num_envs, spec.num_agents), device=device)
    arena.reset(1)
    start = time.perf_counter()
    for step in range(steps):
        arena.observe(seats, obs)
        _, _, state = npc.policy.forward_step(obs, state)  # type: ignore[operator]
        arena.step(actions[step % 16])
    float(state.sum())  # waits for the device
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policies", type=int, default=4)
    parser.add_argument("--num-envs", type=int, default=512)
    parser.add_argument("--episode-steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device, args = choose_device(options.device), {"episode_steps": options.episode_steps}
    pairings = [(i, j) for i in range(options.policies) for j in range(i, options.policies)]
    games = max(1, options.num_envs // (2 * len(pairings)))
    num_envs = plan_rounds(2 * len(pairings), games, options.num_envs).envs_per_block * 2 * len(pairings)
    arena = make_arena(num_envs, args, device)
    npcs = make_policies(options.policies, arena, device)
    seatings = seatings_of(assign(arena.spec.num_agents, 0.5), arena.spec)
    best = {"cross-play": float("inf"), "floor": float("inf")}
    for _ in range(options.rounds):
        start = time.perf_counter()
        play_pairings(
            npcs, pairings, lambda numbers: make_arena(len(numbers), args, device, env_numbers=numbers), seatings,
            episodes=2 * games, seed=1, max_envs=num_envs, device=device,
        )  # fmt: skip
        best["cross-play"] = min(best["cross-play"], time.perf_counter() - start)
        best["floor"] = min(best["floor"], floor_seconds(arena, npcs[0], options.episode_steps, device))
    row_steps = num_envs * arena.spec.num_agents * options.episode_steps
    figures = ", ".join(f"{name} {seconds / row_steps * 1e9:,.0f} ns/row-step" for name, seconds in best.items())
    ratio = best["cross-play"] / best["floor"]
    print(
        f"{options.policies} policies, {len(pairings)} pairings, {num_envs} envs of {arena.spec.num_agents} agents, "
        f"{options.threads} thread(s), {device}: {figures}, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
