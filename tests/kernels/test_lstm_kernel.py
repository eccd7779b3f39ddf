"""The LSTM's kernels against autograd through the plain loop, in Triton's interpreter and float32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dual_policy_plugin.kernels.lstm import lstm_forward, shared_bytes, supports
from dual_policy_plugin.policies.lstm import lstm_segment, lstm_segment_plain

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(horizon: int, num_rows: int, size: int, done_fraction: float = 0.3) -> Inputs:
    generator = torch.Generator().manual_seed(horizon + num_rows)
    gates_x = torch.randn(horizon, num_rows, 4 * size, generator=generator)
    weight_hh = torch.randn(size, 4 * size, generator=generator) * 0.3
    state = torch.randn(num_rows, 2 * size, generator=generator) * 0.5
    dones = torch.rand(horizon, num_rows, generator=generator) < done_fraction
    return gates_x, weight_hh, state, dones


def run(segment: Callable[..., Tensor], inputs: Inputs, **keywords: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradient of gates_x, gradient of weight_hh."""
    gates_x, weight_hh, state, dones = inputs
    gates_x, weight_hh = gates_x.clone().requires_grad_(), weight_hh.clone().requires_grad_()
    outputs = segment(gates_x, weight_hh, state, dones, **keywords)
    wanted = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    (outputs * wanted).sum().backward()
    assert gates_x.grad is not None
    assert weight_hh.grad is not None
    return outputs.detach(), gates_x.grad, weight_hh.grad


def assert_agrees_with_plain(inputs: Inputs) -> None:
    names = ("outputs", "grad of gates_x", "grad of weight_hh")
    fused, plain = run(lstm_segment, inputs, use_kernels=True), run(lstm_segment_plain, inputs)
    for name, ours, wanted in zip(names, fused, plain, strict=True):
        error = float((ours - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5, f"{name} off by {error:.1e}"


@pytest.mark.parametrize(("horizon", "num_rows", "size"), [(5, 19, 16), (4, 16, 32), (1, 3, 16), (2, 33, 16)])
def test_agrees_with_plain_twin(horizon: int, num_rows: int, size: int) -> None:
    assert_agrees_with_plain(make_inputs(horizon, num_rows, size))


def test_half_precision_stays_near_float32() -> None:
    inputs = make_inputs(5, 19, 16)
    gates_x, weight_hh, state, dones = inputs
    fused = run(lstm_segment, (gates_x.half(), weight_hh.half(), state, dones), use_kernels=True)
    for ours, wanted in zip(fused, run(lstm_segment_plain, inputs), strict=True):
        assert ours.dtype == torch.float16  # the interpreter cannot multiply bfloat16; the roundings are in one place
        assert float((ours.float() - wanted).abs().max() / wanted.abs().max()) < 3e-3


@pytest.mark.parametrize("ended", [[], [0], [2], [4], [0, 1, 2, 3, 4]])
def test_agrees_with_episode_ends_at_first_middle_and_last_step(ended: list[int]) -> None:
    gates_x, weight_hh, state, dones = make_inputs(5, 3, 16, done_fraction=0.0)
    dones[ended, 1] = True
    assert_agrees_with_plain((gates_x, weight_hh, state, dones))


def test_agrees_on_a_slice_of_rows() -> None:
    gates_x, weight_hh, state, dones = make_inputs(3, 20, 16)
    assert_agrees_with_plain((gates_x[:, 2:9], weight_hh, state[2:9], dones[:, 2:9]))


def test_no_row_hears_of_another() -> None:
    gates_x, weight_hh, state, dones = make_inputs(3, 18, 16)
    outputs = lstm_forward(gates_x, weight_hh, state, dones)[0]
    gates_x[:, 5] += 1.0
    changed = (lstm_forward(gates_x, weight_hh, state, dones)[0] != outputs).any(dim=2).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [5]


def test_what_is_kept_for_the_backward_pass() -> None:
    gates_x, weight_hh, state, dones = make_inputs(4, 5, 16)
    outputs, gates, cells, hiddens = lstm_forward(gates_x, weight_hh, state, dones)
    alive = (~dones).unsqueeze(2)
    torch.testing.assert_close(cells[0], state[:, 16:], rtol=0, atol=0)
    torch.testing.assert_close(hiddens[0], state[:, :16], rtol=0, atol=0)
    torch.testing.assert_close(hiddens[1:], (outputs * alive)[:-1], rtol=0, atol=0)
    torch.testing.assert_close(outputs, gates[:, :, 32:48] * cells[1:].tanh(), rtol=1e-5, atol=1e-6)
    assert gates[:, :, :48].min() > 0  # i, f, o are sigmoids
    assert gates[:, :, 48:].min() < 0


def test_supported_sizes() -> None:
    assert [size for size in range(1, 513) if supports(size)] == [16, 32, 64, 128]


def test_the_weights_of_128_fit_where_shared_memory_is_large() -> None:
    assert shared_bytes(128, torch.bfloat16, (9, 0)) <= 227 * 1024
    assert shared_bytes(128, torch.bfloat16, (8, 0)) <= 163 * 1024
    assert shared_bytes(128, torch.bfloat16, (8, 6)) > 99 * 1024
    assert shared_bytes(64, torch.bfloat16, (8, 6)) <= 99 * 1024
    assert shared_bytes(128, torch.float32, (9, 0)) > 227 * 1024


def test_a_size_without_kernels_is_refused() -> None:
    with pytest.raises(AssertionError, match="hidden size 24 has no kernel"):
        lstm_segment(*make_inputs(1, 2, 24), use_kernels=True)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.kernels.cases_lstm import CASES
for case in CASES:
    if case.constexprs["H"] != 128:
        continue
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    code = triton.compile(source, target=GPUTarget("cuda", case.capabilities[0], 32), options=options).asm["ttgir"]
    for part in code.split("scf.for"):
        lines = [line for line in part.splitlines() if "128x128x" in line]
        print(sum("tt.load" in line for line in lines), sum("ttg.local_alloc" in line for line in lines), end=" ")
"""


@pytest.mark.slow
def test_the_weights_are_read_once_and_stay_on_the_chip() -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of each of four kernels, before its loop and in it: loads from memory, buffers in shared memory.
    assert done.stdout.split() == ["4", "4", "0", "0"] * 4
