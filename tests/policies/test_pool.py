"""The pool: each NPC acts in its own envs, grouped or not, on views or on all; its tensors stay where they are; slots
are filled, emptied and filled again under all that reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.policies import pool as pool_module
from dual_policy_plugin.policies.binding import BoundPolicy
from dual_policy_plugin.policies.nets import MlpPolicy
from dual_policy_plugin.policies.pool import Npc, NpcPool, empty_slots, zero_rows
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


SLOTS = {
    "stacked": lambda: [Npc(name="a", policy=make_policy(0)), *empty_slots(make_policy(9), 3)],
    "no npc yet": lambda: empty_slots(make_policy(9), 3),
    "beside another kind": lambda: [Npc(name="a", policy=make_mlp(0)), *empty_slots(make_policy(9), 2)],
    "bound to the env": lambda: empty_slots(make_bound(9), 2),
}


def make_bound(seed: int) -> nn.Module:
    """A policy that numbers the actions otherwise than the env."""
    return BoundPolicy(make_policy(seed), columns=None, codes=None, action_columns=torch.tensor([2, 0, 1]))


def slot_pool(name: str) -> NpcPool:
    return NpcPool(SLOTS[name](), num_envs=NUM_ENVS, num_npc=NUM_NPC, device=CPU)


def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many rows each later call of a net has."""
    calls: list[int] = []
    step = MlpPolicy.forward_step, pool_module.FastPolicy.forward_step

    def noting(which: int) -> object:
        def forward_step(self: object, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            calls.append(len(obs))
            return step[which](self, obs, state)  # type: ignore[arg-type]

        return forward_step

    monkeypatch.setattr(MlpPolicy, "forward_step", noting(0))
    monkeypatch.setattr(pool_module.FastPolicy, "forward_step", noting(1))
    return calls


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("way", ["sorted", "all rows, as on a GPU"])
def test_a_slot_that_was_put_twice_plays_as_in_a_fresh_pool(
    monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    if way != "sorted":
        monkeypatch.setattr(NpcPool, "_act_sorted", NpcPool._act_all)
    pool = slot_pool(name)
    last = len(pool.npcs) - 1
    objects = [npc.policy for npc in pool.npcs], [stack for _, stack in pool._stacks]
    places = [tensor.data_ptr() for tensor in pool.weights(last).values()]
    envs = torch.arange(NUM_ENVS) % 2 * last  # slot 0 and the last one
    if not pool.npcs[0].name:
        pool.put(0, "a", make_policy(0).state_dict())
    for seed in (1, 2):
        pool.npc_of_env.fill_(0)
        pool.put(last, f"policy {seed}", make_policy(seed).state_dict())
        pool.npc_of_env.copy_(envs)
        pool.state.zero_()
        fresh = slot_pool(name)
        net = make_bound(seed) if name == "bound to the env" else make_policy(seed)
        fresh.npcs[last] = Npc(name="", policy=net)
        first = {"beside another kind": make_mlp(0), "bound to the env": make_bound(0)}.get(name, make_policy(0))
        fresh.npcs[0] = Npc(name="", policy=first)
        fresh._stack = pool_module._stack(fresh.npcs)
        fresh.npc_of_env.copy_(envs)
        for _ in range(2):
            obs, uniforms = make_rows(NUM_ROWS)[0], torch.rand(NUM_ROWS)
            assert torch.equal(pool.act(obs, uniforms), fresh.act(obs, uniforms))
        assert torch.equal(pool.state, fresh.state)
        assert pool.npcs[last].name == f"policy {seed}"
    assert objects == ([npc.policy for npc in pool.npcs], [stack for _, stack in pool._stacks])
    assert places == [tensor.data_ptr() for tensor in pool.weights(last).values()]


def test_what_is_put_reaches_the_stack_of_the_fused_rollout_and_siblings() -> None:
    pool = slot_pool("stacked")
    stack = pool.stack_behind(make_policy(7))
    sibling = pool.with_seats(1)
    assert sibling.stack_behind(make_policy(7)) is stack
    before = stack.lstm.clone()
    sibling.put(2, "new", make_policy(5).state_dict())
    expected = make_policy(5)
    assert expected.lstm is not None
    assert torch.equal(stack.lstm[3], expected.lstm.weight)  # slot 2 stands behind the learner
    assert torch.equal(
        stack.tables[3 * stack.layout.num_rows :][: stack.layout.num_rows], expected.packed("encoder", "table")
    )
    assert [k for k in range(5) if not torch.equal(stack.lstm[k], before[k])] == [3]
    assert pool.npcs[2].name == "new"
    assert sibling.state.shape == (NUM_ENVS, pool.state.shape[1])
    assert sibling.npc_of_env is pool.npc_of_env
    assert sibling.probabilities is pool.probabilities
    pool.clear(2)
    assert sibling.npcs[2].name == ""


def test_a_slot_is_not_overwritten_while_an_env_plays_it() -> None:
    pool = slot_pool("stacked")
    weights = make_policy(1).state_dict()
    pool.put(1, "b", weights)
    pool.npc_of_env[3] = 1
    before = pool.weights(1)["weight_ih"].clone()
    with pytest.raises(AssertionError, match="slot 1 is still played"):
        pool.put(1, "c", make_policy(2).state_dict())
    with pytest.raises(AssertionError, match="belongs to an NPC of the config"):
        pool.put(0, "c", weights)
    assert torch.equal(pool.weights(1)["weight_ih"], before)
    assert pool.npcs[1].name == "b"
    assert pool.live().tolist() == [NUM_ENVS - 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["stacked", "beside another kind"])
def test_a_slot_without_rows_costs_no_call(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pool = slot_pool(name)
    calls = forwarded(monkeypatch)
    pool.act(make_rows(NUM_ROWS)[0], torch.rand(NUM_ROWS))
    assert calls == ([] if name == "stacked" else [NUM_ROWS])  # the stack steps its rows itself
    assert pool._rows is not None
    assert [bounds[0] for bounds in pool._rows.bounds] == [0]


def test_first_npcs_are_spread_by_the_probabilities_and_no_empty_slot_plays() -> None:
    pool = slot_pool("stacked")
    assert pool.npc_of_env.tolist() == [0] * NUM_ENVS
    pool.put(2, "c", make_policy(2).state_dict())
    pool.put(3, "d", make_policy(3).state_dict())
    pool.state.fill_(1.0)
    pool.set_probabilities([0.5, 0.0, 0.25, 0.25])
    pool.start_episodes()
    assert pool.npc_of_env.tolist() == [0] * 7 + [2] * 3 + [3] * 4  # env 10: 10.5 of 14 is just 0.75
    assert (pool.state == 0).all()
    ends = torch.ones(NUM_ENVS, dtype=torch.bool)
    pool.set_probabilities([0.5, 0.0, 0.5, 0.0])
    pool.end_steps(ends.repeat_interleave(NUM_NPC), ends, torch.tensor([0.0, 0.5, 1 - 2.0**-24] * 4 + [0.0, 0.0]))
    assert pool.npc_of_env.tolist() == [0, 2, 2] * 4 + [0, 0]
    with pytest.raises(AssertionError, match="nobody would play"):
        pool.set_probabilities([0.5, 0.5, 0.0, 0.0])
    with pytest.raises(AssertionError, match="do not sum to 1"):
        pool.set_probabilities([0.5, 0.0, 0.0, 0.0])


def test_npcs_without_a_word_on_it_have_equal_parts() -> None:
    pool = NpcPool([Npc(name=str(k), policy=make_policy(k)) for k in range(3)], num_envs=9, num_npc=1, device=CPU)
    assert pool.npc_of_env.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert pool.probabilities.sum() == 1
    assert slot_pool("no npc yet").npc_of_env.tolist() == [-1] * NUM_ENVS


def test_empty_slots_are_frozen_copies() -> None:
    learner = make_policy(0).train().requires_grad_()
    learner.pack()
    (slot,) = empty_slots(learner, 1)
    assert not slot.policy.training
    assert not any(parameter.requires_grad for parameter in slot.policy.parameters())
    with torch.no_grad():
        learner.weight_ih.zero_()
    assert slot.policy.weight_ih.abs().sum() > 0
    assert learner.training
    assert not slot.is_greedy


def test_packing_reads_the_weights_of_the_slots_anew_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NpcPool, "_act_sorted", NpcPool._act_all)  # the way of a recording, which holds packed copies
    pool = slot_pool("beside another kind")
    pool.npc_of_env.fill_(2)
    packed: list[int] = []
    for k, npc in enumerate(pool.npcs):
        pack = npc.policy.pack
        monkeypatch.setattr(npc.policy, "pack", lambda k=k, pack=pack: (packed.append(k), pack()))
    for key, tensor in make_policy(5).state_dict().items():
        pool.weights(2)[key].copy_(tensor)
    pool.pack()
    assert packed == [1, 2]
    obs, uniforms = make_rows(NUM_ROWS)[0], torch.rand(NUM_ROWS)
    logits, _, _ = make_policy(5).forward_step(obs, pool.state.clone())
    assert torch.equal(pool.act(obs, uniforms), sample_actions(logits, uniforms))
