"""An LSTM over a whole segment in one launch, forward and backward: the fused twin of `policies/lstm.py`.

Rows are independent, so a program owns a block of rows and walks all steps, and a reset is a selection. The recurrent
weights are read once, as four square blocks in the order i, f, o, g, and stay in shared memory; the cell stays in
registers in float32. Every step reads and writes only what must enter or leave: gates, cells, hiddens, outputs.

The backward kernel lays its tiles out (units, rows), so that its products are weights @ gradients. The rows of a block
are then the narrow side of the product and may be 32; in the other order sm_90 wants 64 of them, which spill.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803 -- constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HIDDEN_SIZES = (16, 32, 64, 128)
"""Hidden sizes with kernels, if the weights fit on the chip; at 256 those of bfloat16 take 512 KiB and do not."""
INTERPRETER_ROWS = 16


@triton.jit
def _tanh(x, IS_EXACT: tl.constexpr):
    """To 1e-7, or with the relative error of the chip's own instruction, 2**-11: a quarter of bfloat16's rounding."""
    if IS_EXACT:
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(x, IS_EXACT: tl.constexpr):
    """Likewise: (1 + tanh(x / 2)) / 2 costs one instruction of the slow unit, the division two."""
    if IS_EXACT:
        return tl.sigmoid(x)
    return 0.5 * _tanh(0.5 * x, IS_EXACT) + 0.5


@triton.jit
def _load_weights(weight_hh, H: tl.constexpr):
    """The blocks (H, H) of weight_hh (H, 4 * H) for the gates i, f, o, g."""
    units = tl.arange(0, H)
    block = weight_hh + units[:, None] * (4 * H) + units[None, :]
    return tl.load(block), tl.load(block + H), tl.load(block + 2 * H), tl.load(block + 3 * H)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    gates_x, weight_hh, state, dones, gates, cells, hiddens, outputs, num_rows,
    HORIZON: tl.constexpr, H: tl.constexpr, BLOCK_ROWS: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """A block of rows through all steps; shapes as in `lstm_forward`."""
    dtype = gates_x.dtype.element_ty
    w_i, w_f, w_o, w_g = _load_weights(weight_hh, H)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    rows, units = tl.arange(0, BLOCK_ROWS), tl.arange(0, H)
    is_row = first + rows < num_rows
    inside = is_row[:, None]
    wide = rows[:, None] * (4 * H) + units[None, :]  # into (rows, 4 * H); a gate is H further on
    narrow = rows[:, None] * H + units[None, :]  # into (rows, H)

    initial = state + first * (2 * H) + rows[:, None] * (2 * H) + units[None, :]
    h = tl.load(initial, mask=inside, other=0.0).to(dtype)
    c = tl.load(initial + H, mask=inside, other=0.0)
    tl.store(cells + first * H + narrow, c, mask=inside)
    base = first  # t * num_rows + first, beyond 2**31 when times 4 * H
    for _ in range(HORIZON):
        x = gates_x + base * (4 * H) + wide  # all loads of a step come first: none of them depends on h
        x_i = tl.load(x, mask=inside, other=0.0)
        x_g = tl.load(x + 3 * H, mask=inside, other=0.0)
        x_f = tl.load(x + H, mask=inside, other=0.0)
        x_o = tl.load(x + 2 * H, mask=inside, other=0.0)
        is_alive = (tl.load(dones + base + rows, mask=is_row, other=0) == 0)[:, None]
        tl.store(hiddens + base * H + narrow, h, mask=inside)

        gate = gates + base * (4 * H) + wide
        i = _sigmoid(tl.dot(h, w_i, x_i.to(tl.float32), input_precision="ieee"), IS_EXACT)
        tl.store(gate, i.to(dtype), mask=inside)
        g = _tanh(tl.dot(h, w_g, x_g.to(tl.float32), input_precision="ieee"), IS_EXACT)
        tl.store(gate + 3 * H, g.to(dtype), mask=inside)
        entering = i * g
        f = _sigmoid(tl.dot(h, w_f, x_f.to(tl.float32), input_precision="ieee"), IS_EXACT)
        tl.store(gate + H, f.to(dtype), mask=inside)
        c = f * c + entering  # c' = f * c + i * g
        tl.store(cells + (base + num_rows) * H + narrow, c, mask=inside)
        o = _sigmoid(tl.dot(h, w_o, x_o.to(tl.float32), input_precision="ieee"), IS_EXACT)
        tl.store(gate + 2 * H, o.to(dtype), mask=inside)
        output = (o * _tanh(c, IS_EXACT)).to(dtype)  # h' = o * tanh(c')
        tl.store(outputs + base * H + narrow, output, mask=inside)

        h = tl.where(is_alive, output, 0.0).to(dtype)
        c = tl.where(is_alive, c, 0.0)
        base += num_rows


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad_outputs, gates, weight_hh, cells, dones, grad_gates, num_rows,
    HORIZON: tl.constexpr, H: tl.constexpr, BLOCK_ROWS: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """A block of rows through all steps from the last to the first; shapes as in `lstm_backward`."""
    dtype = gates.dtype.element_ty
    w_i, w_f, w_o, w_g = _load_weights(weight_hh, H)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    rows, units = tl.arange(0, BLOCK_ROWS), tl.arange(0, H)
    is_row = first + rows < num_rows
    inside = is_row[None, :]
    wide = rows[None, :] * (4 * H) + units[:, None]
    narrow = rows[None, :] * H + units[:, None]

    base = first + tl.full((), HORIZON, tl.int64) * num_rows  # of the step behind
    c = tl.load(cells + base * H + narrow, mask=inside, other=0.0)  # c' of the last step
    is_alive = inside  # whatever is there: nothing comes from behind the last step
    grad_c = tl.zeros((H, BLOCK_ROWS), tl.float32)  # dL/dc' from the steps behind
    grad_i = tl.zeros((H, BLOCK_ROWS), dtype)  # of the step behind; in shared memory between steps
    grad_f, grad_o, grad_g = grad_i, grad_i, grad_i
    for step in range(HORIZON):
        base -= num_rows
        gate = gates + base * (4 * H) + wide  # all loads come before the products, which hide their latency
        i = tl.load(gate, mask=inside, other=0.0)
        f = tl.load(gate + H, mask=inside, other=0.0)
        o = tl.load(gate + 2 * H, mask=inside, other=0.0)
        g = tl.load(gate + 3 * H, mask=inside, other=0.0)
        grad_output = tl.load(grad_outputs + base * H + narrow, mask=inside, other=0.0)
        before = tl.load(cells + base * H + narrow, mask=inside, other=0.0)  # c' of the step before, or the first c
        has_before = is_row & (step + 1 < HORIZON)
        was_alive = (tl.load(dones + (base - num_rows) + rows, mask=has_before, other=0) == 0)[None, :]

        grad_h = tl.dot(w_i, grad_i, input_precision="ieee")  # dL/dh' from the steps behind
        grad_h = tl.dot(w_f, grad_f, grad_h, input_precision="ieee")
        grad_h = tl.dot(w_o, grad_o, grad_h, input_precision="ieee")
        grad_h = tl.dot(w_g, grad_g, grad_h, input_precision="ieee")
        grad_h = tl.where(is_alive, grad_h, 0.0) + grad_output.to(tl.float32)
        # 0 * grad_h changes no value: it brings the cell into the layout of the products once, where the compiler
        # would else compute whatever hangs on loads alone in the loads' layout, and move every result by itself.
        before += 0.0 * grad_h
        i, f, o, g = i.to(tl.float32), f.to(tl.float32), o.to(tl.float32), g.to(tl.float32)

        # With s = sigmoid(a): dL/da = (dL/ds * s) * (1 - s), written u - u * s (for the same reason).
        c_tanh = _tanh(c, IS_EXACT)
        grad = grad_gates + base * (4 * H) + wide
        u = grad_h * o * c_tanh
        grad_o = (u - u * o).to(dtype)
        tl.store(grad + 2 * H, grad_o, mask=inside)
        # dL/dc' = alive * (from behind) + dL/dh' * o * (1 - tanh(c')^2)
        grad_c = tl.where(is_alive, grad_c, 0.0) + (grad_h * o - u * c_tanh)
        u = grad_c * g * i
        grad_i = (u - u * i).to(dtype)
        tl.store(grad, grad_i, mask=inside)
        u = grad_c * i
        grad_g = (u - u * g * g).to(dtype)
        tl.store(grad + 3 * H, grad_g, mask=inside)
        grad_c = grad_c * f
        u = tl.where(was_alive, grad_c * before, 0.0)  # c before this step is 0 where the step before ended an episode
        grad_f = (u - u * f).to(dtype)
        tl.store(grad + H, grad_f, mask=inside)
        c = before
        is_alive = was_alive


def launch_shape(capability: tuple[int, int], *, backward: bool) -> tuple[int, int]:
    """(rows of a program, warps) for a chip: the largest block that compiles without spilling registers."""
    return (64, 8) if capability >= (9, 0) and not backward else (32, 8)


def shared_bytes(hidden_size: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Bound of a program's shared memory in bytes: the weights, and tiles on their way from one layout to another."""
    tiles = 192 if capability >= (9, 0) else 64  # numbers per hidden unit; wgmma takes its operands from shared memory
    return (4 * hidden_size + tiles) * hidden_size * dtype.itemsize


