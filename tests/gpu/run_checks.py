"""Whole runs on a device: `train` learns and resumes, env workers feed it, memory stays, sixteen NPCs cost as one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
import torch

from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
)
from dual_policy_plugin.cuda_graph import CapturedCall
from dual_policy_plugin.envs.workers import WorkerVecEnv
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.kernels.group_rows import allocate_row_groups, group_rows
from dual_policy_plugin.kernels.policy_step import TILE, StepRows, policy_step
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.policies.stacked import StackedPolicies
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from tests.envs.toy_envs import make_walker
from tests.gpu.agreement import assert_same
from tests.gpu.kernel_checks import make_net, random_observations
from tests.gpu.rollout_checks import Game, Size


def arena_run(
    train_dir: Path, device: str, *, fused: bool, num_envs: int, num_iterations: int, hidden: int, episodes: int
) -> Config:
    """A run of half the agents against builtin://arena/weak; an iteration takes 4 * num_envs * 32 learner steps."""
    return Config(
        run="gpu",
        device=device,
        train_dir=train_dir,
        trainer=TrainerConfig(
            total_timesteps=num_iterations * num_envs * 4 * 32,
            fused=fused,
            threads=1,  # more of them spin beside whatever else a shared machine runs
            checkpoint_interval=max(1, num_iterations // 2),
            dual_policy=DualPolicyConfig(enabled=True, npc=PolicySource(uri="builtin://arena/weak")),
        ),
        agent=AgentConfig(name="fast", args={"hidden_size": hidden}),
        env=EnvConfig(num_envs=num_envs),
        evals=EvalsConfig(episodes=episodes),
    )


def run(config: Config) -> dict[str, Any]:
    """`train`, whose missing package is said in one line: a machine that is lent may lack it."""
    try:
        from dual_policy_plugin.train import train
    except ModuleNotFoundError as error:
        pytest.fail(f"train needs the package {error.name}, which is not installed here", pytrace=False)
    return train(config)


def curve(config: Config, name: str) -> list[float]:
    """A metric over the iterations of a run, where it occurs."""
    lines = (config.train_dir / config.run / "metrics.jsonl").read_text().splitlines()
    return [figures[name] for line in lines if name in (figures := json.loads(line))]


def check_train(
    config: Config, log: Callable[[], str], *, says: Sequence[str], rise: float, may_fall: float = 0.1
) -> None:
    """A run learns, says how it was played, and goes on when more steps are asked for.

    Args:
        config: of a new run.
        log: gives what was logged so far.
        says: what must stand in it.
        rise: by how much the win rate of its last quarter must exceed that of its first.
        may_fall: by how much the win rate after the resumption may be less than before.
    """
    result = run(config)
    for words in says:
        assert words in log(), f"the log does not say {words}: {log()}"
    iterations = config.trainer.total_timesteps // (config.env.num_envs * 4 * 32)
    assert result["iterations"] == iterations
    rates = curve(config, "dual_policy/win_rate")
    quarter = max(1, len(rates) // 4)
    first, last = fmean(rates[:quarter]), fmean(rates[-quarter:])
    assert last >= first + rise, f"win rate {first:.3f} -> {last:.3f}"
    assert 0.0 <= result["evals"][0]["win_rate"] <= 1.0

    more = replace(config, trainer=replace(config.trainer, total_timesteps=config.trainer.total_timesteps * 5 // 4))
    resumed = run(more)
    assert resumed["iterations"] == iterations * 5 // 4
    assert curve(more, "charts/epoch") == [float(i + 1) for i in range(resumed["iterations"])]
    after = fmean(curve(more, "dual_policy/win_rate")[len(rates) :])
    assert after >= last - may_fall, f"win rate {last:.3f} before the stop, {after:.3f} after"


def check_workers(device: torch.device, *, num_envs: int, num_workers: int, horizon: int) -> None:
    """An env in worker processes, played in halves whose steps overlap the policies', gives what the whole gives."""
    played = []
    for in_halves in (True, False):
        env = WorkerVecEnv(
            make_walker, {"max_episode_steps": 9}, name="walker", num_envs=num_envs, num_workers=num_workers,
            device=device,
        )  # fmt: skip
        try:
            assert env.halves() is not None, "no halves"
            if not in_halves:
                env._halves = None
            played.append(_play_workers(env, device, horizon))
        finally:
            env.close()
    halves, whole = played
    for field in fields(Experience):
        ours, wanted = getattr(halves, field.name), getattr(whole, field.name)
        if wanted is not None and wanted.is_floating_point():
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, f=field: f"{f.name}: {m}")
        elif wanted is not None:
            assert_same(field.name, ours, wanted)
    assert whole.final_values is not None
    assert whole.final_values.any(), "no episode was truncated"
    assert whole.rewards.any()


def _play_workers(env: WorkerVecEnv, device: torch.device, horizon: int) -> Experience:
    """Two rollouts of a learner and an NPC."""
    spec, split = env.spec, assign(env.spec.num_agents, 0.5)
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = build_policy("fast", {"hidden_size": 32}, spec.observation_space, spec.actions).to(device)
        net.pack()
        nets.append(net)
    pool = NpcPool([Npc(name="npc", policy=nets[1])], num_envs=spec.num_envs, num_npc=split.num_npc, device=device)
    mixed = MixedPolicy(nets[0], pool, split, spec, device)
    experience = allocate_experience(
        spec, horizon=horizon, num_rows=mixed.num_learner_rows, state_size=64, device=device
    )
    metrics = EpisodeMetrics(spec, split, pool, device, count_first=False, count_later=True)
    env.reset(1, stagger=True)
    start_rollouts(env, mixed, experience)
    for first_step in (0, horizon):
        collect_rollout(env, mixed, experience, metrics, mixed.random_numbers(1, first_step, horizon))
    return experience


def check_memory_stays(device: torch.device, dtype: torch.dtype, size: Size, *, num_iterations: int) -> None:
    """The device's memory is as large after many iterations as it was after the recordings."""
    game = Game(device, dtype, size, is_decided=False, capture=True)
    sizes = []
    for iteration in range(num_iterations):
        game.iterate(iteration, 1e-4)
        torch.cuda.synchronize(device)
        sizes.append((torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)))
    settled = 6  # three calls, the recording, a replay, one more
    assert sizes[-1][0] <= sizes[settled][0], f"allocated: {sizes[settled][0]} -> {sizes[-1][0]} bytes"
    assert sizes[-1][1] <= sizes[settled][1], f"reserved: {sizes[settled][1]} -> {sizes[-1][1]} bytes"


def forward_of_pool(
    device: torch.device, dtype: torch.dtype, *, num_envs: int, num_npcs: int, hidden: int, tile: int = TILE
) -> Callable[[], None]:
    """A function that sorts the rows of a pool and steps learner and NPCs, four seats each."""
    generator = torch.Generator().manual_seed(1)
    nets = [make_net("fast", seed, hidden=hidden, dtype=dtype, device=device) for seed in range(1 + num_npcs)]
    weights = StackedPolicies(nets[0], len(nets))
    for k, net in enumerate(nets):
        weights.put(k, net)
    npc_of_env = torch.randint(num_npcs, (num_envs,), generator=generator).to(device)
    groups = None
    if num_npcs > 1:
        groups = allocate_row_groups(num_envs=num_envs, num_npcs=num_npcs, rows_per_env=4, tile=tile, device=device)
    num_rows = num_envs * 4

    def rows(seats: list[int]) -> StepRows:
        return StepRows(
            obs=random_observations(num_rows, generator).to(device),
            state=torch.zeros(num_rows, 2 * hidden, device=device),
            uniforms=torch.rand(num_rows, generator=generator).to(device),
            seats=torch.tensor(seats, device=device),
        )

    learner, npc = rows([0, 1, 2, 3]), rows([4, 5, 6, 7])
    actions = torch.zeros(num_envs, 8, dtype=torch.int64, device=device)
    learner_actions = torch.zeros(num_rows, dtype=torch.int64, device=device)
    log_probs, values = torch.zeros(2, num_rows, device=device)

    def forward() -> None:
        if groups is not None:
            group_rows(npc_of_env, groups)
        policy_step(
            weights, learner, npc, groups, actions=actions, learner_actions=learner_actions, log_probs=log_probs,
            values=values, tile=tile,
        )  # fmt: skip

    return forward


def times_of_turns(calls: list[Callable[[], object]], device: torch.device, *, num_turns: int) -> list[list[float]]:
    """Seconds of each call in turns (A B, B A, ...): one list of `num_turns` a call."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(num_turns):
        for i in range(len(calls))[:: 1 - turn % 2 * 2]:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            calls[i]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[i].append(time.perf_counter() - started)
    return times


def cost_of_sixteen(
    device: torch.device, dtype: torch.dtype, *, num_envs: int, hidden: int, steps: int, num_turns: int,
    tile: int = TILE,
) -> float:  # fmt: skip
    """Time of a forward step of learner and K = 16 NPCs over that of K = 1, at equal rows; replays on a GPU."""
    calls: list[Callable[[], object]] = []
    for num_npcs in (1, 16):
        forward = forward_of_pool(device, dtype, num_envs=num_envs, num_npcs=num_npcs, hidden=hidden, tile=tile)

        def several(forward: Callable[[], None] = forward) -> None:
            for _ in range(steps):
                forward()

        calls.append(CapturedCall(several, "steps") if device.type == "cuda" else several)
    for call in calls * 5 if device.type == "cuda" else []:  # warm-ups, recordings, a replay
        call()
    one, sixteen = (median(times) for times in times_of_turns(calls, device, num_turns=num_turns))
    return sixteen / one
