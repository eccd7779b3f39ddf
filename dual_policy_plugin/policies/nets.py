"""The two nets that come with the package: `fast` (encoder, LSTM, two heads) and `mlp` (encoder, hidden layer, heads).

Both follow the Policy protocol. Parameters are float32; products run in `compute_dtype`; logits and values leave in
float32. `forward_segment` goes through the parameters and carries gradients. `forward_step` goes through copies that
`pack` makes: call `pack` after the parameters changed (the collector does so once an iteration).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_policy_plugin.config_checks import check
from dual_policy_plugin.policies.encoders import Pack, VectorEncoder, build_encoder
from dual_policy_plugin.policies.fast_step import LstmLayer, Span, StepBuffers, fast_step, fitting_buffers, row_blocks
from dual_policy_plugin.policies.lstm import lstm_segment
from dual_policy_plugin.types import ObservationSpace

MAX_HIDDEN_SIZE = 8192


class _Net(nn.Module):
    """What `fast` and `mlp` share: the encoder, the heads in one matrix, and packing."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...], hidden_size: int) -> None:
        super().__init__()
        right = f"use a whole number from 1 to {MAX_HIDDEN_SIZE}"
        check(type(hidden_size) is int, "agent.hidden_size", hidden_size, right)
        check(1 <= hidden_size <= MAX_HIDDEN_SIZE, "agent.hidden_size", hidden_size, right)
        self.hidden_size = hidden_size
        self.num_actions = len(actions)
        self.compute_dtype = torch.float32
        self.use_kernels = False  # whether `forward_segment` runs the fused kernels; True on CUDA
        self.encoder = build_encoder(space, hidden_size)
        self.heads = nn.Linear(hidden_size, self.num_actions + 1)  # the last output is the value
        nn.init.orthogonal_(self.heads.weight[:-1], 0.01)
        nn.init.orthogonal_(self.heads.weight[-1:], 1.0)
        nn.init.zeros_(self.heads.bias)
        self._pack: dict[str, Pack] = {}

    def update_statistics(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Merges a batch of observations into the normalization, where the encoder has one."""
        assert isinstance(self.encoder, VectorEncoder)
        self.encoder.update_statistics(count, mean, variance)

    def _heads(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.compute_dtype
        output = F.linear(hidden.to(dtype), self.heads.weight.to(dtype), self.heads.bias.to(dtype)).float()
        return output[..., :-1], output[..., -1]

    def packed(self, part: str, name: str) -> Tensor:
        """What `pack` made: encoder table, heads weight, ..."""
        return self._pack[part][name]

    def _encode_packed(self, obs: Tensor) -> Tensor:
        """Encodings (num_rows, hidden_size) before the activation, through the packed parameters."""
        return self.encoder.packed(obs, self._pack["encoder"])

    @torch.no_grad()
    def pack(self) -> None:
        """Copies the parameters into the compute dtype for `forward_step`."""
        dtype = self.compute_dtype
        self._pack["encoder"] = self.encoder.pack(dtype)
        self._pack["heads"] = {
            "weight": self.heads.weight.t().to(dtype).contiguous(),
            "bias": self.heads.bias.to(dtype),
        }


class FastPolicy(_Net):
    """Encoder, LSTM, heads for the policy and the value."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...], *, hidden_size: int = 128) -> None:
        super().__init__(space, actions, hidden_size)
        self.state_size = 2 * hidden_size
        bound = 1.0 / math.sqrt(hidden_size)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, 4 * hidden_size).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, 4 * hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.lstm: LstmLayer | None = None  # made by `pack`
        self._scratch: StepBuffers | None = None

    @torch.no_grad()
    def pack(self) -> None:
        """Copies the parameters into the compute dtype for `forward_step`."""
        super().pack()
        weights = torch.cat([self.weight_ih, self.weight_hh]).to(self.compute_dtype)  # one product for x and h
        self.lstm = LstmLayer(weight=weights, bias=self.bias.to(self.compute_dtype))

    @torch.no_grad()
    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Policy.forward_step, through the packed parameters; logits are a transposed view."""
        num_rows, lstm, heads = len(obs), self.lstm, self._pack["heads"]
        assert lstm is not None, "pack comes first"
        new_state = torch.empty(num_rows, self.state_size, device=state.device)
        outputs = torch.empty(self.num_actions + 1, num_rows, device=state.device)
        for rows in row_blocks(num_rows, state.device):
            span = Span(lstm, 0, rows.stop - rows.start)
            self._scratch = fitting_buffers(self._scratch, lstm, span.stop)
            encoded = self._encode_packed(obs[rows])
            hidden = fast_step(encoded, state[rows], [span], self._scratch, new_state=new_state[rows])
            outputs[:, rows] = torch.addmm(heads["bias"], hidden, heads["weight"]).t()
        return outputs[:-1].t(), outputs[-1], new_state

    def forward_segment(self, obs: Tensor, state: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        """As Policy.forward_segment, with gradients in the parameters."""
        horizon, num_rows = dones.shape
        dtype = self.compute_dtype
        encoded = self.encoder(obs.flatten(0, 1), dtype, use_kernels=self.use_kernels).relu()
        gates_x = torch.addmm(self.bias.to(dtype), encoded, self.weight_ih.to(dtype)).view(horizon, num_rows, -1)
        hidden = lstm_segment(gates_x, self.weight_hh.to(dtype), state, dones, use_kernels=self.use_kernels)
        return self._heads(hidden)


class MlpPolicy(_Net):
    """Encoder, one hidden layer, heads; no memory."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...], *, hidden_size: int = 128) -> None:
        super().__init__(space, actions, hidden_size)
        self.state_size = 0
        self.hidden = nn.Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def pack(self) -> None:
        """Copies the parameters into the compute dtype for `forward_step`."""
        super().pack()
        dtype = self.compute_dtype
        self._pack["hidden"] = {"weight": self.hidden.weight.to(dtype), "bias": self.hidden.bias.to(dtype)}

    @torch.no_grad()
    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Policy.forward_step, through the packed parameters."""
        layer = self._pack["hidden"]
        hidden = F.linear(self._encode_packed(obs).relu_(), layer["weight"], layer["bias"]).relu_()
        heads = self._pack["heads"]
        output = torch.addmm(heads["bias"], hidden, heads["weight"]).t().float()  # (num_actions + 1, num_rows)
        return output[:-1].t(), output[-1], state

    def forward_segment(self, obs: Tensor, state: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        """As Policy.forward_segment, with gradients in the parameters; state and dones have no say."""
        dtype = self.compute_dtype
        encoded = self.encoder(obs.flatten(0, 1), dtype, use_kernels=self.use_kernels).relu()
        hidden = F.linear(encoded, self.hidden.weight.to(dtype), self.hidden.bias.to(dtype)).relu()
        return self._heads(hidden.view(*dones.shape, -1))
