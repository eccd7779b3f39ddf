"""What CUDA graphs record must never ask the device. Meta tensors have no values: whatever asks for one raises here.

So does mixing devices. The arena, both policies, the metrics and the update run on them as they would on a GPU, except
Adam's own step, which is torch's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.experience import allocate_experience
from dual_policy_plugin.learning import ppo as ppo_module
from dual_policy_plugin.learning.ppo import PpoUpdate
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from tests.harness import SETTINGS

META = torch.device("meta")


class NoAdam:
    """Stands where Adam does and takes no step: fused Adam has no meta kernel."""

    def __init__(self, parameters: list[nn.Parameter], **_: object) -> None:
        self.state: dict[nn.Parameter, object] = {}

    def step(self) -> None:
        pass


class NoHostNumbers(TorchFunctionMode):
    """Raises where a tensor is made of the host's numbers: a graph would record a copy from memory that is gone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func
        result = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.cpu, torch.Tensor.cuda):
            devices = {x.device for x in (*args, result) if isinstance(x, torch.Tensor)}
            assert len(devices) <= 1, f"{func.__name__} between {devices}"
        return result


@pytest.mark.parametrize("num_npcs", [1, 3])
@pytest.mark.parametrize("agent", ["fast", "mlp"])
def test_rollout_and_update_never_ask_the_device(monkeypatch: pytest.MonkeyPatch, agent: str, num_npcs: int) -> None:
    monkeypatch.setattr(ppo_module.torch.optim, "Adam", NoAdam)
    env = Arena(ArenaConfig(), 4, META)
    env.due = torch.zeros(env.config.episode_steps, 1, dtype=torch.int64, device=META)
    env.tick = torch.zeros(1, dtype=torch.int64, device=META)
    split = assign(8, 0.5)

    def policy() -> nn.Module:
        net = build_policy(agent, {"hidden_size": 16}, env.spec.observation_space, env.spec.actions).to(META)
        net.pack()
        return net

    npcs = [Npc(name=str(k), policy=policy().requires_grad_(False)) for k in range(num_npcs)]
    pool = NpcPool(npcs, num_envs=4, num_npc=4, device=META)
    learner = policy()
    mixed = MixedPolicy(learner, pool, split, env.spec, META)
    experience = allocate_experience(env.spec, horizon=3, num_rows=16, state_size=learner.state_size, device=META)
    metrics = EpisodeMetrics(env.spec, split, pool, META, count_first=True, count_later=True)
    ppo = PpoUpdate(learner, replace(SETTINGS, target_kl=0.1), betas=(0.9, 0.999), eps=1e-5, ranks=Ranks())

    numbers = mixed.random_numbers(1, 0, 3)
    with NoHostNumbers():
        collect_rollout(env, mixed, experience, metrics, numbers)
        losses = ppo.update(experience, 1e-3)

    assert all(loss.device == META for loss in losses.values())
    assert metrics.take_sums(Ranks()).device == META


def test_what_this_file_relies_on_is_noticed() -> None:
    for call in (lambda: torch.tensor([1.0], device=META), lambda: torch.ones(1).to(META)):
        with pytest.raises(AssertionError), NoHostNumbers():
            call()
    with pytest.raises(NotImplementedError):
        torch.ones(3, device=META).nonzero()
    with pytest.raises(RuntimeError):
        bool(torch.ones((), device=META))
    with pytest.raises(RuntimeError):
        torch.ones(3, device=META) + torch.ones(3)
