"""The nets: a segment through the parameters gives what the packed steps gave, resets included."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.policies.build import build_policy, compute_dtype
from dual_policy_plugin.policies.encoders import VectorEncoder
from dual_policy_plugin.types import ObservationSpace

ACTIONS = ("noop", "left", "right")
SPACES = {
    "window": ObservationSpace(
        kind="window",
        shape=(12,),
        features=("empty", "wall", "foe"),
        window=(3, 3),
        own=("ore", "time"),
        scales=(2, 255),
    ),
    "tokens": ObservationSpace(
        kind="tokens", shape=(5, 3), features=("hp", "ore", "wall"), window=(3, 3), scales=(1.0, 10.0, 255.0)
    ),
    "vector": ObservationSpace(kind="vector", shape=(4,), features=("a", "b", "c", "d")),
}


def observations(kind: str, horizon: int, rows: int) -> torch.Tensor:
    if kind == "vector":
        return torch.randn(horizon, rows, 4)
    if kind == "window":
        obs = torch.randint(0, 3, (horizon, rows, 12), dtype=torch.uint8)
        obs[..., 9:] *= 50
        return obs
    obs = torch.stack([torch.randint(0, high, (horizon, rows, 5), dtype=torch.uint8) for high in (3, 3, 200)], dim=-1)
    obs[:, :, 3, 0] = 0xFE
    obs[:, :, 4] = 0xFF
    return obs


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("name", ["fast", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_equals_steps(kind: str, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    policy = build_policy(name, {"hidden_size": 16}, SPACES[kind], ACTIONS)
    policy.compute_dtype = dtype
    policy.pack()
    obs = observations(kind, 7, 5)
    dones = torch.rand(7, 5) < 0.3
    first = torch.randn(5, policy.state_size)
    logits, values = policy.forward_segment(obs, first, dones)
    state = first
    for t in range(7):
        step_logits, step_values, state = policy.forward_step(obs[t], state)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(step_logits, logits[t].detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(step_values, values[t].detach(), rtol=tolerance, atol=tolerance)
        state = state.masked_fill(dones[t].unsqueeze(1), 0.0)


@pytest.mark.parametrize("kind", SPACES)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    policy = build_policy("fast", {"hidden_size": 16}, SPACES[kind], ACTIONS)
    logits, values = policy.forward_segment(
        observations(kind, 7, 5), torch.zeros(5, 32), torch.zeros(7, 5, dtype=torch.bool)
    )
    (logits.square().sum() + values.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in policy.parameters())


def test_padding_tokens_and_empty_cells_add_nothing() -> None:
    torch.manual_seed(0)
    tokens = build_policy("mlp", {"hidden_size": 8}, SPACES["tokens"], ACTIONS)
    obs = observations("tokens", 1, 2)[0]
    other = obs.clone()
    other[:, 4, 1:] = torch.tensor([2, 9], dtype=torch.uint8)  # feature and value of a padding token
    assert torch.equal(tokens.encoder(obs, torch.float32), tokens.encoder(other, torch.float32))
    window = build_policy("mlp", {"hidden_size": 8}, SPACES["window"], ACTIONS)
    empty = torch.zeros(1, 12, dtype=torch.uint8)
    assert torch.equal(window.encoder(empty, torch.float32)[0], window.encoder.bias)


def test_normalization_statistics_merge_to_those_of_all_data() -> None:
    torch.manual_seed(0)
    encoder = VectorEncoder(SPACES["vector"], 8)
    data = torch.randn(300, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3.0
    for part in (data[:10], data[10:130], data[130:]):
        encoder.update_statistics(torch.tensor(float(len(part))), part.mean(0), part.var(0, unbiased=False))
    torch.testing.assert_close(encoder.mean, data.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.var, data.var(0, unbiased=False), rtol=1e-3, atol=1e-4)


def test_bf16_is_refused_or_taken_as_asked() -> None:
    assert compute_dtype("fp32", torch.device("cpu")) is torch.float32
    assert compute_dtype("bf16", torch.device("cpu")) is torch.bfloat16
