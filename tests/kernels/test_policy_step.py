"""The fused policy step against the plain one: FastPolicy.forward_step, sample_actions, log_probs_of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dual_policy_plugin.kernels.group_rows import allocate_row_groups, group_rows
from dual_policy_plugin.kernels.policy_step import StepRows, policy_step, supports
from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.policies.sampling import log_probs_of, sample_actions
from dual_policy_plugin.policies.stacked import StackedPolicies
from dual_policy_plugin.types import ObservationSpace

CPU = torch.device("cpu")
TILE = 16
SPACE = ObservationSpace(
    kind="window",
    shape=(12,),
    features=("empty", "wall", "ally", "foe"),
    window=(3, 3),
    own=("health", "time"),
    scales=(10.0, 255.0),
)


def make_policies(num_policies: int, *, hidden: int, num_actions: int) -> list[FastPolicy]:
    policies = []
    for seed in range(num_policies):
        torch.manual_seed(seed)
        policy = FastPolicy(SPACE, tuple(f"a{i}" for i in range(num_actions)), hidden_size=hidden)
        with torch.no_grad():
            for parameter in policy.parameters():  # larger than at a run's start, so that every part has its say
                parameter.copy_(torch.randn(parameter.shape) * (0.6 if parameter.dim() < 3 else 0.3))
        policy.pack()
        policies.append(policy)
    return policies


def stack(policies: list[FastPolicy], greedy: set[int]) -> StackedPolicies:
    stacked = StackedPolicies(policies[0], len(policies))
    for k, policy in enumerate(policies):
        stacked.put(k, policy, is_greedy=k in greedy)
    return stacked


def make_rows(num_envs: int, seats: list[int], hidden: int, generator: torch.Generator) -> StepRows:
    num_rows = num_envs * len(seats)
    obs = torch.zeros(num_rows, 12, dtype=torch.uint8)
    obs[:, :9] = torch.randint(0, 4, (num_rows, 9), generator=generator)
    obs[:, 9] = torch.randint(0, 11, (num_rows,), generator=generator)
    obs[:, 10] = torch.randint(0, 256, (num_rows,), generator=generator)
    return StepRows(
        obs=obs,
        state=torch.randn(num_rows, 2 * hidden, generator=generator),
        uniforms=torch.rand(num_rows, generator=generator),
        seats=torch.tensor(seats),
    )


@dataclass(slots=True)
class Step:
    """What one step gave; `actions` as (num_envs, num_agents)."""

    actions: Tensor
    learner_actions: Tensor
    log_probs: Tensor
    values: Tensor


def plain_step(policies, greedy, learner, npc, npc_of_env, num_envs, num_agents) -> Step:
    """The twin: one call per policy; the states of `learner` and `npc` move on in place."""
    actions = torch.full((num_envs, num_agents), -1)
    logits, values, state = policies[0].forward_step(learner.obs, learner.state)
    learner.state.copy_(state)
    drawn = logits.argmax(dim=1) if 0 in greedy else sample_actions(logits, learner.uniforms)
    actions[:, learner.seats] = drawn.view(num_envs, -1)
    if npc is not None:
        npc_of_row = npc_of_env.repeat_interleave(len(npc.seats))
        npc_actions = torch.full((len(npc.obs),), -1)
        for k in range(len(policies) - 1):
            rows = npc_of_row == k
            npc_logits, _, state = policies[1 + k].forward_step(npc.obs[rows], npc.state[rows])
            npc.state[rows] = state
            is_greedy = 1 + k in greedy
            npc_actions[rows] = npc_logits.argmax(1) if is_greedy else sample_actions(npc_logits, npc.uniforms[rows])
        actions[:, npc.seats] = npc_actions.view(num_envs, -1)
    return Step(actions, drawn, log_probs_of(logits, drawn), values)


def fused_step(weights, learner, npc, groups, num_envs, num_agents) -> Step:
    num_rows = len(learner.obs)
    step = Step(
        actions=torch.full((num_envs, num_agents), -1),
        learner_actions=torch.full((num_rows,), -1),
        log_probs=torch.full((num_rows,), 9.0),
        values=torch.full((num_rows,), 9.0),
    )
    policy_step(
        weights, learner, npc, groups, actions=step.actions, learner_actions=step.learner_actions,
        log_probs=step.log_probs, values=step.values, tile=TILE,
    )  # fmt: skip
    return step


def compare(*, npc_of_env, seats, num_envs=7, hidden=64, num_actions=6, greedy=frozenset(), steps=2) -> None:
    """Two steps of both twins from the same start: actions equal, states, log-probs and values to 1e-5."""
    learner_seats, npc_seats = seats
    num_npcs = 0 if npc_of_env is None else int(npc_of_env.max()) + 1
    policies = make_policies(1 + num_npcs, hidden=hidden, num_actions=num_actions)
    weights = stack(policies, greedy)
    num_agents = len(learner_seats) + len(npc_seats)
    generator = torch.Generator().manual_seed(0)
    learner = make_rows(num_envs, learner_seats, hidden, generator)
    npc = make_rows(num_envs, npc_seats, hidden, generator) if npc_seats else None
    plain_learner = replace(learner, state=learner.state.clone())
    plain_npc = None if npc is None else replace(npc, state=npc.state.clone())
    groups = None
    if num_npcs > 1:
        groups = allocate_row_groups(
            num_envs=num_envs, num_npcs=num_npcs, rows_per_env=len(npc_seats), tile=TILE, device=CPU
        )
        group_rows(npc_of_env, groups, block=16)
    for _ in range(steps):
        plain = plain_step(policies, greedy, plain_learner, plain_npc, npc_of_env, num_envs, num_agents)
        fused = fused_step(weights, learner, npc, groups, num_envs, num_agents)
        assert (plain.actions >= 0).all()
        torch.testing.assert_close(fused.actions, plain.actions, rtol=0, atol=0)
        torch.testing.assert_close(fused.learner_actions, plain.learner_actions, rtol=0, atol=0)
        torch.testing.assert_close(fused.log_probs, plain.log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(fused.values, plain.values, rtol=0, atol=1e-5)
        torch.testing.assert_close(learner.state, plain_learner.state, rtol=0, atol=1e-5)
        if npc is not None:
            torch.testing.assert_close(npc.state, plain_npc.state, rtol=0, atol=1e-5)


def test_the_learner_alone_over_a_ragged_tile():
    compare(npc_of_env=None, seats=([0, 1, 2], []))  # 21 rows on tiles of 16


def test_the_learner_and_one_npc_without_sorting():
    compare(npc_of_env=torch.zeros(7, dtype=torch.int64), seats=([1, 3], [0, 2, 4]))


def test_three_npcs_with_an_empty_group_and_uneven_ones():
    # 18 rows of NPC 0, none of NPC 1, 3 of NPC 2
    compare(npc_of_env=torch.tensor([0, 0, 0, 2, 0, 0, 0]), seats=([3], [0, 1, 2]))


def test_greedy_policies_take_their_most_likely_action():
    compare(npc_of_env=torch.tensor([1, 0, 2, 2, 1, 0, 1]), seats=([0, 2], [1, 3]), greedy={0, 2})


@pytest.mark.parametrize(("hidden", "num_actions"), [(32, 2), (48, 16), (20, 5)])
def test_other_sizes(hidden, num_actions):
    compare(
        npc_of_env=torch.tensor([0, 1, 1]), seats=([0], [1]), num_envs=3, hidden=hidden, num_actions=num_actions,
        steps=1,
    )  # fmt: skip


def test_sampling_follows_the_given_uniforms():
    # one state, one observation, many uniforms: the actions are the inverse of the cumulative distribution
    policies = make_policies(1, hidden=32, num_actions=4)
    rows = make_rows(31, [0], 32, torch.Generator().manual_seed(0))
    obs, state = rows.obs[:1].repeat(31, 1), rows.state[:1].repeat(31, 1)
    logits, _, _ = policies[0].forward_step(obs[:1], state[:1])
    bounds = logits[0].softmax(0).cumsum(0)
    uniforms = torch.linspace(0, 1 - 2**-24, 31)
    assert (uniforms.unsqueeze(1) - bounds[:-1]).abs().min() > 1e-6
    rows = StepRows(obs=obs, state=state, uniforms=uniforms, seats=rows.seats)
    step = fused_step(stack(policies, set()), rows, None, None, 31, 1)
    assert step.learner_actions.tolist() == torch.bucketize(uniforms, bounds[:-1], right=True).tolist()
    assert step.learner_actions.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, at NaN - inf
def test_a_policy_that_diverged_shows_it():
    policies = make_policies(1, hidden=32, num_actions=5)
    weights = stack(policies, set())
    weights.encoder.fill_(float("nan"))
    step = fused_step(weights, make_rows(9, [0], 32, torch.Generator().manual_seed(0)), None, None, 9, 1)
    assert step.values.isnan().all()
    assert step.log_probs.isnan().all()


@pytest.mark.parametrize(
    ("capability", "kilobytes", "wide", "narrow"),
    [
        ((9, 0), 227, 256, 64),
        ((8, 0), 163, 256, 64),
        ((8, 9), 99, 128, 64),
        ((12, 0), 99, 128, 64),
        ((7, 5), 64, 64, 32),
    ],
)
def test_a_chip_runs_what_it_can_hold(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kilobytes: int, wide: int, narrow: int
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    sizes = (16, 32, 64, 65, 128, 129, 256, 257)
    for dtype, largest in ((torch.bfloat16, wide), (torch.float32, narrow)):
        assert max(size for size in sizes if supports(size, dtype, torch.device("cuda"))) == largest
    assert supports(256, torch.float32, torch.device("cpu"))
    assert not supports(512, torch.float32, torch.device("cpu"))
