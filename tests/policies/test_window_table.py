"""The packed table of a window encoder: the sum of its rows is the encoder's own answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.policies.encoders import WindowEncoder
from dual_policy_plugin.policies.window_table import BLOCK_ROWS, window_layout
from dual_policy_plugin.types import ObservationSpace

SMALL = ObservationSpace(
    kind="window", shape=(12,), features=("empty", "wall", "foe"), window=(3, 3), own=("ore", "time"), scales=(2, 255)
)
SPACES = {
    "odd number of cells": SMALL,
    "even number of cells, no scales": replace(SMALL, window=(2, 4), scales=()),
    "no own state": replace(SMALL, own=(), scales=()),
    "one cell": replace(SMALL, window=(1, 1)),
    "codes too long for pairs": replace(SMALL, features=("empty", *(f"kind{i}" for i in range(11)))),
    "rows of odd length": replace(SMALL, shape=(11,)),
    "rows of whole words": replace(SMALL, shape=(16,)),
    "eight codes": replace(SMALL, shape=(24,), features=("empty", *(f"kind{i}" for i in range(7)))),
}


@pytest.mark.parametrize("name", SPACES)
def test_rows_of_the_table_add_up_to_the_encoding(name: str) -> None:
    torch.manual_seed(0)
    space = SPACES[name]
    encoder = WindowEncoder(space, 8)
    torch.nn.init.normal_(encoder.bias)
    layout = window_layout(space)
    num_cells = layout.num_cells
    obs = torch.randint(0, 256, (64, space.shape[0]), dtype=torch.uint8)
    obs[:, :num_cells] = torch.randint(0, len(space.features), (64, num_cells), dtype=torch.uint8)
    index = layout.index(obs, layout.offsets())
    assert index.shape == (64, layout.num_terms)
    table = encoder.pack(torch.float32)["table"]
    assert table.shape == (layout.num_rows, 8)
    encoding = F.embedding_bag(index, table, mode="sum")
    torch.testing.assert_close(encoding, encoder(obs, torch.float32).detach(), rtol=1e-5, atol=1e-5)


def test_pairs_halve_the_rows_to_read() -> None:
    layout = window_layout(SPACES["eight codes"])
    assert (layout.num_pairs, layout.num_terms, layout.num_rows) == (4, 4 + 1 + 2, 4 * 64 + 8 + 2 * 256)
    longer = window_layout(SPACES["codes too long for pairs"])
    assert (longer.num_pairs, longer.num_terms) == (0, 11)


@pytest.mark.parametrize("name", SPACES)
def test_sum_and_gradients_are_those_of_a_matrix_of_features(name: str) -> None:
    torch.manual_seed(0)
    space = SPACES[name]
    encoder = WindowEncoder(space, 8)
    num_rows, (height, width), num_own = BLOCK_ROWS + 5, space.window, len(space.own)
    num_cells, num_codes = height * width, len(space.features)
    obs = torch.randint(0, 256, (num_rows, space.shape[0]), dtype=torch.uint8)
    obs[:, :num_cells] = torch.randint(0, num_codes, (num_rows, num_cells), dtype=torch.uint8)
    one_hot = F.one_hot(obs[:, :num_cells].long(), num_codes)[..., 1:].float()
    own = obs[:, num_cells : num_cells + num_own] / torch.tensor(space.scales or (1.0,) * num_own)
    grad = torch.randn(num_rows, 8)

    want = torch.einsum("ncv,cvw->nw", one_hot, encoder.table) + own @ encoder.own + encoder.bias
    got = encoder(obs, torch.float32)
    parameters = list(encoder.parameters())

    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(got, parameters, grad), torch.autograd.grad(want, parameters, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-3)


def test_own_state_that_would_fill_the_memory_is_refused() -> None:
    """A file may name any number of bytes, and each takes 256 rows of the packed table."""
    own = tuple(f"byte{i}" for i in range(8000))
    with pytest.raises(
        ConfigError, match=r"agent\.hidden_size=64 is not possible; with 8000 own-state bytes use at most 16"
    ):
        WindowEncoder(replace(SMALL, shape=(8009,), own=own, scales=()), 64)
