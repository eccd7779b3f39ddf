"""The window encoder's kernels give what the plain encoder gives, and the same gradients."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.envs.arena_config import ArenaConfig, observation_space
from dual_policy_plugin.kernels import window
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.encoders import CHUNK, WindowEncoder
from dual_policy_plugin.types import ObservationSpace

ARENA = observation_space(ArenaConfig())
SMALL = ObservationSpace(
    kind="window",
    shape=(12,),
    features=("empty", "wall", "ore", "foe"),
    window=(3, 3),
    own=("ore", "time"),
    scales=(200.0, 255.0),
)
# 90 cells: 90 % 64 + 40 own bytes and the bias need two chunks
MUCH_OWN = ObservationSpace(
    kind="window",
    shape=(130,),
    features=("empty", "wall"),
    window=(9, 10),
    own=tuple(f"own{i}" for i in range(40)),
    scales=tuple(200.0 + i for i in range(40)),
)
NO_OWN = ObservationSpace(kind="window", shape=(64,), features=("empty", "wall", "foe"), window=(8, 8))


def make_encoder(space: ObservationSpace, width: int) -> WindowEncoder:
    torch.manual_seed(0)
    encoder = WindowEncoder(space, width)
    torch.nn.init.normal_(encoder.bias)
    return encoder


def observations(space: ObservationSpace, num_rows: int) -> torch.Tensor:
    """Random rows with all codes, own state up to 255 and padding that must not count."""
    torch.manual_seed(1)
    num_cells = space.window[0] * space.window[1]
    obs = torch.randint(0, 256, (num_rows, *space.shape), dtype=torch.uint8)
    obs[:, :num_cells] %= len(space.features)
    return obs


def results(encoder: WindowEncoder, obs: torch.Tensor, *, use_kernels: bool) -> dict[str, torch.Tensor]:
    """The encoding and the gradients of all parameters under a fixed random gradient of the encoding."""
    for parameter in encoder.parameters():
        parameter.grad = None
    encoded = encoder(obs, torch.float32, use_kernels=use_kernels)
    torch.manual_seed(2)
    encoded.backward(torch.randn(encoded.shape))
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert set(grads) == {"table", "own", "bias"}
    return {"encoded": encoded.detach(), **grads}


def assert_agree(encoder: WindowEncoder, obs: torch.Tensor) -> None:
    plain = results(encoder, obs, use_kernels=False)
    fused = results(encoder, obs, use_kernels=True)
    for name, expected in plain.items():
        assert fused[name].shape == expected.shape
        torch.testing.assert_close(fused[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)


# 1 row; a full block of 16; blocks and a ragged one
@pytest.mark.parametrize("num_rows", [1, 16, 37])
def test_small_window(num_rows: int) -> None:
    assert_agree(make_encoder(SMALL, 16), observations(SMALL, num_rows))


@pytest.mark.parametrize("space", [ARENA, MUCH_OWN, NO_OWN], ids=["arena", "much own state", "no own state"])
def test_other_windows(space: ObservationSpace) -> None:
    assert_agree(make_encoder(space, 16), observations(space, 21))


@pytest.mark.parametrize("width", [1, 20, 130])  # not a power of two; more than one block of columns
def test_any_width(width: int) -> None:
    assert_agree(make_encoder(SMALL, width), observations(SMALL, 19))


def test_empty_windows_encode_to_the_bias() -> None:
    encoder = make_encoder(ARENA, 16)
    obs = torch.zeros(5, 128, dtype=torch.uint8)
    encoded = encoder(obs, torch.float32, use_kernels=True)
    assert torch.equal(encoded, encoder.bias.expand(5, 16))
    encoded.sum().backward()
    assert encoder.table.grad is not None
    assert encoder.own.grad is not None
    assert encoder.bias.grad is not None
    assert not encoder.table.grad.any()
    assert not encoder.own.grad.any()
    assert torch.equal(encoder.bias.grad, torch.full((16,), 5.0))


def test_every_code_of_every_cell_has_its_own_row() -> None:
    encoder = make_encoder(SMALL, 16)
    for cell in range(9):
        obs = torch.zeros(4, 12, dtype=torch.uint8)
        obs[:, cell] = torch.arange(4)
        encoded = encoder(obs, torch.float32, use_kernels=True) - encoder.bias
        expected = torch.cat([torch.zeros(1, 16), encoder.table[cell]])
        torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)


def test_a_minibatch_of_one_row_lies_apart_in_memory() -> None:
    encoder = make_encoder(SMALL, 16)
    obs = observations(SMALL, 12).view(4, 3, 12)[:, 1:2].flatten(0, 1)
    assert not obs.is_contiguous()
    assert_agree(encoder, obs)


def test_padding_does_not_count() -> None:
    encoder = make_encoder(ARENA, 16)
    obs = observations(ARENA, 7)
    blank = obs.clone()
    blank[:, 126:] = 0
    first, second = (results(encoder, rows, use_kernels=True) for rows in (obs, blank))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_gradient_is_summed_over_slices_and_repeats_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(SMALL, 16)
    obs = observations(SMALL, 70)  # 5 blocks of 16 rows
    plain = results(encoder, obs, use_kernels=False)
    # 256 feature rows make 4 blocks: 12 programs cut the rows into 3 slices of 2, 2 and 1 blocks
    for num_programs in (1, 12):
        monkeypatch.setattr(window, "_NUM_PROGRAMS", num_programs)
        first, second = (results(encoder, obs, use_kernels=True) for _ in range(2))
        for name, expected in plain.items():
            torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=2e-5)
            assert torch.equal(first[name], second[name])


def features_plain(obs: torch.Tensor, encoder: WindowEncoder) -> torch.Tensor:
    """F (num_rows, num_features) as the head of kernels/window.py describes it, column by column."""
    num_cells, num_own = encoder.num_cells, encoder.num_own
    cells = obs[:, :num_cells]
    columns = []
    for code in range(1, encoder.num_codes):
        columns += [*(cells == code).float().unbind(1), *torch.zeros(-num_cells % 64, len(obs))]
    columns += torch.zeros(num_cells % 64, len(obs))
    columns += (obs[:, num_cells : num_cells + num_own] * encoder.own_scale).unbind(1)
    columns.append(torch.ones(len(obs)))
    columns += torch.zeros(-len(columns) % 64, len(obs))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("space", [ARENA, MUCH_OWN], ids=["arena", "much own state"])
def test_the_kernels_are_products_with_the_feature_matrix(space: ObservationSpace) -> None:
    encoder = make_encoder(space, 16)
    obs = observations(space, 21)
    features = features_plain(obs, encoder)
    assert features.shape == (21, encoder.num_features)
    weights, grad = torch.randn(encoder.num_features, 16), torch.randn(21, 16)  # padding rows are not zero here
    sizes = {"num_cells": encoder.num_cells, "num_codes": encoder.num_codes}
    encoded = window.encode_window(obs, weights, encoder.own_scale, **sizes)
    torch.testing.assert_close(encoded, features @ weights, rtol=1e-5, atol=1e-5)
    weight_grad = window.window_weight_grad(obs, grad, encoder.own_scale, **sizes)
    torch.testing.assert_close(weight_grad, features.t() @ grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", [ARENA, SMALL, MUCH_OWN, NO_OWN])
def test_feature_rows_hold_all_parameters_and_zeros(space: ObservationSpace) -> None:
    encoder = make_encoder(space, 16)
    rows = encoder.stacked_rows(torch.float32)
    counted = window.count_features(encoder.num_cells, encoder.num_codes, encoder.num_own)
    assert encoder.num_features == len(rows) == counted
    assert len(rows) % CHUNK == 0
    assert CHUNK == window.CHUNK
    assert not rows.requires_grad
    parameters = torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
    assert torch.equal(rows[rows != 0].sort().values, parameters.sort().values)
    assert torch.equal(encoder.stacked_rows(torch.bfloat16), rows.bfloat16())


def test_the_switch_picks_the_kernels() -> None:
    encoder = make_encoder(SMALL, 16)
    obs = observations(SMALL, 3)
    for use_kernels, name in ((True, "_WindowProductBackward"), (False, "_WindowSumBackward")):
        assert type(encoder(obs, torch.float32, use_kernels=use_kernels).grad_fn).__name__ == name


def test_the_arena_has_960_feature_rows() -> None:
    assert make_encoder(ARENA, 16).num_features == 7 * 128 + 64


def test_encode_window_writes_into_the_given_tensor() -> None:
    encoder = make_encoder(SMALL, 16)
    obs = observations(SMALL, 5)
    out = torch.full((5, 16), torch.nan)
    rows = encoder.stacked_rows(torch.float32)
    given = window.encode_window(obs, rows, encoder.own_scale, num_cells=9, num_codes=4, out=out)
    assert given is out
    torch.testing.assert_close(out, encoder(obs, torch.float32).detach(), rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    encoder = make_encoder(SMALL, 16)
    rows = encoder.stacked_rows(torch.float32)
    obs = observations(SMALL, 0)
    assert window.encode_window(obs, rows, encoder.own_scale, num_cells=9, num_codes=4).shape == (0, 16)
    grad = window.window_weight_grad(obs, torch.empty(0, 16), encoder.own_scale, num_cells=9, num_codes=4)
    assert torch.equal(grad, torch.zeros(256, 16))


def test_a_net_with_kernels_trains_as_without() -> None:
    grads = []
    for use_kernels in (False, True):
        torch.manual_seed(0)
        policy = build_policy("mlp", {"hidden_size": 16}, SMALL, ("noop", "left"))
        policy.use_kernels = use_kernels
        logits, values = policy.forward_segment(
            observations(SMALL, 15).view(3, 5, 12), torch.zeros(5, 0), torch.zeros(3, 5, dtype=torch.bool)
        )
        (logits.square().sum() + values.square().sum()).backward()
        grads.append([parameter.grad for parameter in policy.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
