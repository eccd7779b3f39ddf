"""Three ways to play and train one and the same thing, for `bench_mixed`.

ours: each policy forwards its own rows; only learner rows are stored and trained on. The other two stand in
`baselines.py`: masked-both runs every policy on all rows, policy-loop is what people write by hand.

Env, nets, sampler, uniform numbers, horizon, minibatches and update code are shared, so all three play the same games
and make the same update but for rounding; a test holds them to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import Cast, MaskedBoth, PolicyLoop
from dual_policy_plugin.envs.arena import make_arena
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.learning.ppo import PpoSettings, PpoUpdate
from dual_policy_plugin.policies.build import build_policy, compute_dtype
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.captured import CapturedPlay, Play, choose_play
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy, RandomNumbers
from dual_policy_plugin.types import VecEnv

SETTINGS = PpoSettings(
    epochs=1, num_minibatches=4, gamma=0.99, gae_lambda=0.95, clip_coef=0.2, clip_vloss=True, vf_clip_coef=0.2,
    vf_coef=0.5, ent_coef=0.01, max_grad_norm=0.5, norm_adv=True, target_kl=None,
)  # fmt: skip
LEARNING_RATE = 1e-4
SEED = 1


@dataclass(kw_only=True, slots=True, frozen=True)
class Cell:
    """What is played and trained in one cell of the table, by every scheme."""

    pct: float
    num_npcs: int
    """0 where all agents learn."""
    num_envs: int
    horizon: int
    device: torch.device
    hidden_size: int = 128
    precision: str = "auto"


@dataclass(kw_only=True, slots=True)
class Scheme:
    """One scheme in one cell, ready to play iteration after iteration."""

    name: str
    cell: Cell
    split: Assignment
    env: VecEnv
    learner: nn.Module
    npcs: list[nn.Module]
    mixed: MixedPolicy
    npc_forward: tuple[Any, str] | None
    """Object and method that forward the NPC rows of a step; None where all agents learn."""
    experience: Experience
    metrics: EpisodeMetrics
    ppo: PpoUpdate
    rollout: Play
    """Fills the experience with uniform numbers, as fast as the scheme can."""

    def numbers(self, iteration: int) -> RandomNumbers:
        """The uniform numbers of an iteration."""
        return self.mixed.random_numbers(SEED, iteration * self.cell.horizon, self.cell.horizon)

    def play(self, iteration: int) -> None:
        """Fills the experience of an iteration, as fast as the scheme can."""
        self.rollout(self.numbers(iteration))

    def play_plainly(self, iteration: int) -> None:
        """As `play`, by plain calls whose parts can be timed."""
        collect_rollout(self.env, self.mixed, self.experience, self.metrics, self.numbers(iteration))


def _make_parts(cell: Cell) -> tuple[VecEnv, Assignment, nn.Module, list[nn.Module]]:
    """Env, seats, learner and NPCs of a cell: the same weights in every scheme."""
    env = make_arena(cell.num_envs, {}, cell.device)
    dtype = compute_dtype(cell.precision, cell.device)
    env.use_kernels = has_kernels = cell.device.type == "cuda"
    if has_kernels:  # a CPU has no Triton
        from dual_policy_plugin.kernels.lstm import supports

        has_kernels = supports(cell.hidden_size, dtype, cell.device)
    nets = []
    for seed in range(1 + cell.num_npcs):
        torch.manual_seed(seed)
        net = build_policy("fast", {"hidden_size": cell.hidden_size}, env.spec.observation_space, env.spec.actions).to(
            cell.device
        )
        net.compute_dtype = dtype
        net.use_kernels = has_kernels
        nets.append(net)
    for npc in nets[1:]:
        npc.eval().requires_grad_(False)
        npc.pack()
    return env, assign(env.spec.num_agents, cell.pct), nets[0], nets[1:]


def _named(npcs: list[nn.Module]) -> list[Npc]:
    return [Npc(name=f"npc_{k}", policy=npc) for k, npc in enumerate(npcs)]


def _finish(
    name: str, cell: Cell, parts: tuple[VecEnv, Assignment, nn.Module, list[nn.Module]], mixed: MixedPolicy,
    npc_forward: tuple[Any, str], casting: NpcPool | Cast | None,
) -> Scheme:  # fmt: skip
    """What all schemes share: experience, metrics, update, the first episodes. The rollout is plain."""
    env, split, learner, npcs = parts
    is_everyone = mixed.assignment.num_learner > split.num_learner
    experience = allocate_experience(
        env.spec,
        horizon=cell.horizon,
        num_rows=mixed.num_learner_rows,
        state_size=learner.state_size,
        device=cell.device,
    )
    if is_everyone:
        experience.weights = mixed.cast.is_learner_row.float().expand(cell.horizon, -1).contiguous()
    metrics = EpisodeMetrics(
        env.spec, split, casting if npcs else None, cell.device, count_first=False, count_later=True
    )
    ppo = PpoUpdate(
        learner, SETTINGS, betas=(0.9, 0.999), eps=1e-5, ranks=Ranks(), use_kernels=cell.device.type == "cuda"
    )
    scheme = Scheme(
        name=name, cell=cell, split=split, env=env, learner=learner, npcs=npcs, mixed=mixed,
        npc_forward=npc_forward if npcs else None, experience=experience, metrics=metrics, ppo=ppo,
        rollout=partial(collect_rollout, env, mixed, experience, metrics),
    )  # fmt: skip
    env.reset(SEED, stagger=True)
    start_rollouts(env, mixed, experience)
    return scheme


def make_ours(cell: Cell) -> Scheme:
    """The package's own rollout and update, as `train` runs them."""
    parts = env, split, learner, npcs = _make_parts(cell)
    pool = NpcPool(_named(npcs), num_envs=cell.num_envs, num_npc=split.num_npc, device=cell.device) if npcs else None
    mixed = MixedPolicy(learner, pool, split, env.spec, cell.device)
    scheme = _finish("ours", cell, parts, mixed, (pool, "act"), pool)
    scheme.rollout, _ = choose_play(env, mixed, scheme.experience, scheme.metrics, fused=True)
    return scheme


def make_masked_both(cell: Cell) -> Scheme:
    """Every policy on all rows, all rows stored, NPC rows with weight 0; on CUDA plain torch in one captured graph."""
    parts = env, split, learner, npcs = _make_parts(cell)
    cast = Cast(_named(npcs), split, cell.num_envs, cell.device)
    mixed = MaskedBoth(learner, npcs, cast, split, env.spec)
    scheme = _finish("masked-both", cell, parts, mixed, (mixed, "forward_npcs"), cast)
    if cell.device.type == "cuda":
        scheme.rollout = CapturedPlay(scheme.rollout)
    return scheme


def make_policy_loop(cell: Cell) -> Scheme:
    """Boolean masks over all rows, one forward per policy; learner rows stored. No graph can hold such masks."""
    parts = env, split, learner, npcs = _make_parts(cell)
    cast = Cast(_named(npcs), split, cell.num_envs, cell.device)
    mixed = PolicyLoop(learner, npcs, cast, split, env.spec)
    return _finish("policy-loop", cell, parts, mixed, (mixed, "act_npcs"), cast)


SCHEMES: dict[str, Callable[[Cell], Scheme]] = {
    "ours": make_ours,
    "masked-both": make_masked_both,
    "policy-loop": make_policy_loop,
}
