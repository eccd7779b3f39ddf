"""The pool: each NPC acts in its own envs, grouped or not, on views or on all; its tensors stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.policies import pool as pool_module
from dual_policy_plugin.policies.nets import MlpPolicy
from dual_policy_plugin.policies.pool import Npc, NpcPool, zero_rows
from dual_policy_plugin.policies.sampling import sample_actions
from tests.policies.test_stacked import ACTIONS, HIDDEN, SPACE, make_policy, make_rows

CPU = torch.device("cpu")
NUM_ENVS, NUM_NPC = 14, 3
NUM_ROWS = NUM_ENVS * NUM_NPC


def make_mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    policy = MlpPolicy(SPACE, ACTIONS, hidden_size=HIDDEN)
    policy.pack()
    return policy.requires_grad_(False)


def make_pool(policies: list[nn.Module], *, greedy: tuple[int, ...] = ()) -> NpcPool:
    """A pool whose states and seats are all different; NPC 1 plays nowhere where there are more than two."""
    npcs = [Npc(name=str(k), policy=policy, is_greedy=k in greedy) for k, policy in enumerate(policies)]
    pool = NpcPool(npcs, num_envs=NUM_ENVS, num_npc=NUM_NPC, device=CPU)
    torch.manual_seed(5)
    choices = torch.tensor([k for k in range(len(npcs)) if len(npcs) <= 2 or k != 1])
    pool.npc_of_env.copy_(choices[torch.randint(0, len(choices), (NUM_ENVS,))])
    pool.state.copy_(torch.randn_like(pool.state))
    return pool


def each_by_its_own(pool: NpcPool, obs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin: actions and states, row by row's own policy."""
    actions, state = torch.zeros(NUM_ROWS, dtype=torch.int64), pool.state.clone()
    npc_of_row = pool.npc_of_env.repeat_interleave(NUM_NPC)
    for k, npc in enumerate(pool.npcs):
        rows, size = npc_of_row == k, npc.policy.state_size
        logits, _, state[rows, :size] = npc.policy.forward_step(obs[rows], state[rows, :size])
        actions[rows] = logits.argmax(dim=1) if npc.is_greedy else sample_actions(logits, uniforms[rows])
    return actions, state


