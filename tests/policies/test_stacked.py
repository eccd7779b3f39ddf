"""Stacked policies: the grouped step gives each row what its own policy gives, however rows and policies are mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dual_policy_plugin.policies import stacked
from dual_policy_plugin.policies.nets import FastPolicy, MlpPolicy
from dual_policy_plugin.policies.stacked import StackedPolicies, sort_rows
from dual_policy_plugin.types import ObservationSpace

ACTIONS = ("noop", "left", "right")
SPACE = ObservationSpace(
    kind="window", shape=(12,), features=("empty", "wall", "foe"), window=(3, 3), own=("ore", "time"), scales=(2, 255)
)
HIDDEN = 16


def make_policy(
    seed: int, *, space: ObservationSpace = SPACE, hidden_size: int = HIDDEN, dtype: torch.dtype = torch.float32
) -> FastPolicy:
    torch.manual_seed(seed)
    policy = FastPolicy(space, ACTIONS, hidden_size=hidden_size)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # logits and biases that matter
    policy.compute_dtype = dtype
    policy.pack()
    return policy.requires_grad_(False)


def make_rows(num_rows: int) -> tuple[Tensor, Tensor]:
    obs = torch.randint(0, 3, (num_rows, 12), dtype=torch.uint8)
    obs[:, 9:] *= 50
    return obs, torch.randn(num_rows, 2 * HIDDEN)


def make_stack(policies: list[FastPolicy]) -> StackedPolicies:
    stack = StackedPolicies(policies[0], len(policies))
    for k, policy in enumerate(policies):
        stack.put(k, policy)
    return stack


def each_by_its_own(
    policies: list[FastPolicy], obs: Tensor, state: Tensor, policy_of_row: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin: outputs (num_rows, A + 1) and new states (num_rows, 2H), one call for each policy."""
    outputs, new_state = torch.zeros(len(obs), len(ACTIONS) + 1), torch.zeros_like(state)
    for k, policy in enumerate(policies):
        rows = policy_of_row == k
        logits, values, new_state[rows] = policy.forward_step(obs[rows], state[rows])
        outputs[rows] = torch.cat([logits, values.unsqueeze(1)], dim=1)
    return outputs, new_state


