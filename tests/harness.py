"""Parts that several tests put together: tiny tensor envs with a known optimum, and a whole training loop in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.learning.ppo import PpoSettings, PpoUpdate
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import EnvSpec, ObservationSpace, StepResult, VecEnv

CPU = torch.device("cpu")


@contextmanager
def logging_as_it_was() -> Iterator[None]:
    """Takes back what a command of ours does to the root logger: its handlers write to a stream that will be closed."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def children() -> set[psutil.Process]:
    """All processes that come from this one; other tests may keep some, a Slurm for example."""
    return set(psutil.Process().children(recursive=True))


class MemoryTask:
    """Every agent sees a cue at its first step, nothing after, and is paid at the last step for naming the cue.

    With `delay` 0 it is a contextual bandit. A policy with memory gets 1 an episode, one without gets 1 / num_cues.
    """

    def __init__(self, num_envs: int, num_agents: int, *, num_cues: int = 2, delay: int = 0) -> None:
        self.num_cues, self.length = num_cues, delay + 1
        self.spec = EnvSpec(
            name="memory",
            num_envs=num_envs,
            num_agents=num_agents,
            observation_space=ObservationSpace(
                kind="vector", shape=(num_cues + 1,), features=(*(f"cue_{i}" for i in range(num_cues)), "go")
            ),
            actions=tuple(f"name_{i}" for i in range(num_cues)),
            max_episode_steps=self.length,
        )
        self.generator = torch.Generator()
        self.time = torch.zeros(num_envs, dtype=torch.int64)
        self.cues = torch.zeros(num_envs, num_agents, dtype=torch.int64)

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        self.generator.manual_seed(seed)
        self.time.zero_()
        if stagger:
            self.time.copy_(torch.arange(len(self.time)) % self.length)
        self.cues.copy_(self._draw())

    def _draw(self) -> Tensor:
        return torch.randint(0, self.num_cues, self.cues.shape, generator=self.generator)

    def observe(self, seats: Tensor, out: Tensor) -> None:
        is_first = (self.time == 0).view(-1, 1, 1)
        cues = nn.functional.one_hot(self.cues[:, seats], self.num_cues) * is_first
        go = (self.time == self.length - 1).view(-1, 1, 1).expand(-1, len(seats), 1)
        out.copy_(torch.cat([cues, go], dim=2).flatten(0, 1))

    def step(self, actions: Tensor) -> StepResult:
        ends = self.time == self.length - 1
        rewards = ((actions == self.cues) & ends.unsqueeze(1)).float()
        self.time = torch.where(ends, 0, self.time + 1)
        self.cues = torch.where(ends.unsqueeze(1), self._draw(), self.cues)
        return StepResult(rewards=rewards, dones=ends.unsqueeze(1).expand_as(rewards), episode_ends=ends)

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        raise AssertionError("this env never truncates")

    def close(self) -> None:
        pass


class Always(nn.Module):
    """Takes one action, by its name."""

    def __init__(self, spec: EnvSpec, action: str) -> None:
        super().__init__()
        self.state_size = 0
        self.index, self.num_actions = spec.actions.index(action), len(spec.actions)

    def pack(self) -> None:
        pass

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.full((len(obs), self.num_actions), -torch.inf)
        logits[:, self.index] = 0.0
        return logits, torch.zeros(len(obs)), state


SETTINGS = PpoSettings(
    epochs=1, num_minibatches=4, gamma=0.99, gae_lambda=0.95, clip_coef=0.2, clip_vloss=True, vf_clip_coef=0.2,
    vf_coef=0.5, ent_coef=0.01, max_grad_norm=0.5, norm_adv=True, target_kl=None,
)  # fmt: skip


@dataclass
class Loop:
    """A training loop without files: call `iterate`."""

    env: VecEnv
    mixed: MixedPolicy
    experience: Experience
    metrics: EpisodeMetrics
    ppo: PpoUpdate
    seed: int
    ranks: Ranks
    num_iterations: int = 0

    def collect(self) -> None:
        horizon = self.experience.horizon
        first_env = self.ranks.rank * self.env.spec.num_envs
        numbers = self.mixed.random_numbers(self.seed, self.num_iterations * horizon, horizon, first_env=first_env)
        collect_rollout(self.env, self.mixed, self.experience, self.metrics, numbers)
        self.num_iterations += 1

    def iterate(self, learning_rate: float) -> dict[str, float]:
        self.collect()
        losses = self.ppo.update(self.experience, learning_rate)
        return {name: float(value) for name, value in losses.items()} | self.metrics.take(self.ranks)


def make_loop(
    env: VecEnv,
    *,
    agent: str = "fast",
    npc: nn.Module | None = None,
    split: Assignment | None = None,
    horizon: int = 16,
    hidden_size: int = 32,
    seed: int = 1,
    settings: PpoSettings = SETTINGS,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loop:
    """A loop of a fresh learner against `npc` (None: the same architecture with other weights; all agents learn where
    the split says so)."""
    spec, ranks = env.spec, ranks or Ranks()
    split = split or assign(spec.num_agents, 0.5)

    def policy(weights_seed: int) -> nn.Module:
        torch.manual_seed(weights_seed)
        built = build_policy(agent, {"hidden_size": hidden_size}, spec.observation_space, spec.actions)
        built.compute_dtype = dtype
        return built

    learner = policy(seed)
    pool = None
    if split.num_npc:
        npc = npc or policy(seed + 1000)
        npc.eval().requires_grad_(False)
        npc.pack()
        pool = NpcPool([Npc(name="npc", policy=npc)], num_envs=spec.num_envs, num_npc=split.num_npc, device=CPU)
    mixed = MixedPolicy(learner, pool, split, spec, CPU)
    experience = allocate_experience(
        spec, horizon=horizon, num_rows=mixed.num_learner_rows, state_size=learner.state_size, device=CPU
    )
    ppo = PpoUpdate(learner, settings, betas=(0.9, 0.999), eps=1e-5, ranks=ranks)
    metrics = EpisodeMetrics(spec, split, pool, CPU, count_first=False, count_later=True)
    env.reset(seed, stagger=True)
    start_rollouts(env, mixed, experience)
    return Loop(env, mixed, experience, metrics, ppo, seed, ranks)