POOLS = {
    "one": lambda: make_pool([make_policy(0)]),
    "one greedy": lambda: make_pool([make_policy(0)], greedy=(0,)),
    "stacked": lambda: make_pool([make_policy(k) for k in range(4)]),
    "stacked, some greedy": lambda: make_pool([make_policy(k) for k in range(4)], greedy=(0, 3)),
    "of two sizes": lambda: make_pool([make_policy(0), make_policy(1), make_policy(2, hidden_size=8)], greedy=(2,)),
    "with one that has no memory": lambda: make_pool([make_policy(0), make_mlp(1)]),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("way", ["sorted", "all rows, as on a GPU"])
def test_every_row_is_played_by_its_own_npc(monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    pool = POOLS[name]()
    if way != "sorted":
        monkeypatch.setattr(NpcPool, "_act_sorted", NpcPool._act_all)
    for _ in range(3):
        obs, _ = make_rows(NUM_ROWS)
        uniforms = torch.rand(NUM_ROWS)
        actions, state = each_by_its_own(pool, obs, uniforms)
        assert torch.equal(pool.act(obs, uniforms), actions)
        torch.testing.assert_close(pool.state, state, rtol=1e-6, atol=1e-6)
        pool.npc_of_env.copy_(pool.npc_of_env.roll(1))  # others play now


@pytest.mark.parametrize(
    ("name", "is_stacked"),
    [("one", False), ("stacked", True), ("of two sizes", False), ("with one that has no memory", False)],
)
def test_equal_npcs_are_stacked_and_run_in_one_grouped_step(
    monkeypatch: pytest.MonkeyPatch, name: str, is_stacked: bool
) -> None:
    calls: list[int] = []
    step = pool_module.StackedPolicies.step

    def counted(self: object, obs: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        calls.append(len(obs))
        return step(self, obs, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(pool_module.StackedPolicies, "step", counted)
    POOLS[name]().act(make_rows(NUM_ROWS)[0], torch.rand(NUM_ROWS))
    assert calls == ([NUM_ROWS] if is_stacked else [])


@pytest.mark.parametrize("name", ["one", "stacked", "of two sizes"])
def test_parts_play_as_the_whole_does_and_share_its_tensors(name: str) -> None:
    whole, split = POOLS[name](), POOLS[name]()
    parts = [split.part(slice(0, 5)), split.part(slice(5, NUM_ENVS))]
    for _ in range(3):
        obs, _ = make_rows(NUM_ROWS)
        uniforms, draws = torch.rand(NUM_ROWS), torch.rand(NUM_ENVS)
        ends = torch.rand(NUM_ENVS) < 0.3
        expected = whole.act(obs, uniforms)
        cut = 5 * NUM_NPC
        actions = [parts[0].act(obs[:cut], uniforms[:cut]), parts[1].act(obs[cut:], uniforms[cut:])]
        assert torch.equal(torch.cat(actions), expected)
        whole.end_steps(ends.repeat_interleave(NUM_NPC), ends, draws)
        for part, envs in zip(parts, (slice(0, 5), slice(5, NUM_ENVS)), strict=True):
            part.end_steps(ends[envs].repeat_interleave(NUM_NPC), ends[envs], draws[envs])
        assert torch.equal(split.npc_of_env, whole.npc_of_env)
        torch.testing.assert_close(split.state, whole.state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("way", ["sorted", "all rows, as on a GPU"])
def test_tensors_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    if way != "sorted":
        monkeypatch.setattr(NpcPool, "_act_sorted", NpcPool._act_all)
    pool = POOLS[name]()
    tensors = (pool.state, pool.npc_of_env, pool.probabilities)
    before = [tensor.clone() for tensor in tensors]
    for _ in range(2):
        pool.act(make_rows(NUM_ROWS)[0], torch.rand(NUM_ROWS))
        ends = torch.ones(NUM_ENVS, dtype=torch.bool)
        ends[0] = False
        pool.end_steps(ends.repeat_interleave(NUM_NPC), ends, torch.rand(NUM_ENVS))
    assert pool.state is tensors[0]
    assert pool.npc_of_env is tensors[1]
    assert pool.probabilities is tensors[2]
    assert not torch.equal(pool.state, before[0])
    assert (pool.state[NUM_NPC:] == 0).all()
    assert (pool.state[:NUM_NPC] != 0).any()
    assert torch.equal(pool.npc_of_env, before[1]) == (len(pool.npcs) == 1)


def test_an_episodes_end_draws_the_next_npc_from_the_probabilities() -> None:
    pool = make_pool([make_policy(k) for k in range(4)])
    pool.probabilities.copy_(torch.tensor([0.5, 0.0, 0.25, 0.2499]))  # rounding may leave the sum below 1
    pool.npc_of_env.fill_(3)
    ends = torch.ones(NUM_ENVS, dtype=torch.bool)
    ends[0] = False
    draws = torch.tensor([0.0, 0.0, 0.4999, 0.5, 0.7499, 0.75, 0.9999] * 2)
    pool.end_steps(torch.zeros(NUM_ROWS, dtype=torch.bool), ends, draws)
    assert pool.npc_of_env.tolist() == [3, 0, 0, 2, 2, 3, 3, 0, 0, 0, 2, 2, 3, 3]


def test_rows_that_are_done_are_zeroed_even_where_they_hold_nan() -> None:
    state = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.inf, 4.0]])
    zero_rows(state, torch.tensor([True, False, True]))
    assert torch.equal(state, torch.tensor([[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]))
