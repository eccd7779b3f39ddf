"""A whole rollout by the fused kernels against the plain collector, tensor by tensor, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.kernels import policy_step as policy_step_module
from dual_policy_plugin.kernels.policy_step import StepRows
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc, NpcPool, empty_slots
from dual_policy_plugin.policies.stacked import StackedPolicies
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.fused import FusedPlay, why_not_fused
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from tests.harness import CPU
from tests.rl.test_self_play import Recorded

HORIZON, NUM_ENVS, NUM_AGENTS = 4, 5, 4
ARENA = ArenaConfig(
    num_agents=NUM_AGENTS, height=5, width=5, mines=1, altars=1, walls=0, episode_steps=3, attack_cooldown=1
)


class Game:
    """Env, policies, experience and metrics of one small run."""

    def __init__(self, num_npcs: int, pct: float, *, use_kernels: bool, num_empty: int = 0) -> None:
        self.env = Arena(ARENA, NUM_ENVS)
        self.env.use_kernels = use_kernels
        spec, split = self.env.spec, assign(NUM_AGENTS, pct)

        def policy(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            net = build_policy("fast", {"hidden_size": 16}, spec.observation_space, spec.actions)
            net.heads.weight.data.mul_(30.0)  # decided policies: the order of actions matters
            net.pack()
            return net

        npcs = [Npc(name=str(k), policy=policy(10 + k).eval(), is_greedy=k == 1) for k in range(num_npcs)]
        npcs += empty_slots(policy(9), num_empty)
        pool = NpcPool(npcs, num_envs=NUM_ENVS, num_npc=split.num_npc, device=CPU) if npcs else None
        self.mixed = MixedPolicy(policy(1), pool, split, spec, CPU)
        self.metrics = EpisodeMetrics(spec, split, pool, CPU, count_first=False, count_later=True)
        self.experience = allocate_experience(
            spec, horizon=HORIZON, num_rows=self.mixed.num_learner_rows, state_size=32, device=CPU
        )
        self.env.reset(3, stagger=True)
        start_rollouts(self.env, self.mixed, self.experience)


@pytest.mark.slow
@pytest.mark.parametrize(("num_npcs", "pct"), [(0, 1.0), (1, 0.5), (3, 0.25)])
def test_a_fused_rollout_is_the_plain_one(num_npcs: int, pct: float) -> None:
    plain, fused = (Game(num_npcs, pct, use_kernels=use_kernels) for use_kernels in (False, True))
    assert why_not_fused(fused.env, fused.mixed) == ""
    play = FusedPlay(fused.env, fused.mixed, fused.experience, fused.metrics, tile=16)
    for first_step in (0, HORIZON):
        numbers = plain.mixed.random_numbers(1, first_step, HORIZON)
        collect_rollout(plain.env, plain.mixed, plain.experience, plain.metrics, numbers)
        play(numbers)
        for field in fields(Experience):
            want, got = getattr(plain.experience, field.name), getattr(fused.experience, field.name)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, f=field: f"{f.name}: {m}")
    assert plain.experience.dones.any()
    assert torch.equal(fused.experience.actions, plain.experience.actions)
    assert torch.equal(fused.metrics.sums, plain.metrics.sums)
    assert plain.metrics.sums[:, 0].sum() > NUM_ENVS
    assert torch.equal(fused.metrics.returns, plain.metrics.returns)
    if plain.mixed.pool is not None and fused.mixed.pool is not None:
        torch.testing.assert_close(fused.mixed.pool.state, plain.mixed.pool.state, rtol=1e-4, atol=1e-5)
        assert torch.equal(fused.mixed.pool.npc_of_env, plain.mixed.pool.npc_of_env)


@pytest.mark.slow
def test_slots_are_filled_emptied_and_filled_again_and_every_episode_has_one_npc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, fused = (Game(3, 0.5, use_kernels=use_kernels, num_empty=1) for use_kernels in (False, True))
    play = FusedPlay(fused.env, fused.mixed, fused.experience, fused.metrics, tile=16)
    pools = [game.mixed.pool for game in (plain, fused)]
    begins: list[list[bool]] = []  # for each step and env: whether the NPC rows' states were zero before it
    states: list[Tensor] = []
    step = policy_step_module.policy_step

    def noting(policies: StackedPolicies, learner: StepRows, npc: StepRows, *args: object, **rest: object) -> None:
        begins.append((npc.state.view(NUM_ENVS, -1) == 0).all(dim=1).tolist())
        states.append(fused_pool.npc_of_env.clone())
        step(policies, learner, npc, *args, **rest)  # type: ignore[arg-type]

    plain_pool, fused_pool = pools
    assert plain_pool is not None
    assert fused_pool is not None
    monkeypatch.setattr(policy_step_module, "policy_step", noting)
    recorded = Recorded(fused.env)
    for i, shares in enumerate(([0.5, 0.25, 0.25, 0.0], [0.0, 0.25, 0.0, 0.75], [0.5, 0.0, 0.5, 0.0], [0.0, 0, 0, 1])):
        for pool in (plain_pool, fused_pool):
            if shares[3] > 0:
                torch.manual_seed(i)
                net = build_policy(
                    "fast", {"hidden_size": 16}, plain.env.spec.observation_space, plain.env.spec.actions
                )
                net.heads.weight.data.mul_(30.0)
                assert int(pool.live()[3]) == 0
                pool.put(3, f"snapshot-{i}", net.state_dict())
            pool.set_probabilities(shares)
        numbers = plain.mixed.random_numbers(1, i * HORIZON, HORIZON)
        collect_rollout(plain.env, plain.mixed, plain.experience, plain.metrics, numbers)
        play(numbers)
        assert torch.equal(fused.experience.actions, plain.experience.actions)
        assert torch.equal(fused.mixed.actions, plain.mixed.actions)
        assert torch.equal(fused_pool.npc_of_env, plain_pool.npc_of_env)
        assert torch.equal(fused.metrics.sums, plain.metrics.sums)
    ends = torch.stack(recorded.ends)
    changed = torch.stack(states)[1:] != torch.stack(states)[:-1]
    assert not (changed & ~ends[:-1]).any()  # an NPC stays for the whole episode
    assert changed.any()
    assert torch.tensor(begins)[1:][ends[:-1]].all()  # and begins it with nothing in mind
    assert not torch.tensor(begins)[1:][~ends[:-1]].any()
    assert {k for played in states for k in played.tolist()} == {0, 1, 2, 3}


def test_what_does_not_fit_is_said() -> None:
    game = Game(1, 0.5, use_kernels=False)
    torch.manual_seed(1)
    space, actions = game.env.spec.observation_space, game.env.spec.actions
    assert "arena" in why_not_fused(object(), game.mixed)
    for other in (build_policy("fast", {"hidden_size": 32}, space, actions), build_policy("mlp", {}, space, actions)):
        npc = Npc(name="other", policy=other)
        game.mixed.pool = NpcPool([npc], num_envs=NUM_ENVS, num_npc=2, device=CPU)
        assert "one size" in why_not_fused(game.env, game.mixed)
    game.mixed.learner, game.mixed.pool = build_policy("fast", {"hidden_size": 512}, space, actions), None
    assert "hidden_size=512 in torch.float32 is too large" in why_not_fused(game.env, game.mixed)