def supports(hidden_size: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None) -> bool:
    """Whether the kernels run at a hidden size; on a CUDA device also whether its shared memory holds the weights.

    128 in bfloat16 wants an A100, H100 or newer data-center chip; smaller chips go to 64. Float32 runs without tensor
    cores, for tests: to 64.
    """
    if hidden_size not in HIDDEN_SIZES:
        return False
    if device is None or device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    available: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
    return shared_bytes(hidden_size, dtype, capability) <= available


def _launch_options(tensor: Tensor, *, backward: bool) -> dict[str, int | bool]:
    """The constexprs that are no argument of a launcher, and the number of warps."""
    block_rows, num_warps = INTERPRETER_ROWS, 4
    if tensor.is_cuda:
        block_rows, num_warps = launch_shape(torch.cuda.get_device_capability(tensor.device), backward=backward)
    return {
        "BLOCK_ROWS": block_rows,
        "IS_EXACT": tensor.dtype == torch.float32 or not tensor.is_cuda,
        "num_warps": num_warps,
        "num_stages": 1,  # more stages would buffer the loads in shared memory, which the weights fill
    }


def lstm_forward(
    gates_x: Tensor, weight_hh: Tensor, state: Tensor, dones: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All steps of a segment in one launch.

    Args:
        gates_x: (horizon, num_rows, 4 * size) input projections with bias; gate order i, f, o, g.
        weight_hh: (size, 4 * size), same dtype.
        state: (num_rows, 2 * size) float32, h and c before the first step.
        dones: (horizon, num_rows) bool.

    Returns:
        outputs: (horizon, num_rows, size), dtype of gates_x: h after each step, not yet reset.
        gates: (horizon, num_rows, 4 * size), dtype of gates_x: activated.
        cells: (horizon + 1, num_rows, size) float32: c before the first step, then after each, not yet reset.
        hiddens: (horizon, num_rows, size), dtype of gates_x: h before each step.
    """
    horizon, num_rows, width = gates_x.shape
    size = width // 4
    assert size in HIDDEN_SIZES, f"hidden size {size} has no kernel, only {HIDDEN_SIZES}"
    assert weight_hh.shape == (size, width), weight_hh.shape
    assert weight_hh.dtype == gates_x.dtype, weight_hh.dtype
    assert state.shape == (num_rows, 2 * size), state.shape
    assert state.dtype == torch.float32, state.dtype
    assert dones.shape == (horizon, num_rows), dones.shape
    gates = torch.empty(gates_x.shape, dtype=gates_x.dtype, device=gates_x.device)
    cells = torch.empty(horizon + 1, num_rows, size, device=gates_x.device)
    hiddens = torch.empty(horizon, num_rows, size, dtype=gates_x.dtype, device=gates_x.device)
    outputs = torch.empty_like(hiddens)
    options = _launch_options(gates_x, backward=False)
    forward_kernel[(triton.cdiv(num_rows, options["BLOCK_ROWS"]),)](
        gates_x.contiguous(), weight_hh.contiguous(), state.contiguous(), dones.contiguous(),
        gates, cells, hiddens, outputs, num_rows, HORIZON=horizon, H=size, **options,
    )  # fmt: skip
    return outputs, gates, cells, hiddens


def lstm_backward(grad_outputs: Tensor, gates: Tensor, weight_hh: Tensor, cells: Tensor, dones: Tensor) -> Tensor:
    """All steps of a segment from the last to the first, in one launch.

    Args:
        grad_outputs: (horizon, num_rows, size), dtype of gates.
        gates, cells: as `lstm_forward` returned them.
        weight_hh, dones: as it got them.

    Returns:
        (horizon, num_rows, 4 * size) gradients of gates_x, dtype of gates. That of weight_hh is hiddens^T @ them.
    """
    horizon, num_rows, width = gates.shape
    assert grad_outputs.dtype == gates.dtype, grad_outputs.dtype
    grad_gates = torch.empty_like(gates)
    options = _launch_options(gates, backward=True)
    backward_kernel[(triton.cdiv(num_rows, options["BLOCK_ROWS"]),)](
        grad_outputs.contiguous(), gates, weight_hh.contiguous(), cells, dones.contiguous(),
        grad_gates, num_rows, HORIZON=horizon, H=width // 4, **options,
    )  # fmt: skip
    return grad_gates
