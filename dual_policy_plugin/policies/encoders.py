"""Observation encoders, one per kind of ObservationSpace: raw observations -> (num_rows, width) before the activation.

An encoder has two ways to run: `forward` through its float32 parameters, for gradients, and `packed(obs, pack)` through
copies in the compute dtype that `pack` made once, for the rollout and for frozen policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_policy_plugin.config_checks import check
from dual_policy_plugin.policies.gather_sum import gather_sum
from dual_policy_plugin.policies.window_table import NUM_BYTES, window_layout, window_sum
from dual_policy_plugin.types import ObservationSpace

Pack = dict[str, Tensor]
MAX_OWN_ENTRIES = 2**25
"""Numbers in the packed table that stand for own-state bytes, 256 rows each: 128 MB. A file may name any bytes."""
CHUNK = 64  # kernels take a window's columns and its feature rows by this many


class WindowEncoder(nn.Module):
    """Sums one learned vector per (cell, code) of the window and a linear map of the own-state bytes.

    On CUDA the sum is one matrix product with feature rows (num_features, width); the head of kernels/window.py
    gives their order.
    """

    own_scale: Tensor
    offsets: Tensor

    def __init__(self, space: ObservationSpace, width: int) -> None:
        super().__init__()
        self.num_cells = space.window[0] * space.window[1]
        self.num_codes = len(space.features)
        self.num_own = len(space.own)
        num_entries = self.num_own * NUM_BYTES * width
        check(
            num_entries <= MAX_OWN_ENTRIES, "agent.hidden_size", width,
            f"with {self.num_own} own-state bytes use at most {MAX_OWN_ENTRIES // max(1, self.num_own * NUM_BYTES)}",
        )  # fmt: skip
        padded_cells = math.ceil(self.num_cells / CHUNK) * CHUNK
        first_own = self.num_cells % CHUNK
        padded_own = math.ceil((first_own + self.num_own + 1) / CHUNK) * CHUNK  # own state, bias
        self.num_features = (self.num_codes - 1) * padded_cells + padded_own
        self._cell_padding = (0, 0, 0, padded_cells - self.num_cells)
        self._own_padding = (0, 0, first_own, padded_own - first_own - self.num_own - 1)
        # code 0 is "empty" and has no vector: an empty cell adds nothing
        self.table = nn.Parameter(_small_normal(self.num_cells, self.num_codes - 1, width))
        self.own = nn.Parameter(_small_normal(self.num_own, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("own_scale", _inverse(space.scales or (1.0,) * self.num_own), persistent=False)
        self.layout = window_layout(space)
        self.register_buffer("offsets", self.layout.offsets(), persistent=False)

    def _feature_rows(self) -> Tensor:
        # (num_features, width): a row per (code, cell), then own state, then the bias; zero rows between and after
        one_hot = F.pad(self.table.transpose(0, 1), self._cell_padding).flatten(0, 1)
        own = F.pad(torch.cat([self.own, self.bias.unsqueeze(0)]), self._own_padding)
        return torch.cat([one_hot, own])

    @torch.no_grad()
    def stacked_rows(self, dtype: torch.dtype) -> Tensor:
        """All parameters as the kernels' feature rows: (num_features, width) in `dtype`, without gradient."""
        return self._feature_rows().to(dtype)

    @torch.no_grad()
    def pack(self, dtype: torch.dtype) -> Pack:
        """The parameters as one table in the compute dtype, without gradient."""
        own = self.own * self.own_scale.unsqueeze(1)
        return {"table": self.layout.table(self.table, own, self.bias, dtype)}

    def packed(self, obs: Tensor, pack: Pack) -> Tensor:
        """Encodes obs (num_rows, num_bytes) uint8 with packed parameters."""
        return F.embedding_bag(self.layout.index(obs.contiguous(), self.offsets), pack["table"], mode="sum")

    def forward(self, obs: Tensor, dtype: torch.dtype, *, use_kernels: bool = False) -> Tensor:
        """Encodes obs (num_rows, num_bytes) uint8 -> (num_rows, width) in `dtype`."""
        if use_kernels:
            from dual_policy_plugin.kernels.window import window_product

            sizes = {"num_cells": self.num_cells, "num_codes": self.num_codes}
            return window_product(obs.contiguous(), self._feature_rows(), self.own_scale, **sizes, dtype=dtype)
        return window_sum(self.layout, obs, self.offsets, self.own_scale, self.table, self.own, self.bias, dtype)