@pytest.mark.parametrize("block_rows", [16, 1024])
@pytest.mark.parametrize(("num_policies", "num_envs"), [(1, 5), (3, 7), (5, 40), (16, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_step_is_every_policys_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_policies: int, num_envs: int, block_rows: int
) -> None:
    monkeypatch.setattr(stacked, "BLOCK_ROWS", block_rows)
    policies = [make_policy(k, dtype=dtype) for k in range(num_policies)]
    policy_of_env = torch.randint(0, num_policies, (num_envs,))
    policy_of_env[policy_of_env == 1] = 0  # policy 1 plays nowhere
    obs, state = make_rows(3 * num_envs)
    before = state.clone()
    rows = sort_rows(policy_of_env, num_policies, rows_per_env=3, tile=stacked.TILE)
    outputs, new_state = make_stack(policies).step(obs, state, rows)
    assert torch.equal(state, before)
    expected = each_by_its_own(policies, obs, state, policy_of_env.repeat_interleave(3))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # a product of other shape may round the last bit otherwise
    torch.testing.assert_close(outputs.t()[rows.slot_of_row], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(new_state[rows.slot_of_row], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("num_policies", [1, 2, 16])
def test_rows_are_sorted_by_policy_and_stably(num_policies: int, tile: int) -> None:
    torch.manual_seed(num_policies)
    policy_of_env = torch.randint(0, num_policies, (50,))
    rows = sort_rows(policy_of_env, num_policies, rows_per_env=3, tile=tile)
    policy_of_row = policy_of_env.repeat_interleave(3)
    assert torch.equal(rows.row_of_slot[rows.slot_of_row], torch.arange(150))
    assert torch.equal(rows.policy_of_slot[rows.slot_of_row], policy_of_row)
    assert torch.equal(rows.slot_of_row.argsort(), policy_of_row.argsort(stable=True))
    assert all((stop - start) % tile == 0 for _, start, stop in rows.bounds)
    assert [(k, stop - start - (policy_of_row == k).sum() < tile) for k, start, stop in rows.bounds] == [
        (k, True) for k in policy_of_env.unique().tolist()
    ]
    for k, start, stop in rows.bounds:
        assert (rows.policy_of_slot[start:stop] == k).all()


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([(0, 0, 320), (2, 320, 640), (3, 640, 1056)], [[(0, 0, 320), (2, 320, 640), (3, 640, 1056)]]),
        ([(0, 0, 4096)], [[(0, i, i + 1024)] for i in range(0, 4096, 1024)]),
        ([(0, 0, 1040)], [[(0, 0, 1040)]]),  # no piece of 16 rows
        ([(0, 0, 16), (1, 16, 1616)], [[(0, 0, 16), (1, 16, 816), (1, 816, 1616)]]),
        ([(0, 0, 1000), (1, 1000, 2500)], [[(0, 0, 1000)], [(1, 1000, 2500)]]),
    ],
)
def test_blocks_hold_groups_or_pieces_of_one(
    bounds: list[tuple[int, int, int]], expected: list[list[tuple[int, int, int]]]
) -> None:
    assert list(stacked._blocks(bounds)) == expected


def test_a_policy_that_is_put_again_replaces_the_old_one_in_place() -> None:
    first, second, third = (make_policy(seed) for seed in (1, 2, 3))
    stack = make_stack([first, second])
    tensors = {name: tensor for name, tensor in vars(stack).items() if isinstance(tensor, Tensor)}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    stack.put(1, third, is_greedy=True)
    assert {name: getattr(stack, name).data_ptr() for name in addresses} == addresses
    fresh = make_stack([first, third])
    for name in ("encoder", "lstm", "lstm_bias", "heads", "heads_bias", "tables"):
        assert torch.equal(getattr(stack, name), getattr(fresh, name))
        assert (getattr(stack, name) != 0).any()
    assert stack.is_greedy.tolist() == [False, True]


def test_what_stands_in_a_stack_is_what_the_policy_packed() -> None:
    policy = make_policy(1)
    stack = make_stack([make_policy(0), policy])
    assert torch.equal(stack.lstm[1], torch.cat([policy.weight_ih, policy.weight_hh]))
    assert torch.equal(stack.lstm_bias[1], policy.bias)
    assert torch.equal(stack.heads[1], policy.heads.weight.t())
    assert torch.equal(stack.heads_bias[1], policy.heads.bias)
    assert torch.equal(stack.encoder[1], policy.encoder.stacked_rows(torch.float32))
    assert torch.equal(stack.own_scale, torch.tensor([1 / 2, 1 / 255]))
    assert (stack.num_cells, stack.num_codes) == (9, 3)


def test_only_equal_nets_over_a_window_fit() -> None:
    like = make_policy(0)
    assert StackedPolicies.fits(make_policy(1), like)
    vector = ObservationSpace(kind="vector", shape=(4,), features=("a", "b", "c", "d"))
    others = [
        MlpPolicy(SPACE, ACTIONS, hidden_size=HIDDEN),
        FastPolicy(SPACE, ("noop", "left"), hidden_size=HIDDEN),
        FastPolicy(vector, ACTIONS, hidden_size=HIDDEN),
        make_policy(1, hidden_size=32),
        make_policy(1, dtype=torch.bfloat16),
        make_policy(1, space=replace(SPACE, scales=(3, 255))),
        make_policy(1, space=replace(SPACE, features=("empty", "wall", "foe", "mine", "altar"))),
    ]
    assert not any(StackedPolicies.fits(other, like) for other in others)
    assert not StackedPolicies.fits(others[2], others[2])