class TokenEncoder(nn.Module):
    """Sums one learned vector per (cell, feature), weighed by the token's scaled value."""

    scale: Tensor

    def __init__(self, space: ObservationSpace, width: int) -> None:
        super().__init__()
        self.width_cells = space.window[1]
        self.num_cells = space.window[0] * space.window[1]
        self.num_features = len(space.features)
        # one more cell for tokens that belong to none, and a last row of zeros for padding
        self.table = nn.Parameter(_small_normal((self.num_cells + 1) * self.num_features, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", _inverse(space.scales or (1.0,) * self.num_features), persistent=False)

    def _encode(self, obs: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        location, feature, value = obs.int().unbind(dim=-1)
        is_pad = location == 0xFF
        cell = torch.where(location == 0xFE, self.num_cells, (location >> 4) * self.width_cells + (location & 15))
        index = torch.where(is_pad, table.shape[0] - 1, cell * self.num_features + feature)
        weights = (value * self.scale[feature.clamp(max=self.num_features - 1)]).masked_fill(is_pad, 0.0)
        return gather_sum(index, weights.to(table.dtype), table) + bias

    def pack(self, dtype: torch.dtype) -> Pack:
        """Copies of the parameters in the compute dtype, without gradient."""
        return {"table": F.pad(self.table.to(dtype), (0, 0, 0, 1)), "bias": self.bias.to(dtype)}

    def packed(self, obs: Tensor, pack: Pack) -> Tensor:
        """Encodes obs (num_rows, num_tokens, 3) uint8 with packed parameters."""
        return self._encode(obs, pack["table"], pack["bias"])

    def forward(self, obs: Tensor, dtype: torch.dtype, *, use_kernels: bool = False) -> Tensor:
        """Encodes obs (num_rows, num_tokens, 3) uint8 -> (num_rows, width) in `dtype`."""
        return self._encode(obs, F.pad(self.table.to(dtype), (0, 0, 0, 1)), self.bias.to(dtype))


class VectorEncoder(nn.Module):
    """A linear map of the features, normalized by running statistics that travel in the policy's file.

    The statistics are buffers and change only in `update_statistics`, between iterations: within an iteration the
    rollout and the update see the same normalization, and a frozen policy keeps its own.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, space: ObservationSpace, width: int) -> None:
        super().__init__()
        num_features = space.shape[0]
        self.linear = nn.Linear(num_features, width)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.ones(num_features))
        self.register_buffer("count", torch.zeros(()))

    def _normalize(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10.0, 10.0)

    def update_statistics(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Merges a batch's count (), mean and variance (num_features,) into the running ones (Chan et al.)."""
        merged = self.count + count
        delta = mean - self.mean
        share = count / merged.clamp(min=1.0)
        self.var.mul_(1.0 - share).add_(variance * share).add_(delta.square() * share * (1.0 - share))
        self.mean.add_(delta * share)
        self.count.copy_(merged)

    def pack(self, dtype: torch.dtype) -> Pack:
        """Copies of the parameters in the compute dtype, without gradient."""
        return {"weight": self.linear.weight.to(dtype), "bias": self.linear.bias.to(dtype)}

    def packed(self, obs: Tensor, pack: Pack) -> Tensor:
        """Encodes obs (num_rows, num_features) float32 with packed parameters."""
        return F.linear(self._normalize(obs).to(pack["weight"].dtype), pack["weight"], pack["bias"])

    def forward(self, obs: Tensor, dtype: torch.dtype, *, use_kernels: bool = False) -> Tensor:
        """Encodes obs (num_rows, num_features) float32 -> (num_rows, width) in `dtype`."""
        return F.linear(self._normalize(obs).to(dtype), self.linear.weight.to(dtype), self.linear.bias.to(dtype))


_ENCODERS: dict[str, Any] = {"window": WindowEncoder, "tokens": TokenEncoder, "vector": VectorEncoder}


def build_encoder(space: ObservationSpace, width: int) -> WindowEncoder | TokenEncoder | VectorEncoder:
    """The encoder for an observation space."""
    encoder: WindowEncoder | TokenEncoder | VectorEncoder = _ENCODERS[space.kind](space, width)
    return encoder


def _small_normal(*shape: int) -> Tensor:
    """Normal random numbers of standard deviation 0.1.

    On the meta device, where a net is built for its shapes alone, none are drawn: torch would import its compiler for
    that, a second of every start.
    """
    table = torch.empty(*shape)
    return table if table.is_meta else table.normal_().mul_(0.1)


def _inverse(scales: Sequence[float]) -> Tensor:
    """1 / scale of each, in Python for the same reason."""
    return torch.tensor([1.0 / scale for scale in scales])
