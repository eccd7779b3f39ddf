"""The window encoder as one matrix product F @ W, whose one-hot factor F exists only on the chip.

Takes observations (num_rows, row_bytes) uint8 of kind window; gives encodings before the activation, and the gradient
of W. Everything an encoder adds up is a row of W (num_features, width), its *feature rows*, in this order:

    one-hot   for code = 1 .. num_codes - 1: one row per cell, padded to a multiple of 64 cells. Its feature is 1 where
              the cell holds that code. Code 0 is empty, adds nothing and has no rows.
    own       one row per column of the observation from the last multiple of 64 that is no greater than num_cells:
              zero rows up to num_cells, then one per own-state byte (its feature is byte * scale), then the bias (its
              feature is 1), then zero rows up to a multiple of 64.

So 64 consecutive features come from 64 consecutive bytes of a row, and are loaded as such. The arena has 7 * 128 + 64
= 960 feature rows. `WindowEncoder.stacked_rows` builds W; its `forward` is the plain twin of `encode_window`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: N803, N806 -- constants of a kernel are written in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # feature rows are padded to this, and the forward walks them by it
_CHUNK: tl.constexpr = tl.constexpr(CHUNK)
_NUM_PROGRAMS = 2 * 132  # of the gradient: two for each multiprocessor of an H100 or H200


@triton.constexpr_function
def padded(count: int) -> int:
    """The next multiple of CHUNK; runs at compile time."""
    return -(-count // CHUNK) * CHUNK


@triton.constexpr_function
def count_features(num_cells: int, num_codes: int, num_own: int) -> int:
    """Number of feature rows, zero rows included; runs at compile time."""
    num_own_rows: int = padded(num_cells % CHUNK + num_own + 1)
    return (num_codes - 1) * int(padded(num_cells)) + num_own_rows


def _block_rows(obs: Tensor, dtype: torch.dtype) -> int:
    # bfloat16: 128 registers a thread, so two programs share a multiprocessor: one computes features while the other
    # multiplies. float32 has no matrix instruction of full precision and would spill with as many rows
    if obs.is_cuda:
        return 64 if dtype == torch.float32 else 128
    return 16  # the interpreter


def _block_width(width: int) -> int:
    return int(min(128, max(16, triton.next_power_of_2(width))))


@triton.jit
def window_bytes(
    obs, rows, row_mask, first_feature, NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr, ROW_BYTES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The bytes (BLOCK_ROWS, BLOCK_FEATURES) uint8 that features from `first_feature` on are made of.

    Arguments as in `window_features`.
    """
    CELL_COLUMNS: tl.constexpr = padded(NUM_CELLS)
    NUM_ONE_HOT: tl.constexpr = (NUM_CODES - 1) * CELL_COLUMNS
    OWN_COLUMN: tl.constexpr = NUM_CELLS // _CHUNK * _CHUNK
    own_column = OWN_COLUMN + first_feature - NUM_ONE_HOT
    first_column = tl.where(first_feature < NUM_ONE_HOT, first_feature % CELL_COLUMNS, own_column)
    columns = tl.multiple_of(first_column, _CHUNK) + tl.arange(0, BLOCK_FEATURES)
    mask = row_mask[:, None] & (columns < ROW_BYTES)[None, :]
    return tl.load(obs + rows.to(tl.int64)[:, None] * ROW_BYTES + columns[None, :], mask=mask, other=0)


@triton.jit
def features_of_bytes(
    values, first_feature, own_scale, NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr, NUM_OWN: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The features of what `window_bytes` loaded, in DTYPE; arguments as in `window_features`."""
    CELL_COLUMNS: tl.constexpr = padded(NUM_CELLS)
    NUM_ONE_HOT: tl.constexpr = (NUM_CODES - 1) * CELL_COLUMNS
    OWN_COLUMN: tl.constexpr = NUM_CELLS // _CHUNK * _CHUNK
    offsets = tl.arange(0, BLOCK_FEATURES)
    if first_feature < NUM_ONE_HOT:
        is_cell = first_feature % CELL_COLUMNS + offsets < NUM_CELLS
        code = tl.where(is_cell, 1 + first_feature // CELL_COLUMNS, -1)  # no byte is -1
        tile = (values.to(tl.int32) == code[None, :]).to(DTYPE)
    else:
        entry = OWN_COLUMN + first_feature - NUM_ONE_HOT + offsets - NUM_CELLS
        scale = tl.load(own_scale + entry, mask=(entry >= 0) & (entry < NUM_OWN), other=0.0)
        is_bias = tl.where(entry == NUM_OWN, 1.0, 0.0)
        tile = (values.to(tl.float32) * scale[None, :] + is_bias[None, :]).to(DTYPE)
    return tile


@triton.jit
def window_features(
    obs, rows, row_mask, first_feature, own_scale, NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr,
    NUM_OWN: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK_FEATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of F: features `first_feature` to `first_feature + BLOCK_FEATURES` of some rows.

    Args:
        obs: pointer to (num_rows, ROW_BYTES) uint8, contiguous.
        rows: (BLOCK_ROWS,) int32 or int64 row numbers; anything where row_mask is False.
        row_mask: (BLOCK_ROWS,) bool. A masked row is not read; its features are 0 except the bias feature, which is 1.
        first_feature: scalar, a multiple of BLOCK_FEATURES; BLOCK_FEATURES is 64, or 128 where NUM_CELLS padded to a
            multiple of 64 is a multiple of 128.
        own_scale: pointer to (NUM_OWN,) float32, what an own-state byte is multiplied by.
        NUM_CELLS, NUM_CODES, NUM_OWN: cells of the window, codes (code 0, empty, included), own-state bytes.
        DTYPE: of the result.

    Returns:
        (BLOCK_ROWS, BLOCK_FEATURES) in DTYPE.
    """
    values = window_bytes(obs, rows, row_mask, first_feature, NUM_CELLS, NUM_CODES, ROW_BYTES, BLOCK_FEATURES)
    return features_of_bytes(values, first_feature, own_scale, NUM_CELLS, NUM_CODES, NUM_OWN, BLOCK_FEATURES, DTYPE)


@triton.jit
def window_encoding(
    obs, rows, row_mask, weights, own_scale, first_column, NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr,
    NUM_OWN: tl.constexpr, ROW_BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of F @ W: columns `first_column` to `first_column + BLOCK_WIDTH` of the encoding of some rows.

    Args:
        weights: pointer to (num_features, WIDTH) in DTYPE, contiguous: the feature rows.
        first_column: scalar.
        BLOCK_WIDTH: a power of two >= 16; columns from WIDTH on are 0.
        obs, rows, row_mask, own_scale, NUM_CELLS, NUM_CODES, NUM_OWN, ROW_BYTES, DTYPE: as in `window_features`.

    Returns:
        (BLOCK_ROWS, BLOCK_WIDTH) float32, before the activation.
    """
    NUM_FEATURES: tl.constexpr = count_features(NUM_CELLS, NUM_CODES, NUM_OWN)
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DTYPE else "tf32"
    columns = first_column + tl.arange(0, BLOCK_WIDTH)
    is_column = (columns < WIDTH)[None, :]
    chunk = tl.arange(0, _CHUNK)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for first_feature in range(0, NUM_FEATURES, _CHUNK):
        at = (first_feature + chunk)[:, None] * WIDTH + columns[None, :]
        block = tl.load(weights + at, mask=is_column, other=0.0)
        tile = window_features(
            obs, rows, row_mask, first_feature, own_scale, NUM_CELLS, NUM_CODES, NUM_OWN, ROW_BYTES, _CHUNK, DTYPE
        )
        sums = tl.dot(tile, block, sums, input_precision=PRECISION)
    return sums


@triton.jit
def encode_window_kernel(
    obs, weights, own_scale, out, num_rows, NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr,
    NUM_OWN: tl.constexpr, ROW_BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes out = F @ weights (num_rows, WIDTH); a program owns a block of rows and a block of columns."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    first_column = tl.program_id(1) * BLOCK_WIDTH
    sums = window_encoding(
        obs, rows, row_mask, weights, own_scale, first_column,
        NUM_CELLS, NUM_CODES, NUM_OWN, ROW_BYTES, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, DTYPE,
    )  # fmt: skip
    columns = first_column + tl.arange(0, BLOCK_WIDTH)
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out + at, sums.to(DTYPE), mask=row_mask[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def window_weight_grad_kernel(
    obs, grad, own_scale, partial, num_rows, NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr,
    NUM_OWN: tl.constexpr, ROW_BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCKS_PER_SLICE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes partial[slice] = F[rows of the slice].T @ grad; a program owns a slice and a block of the product.

    Slice s of n holds the blocks s, s + n, s + 2n, ... of BLOCK_ROWS rows.
    """
    NUM_FEATURES: tl.constexpr = count_features(NUM_CELLS, NUM_CODES, NUM_OWN)
    DTYPE: tl.constexpr = grad.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DTYPE else "tf32"
    first_feature = tl.program_id(0) * BLOCK_FEATURES
    row_slice = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_column = (columns < WIDTH)[None, :]
    rows = row_slice.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    values = window_bytes(
        obs, rows, rows < num_rows, first_feature, NUM_CELLS, NUM_CODES, ROW_BYTES, BLOCK_FEATURES
    )  # fmt: skip
    sums = tl.zeros((BLOCK_FEATURES, BLOCK_WIDTH), tl.float32)
    for _ in range(BLOCKS_PER_SLICE):
        # a row behind the last has a zero gradient here: its features do not matter
        at = rows[:, None] * WIDTH + columns[None, :]
        rows_grad = tl.load(grad + at, mask=(rows < num_rows)[:, None] & is_column, other=0.0)
        tile = features_of_bytes(
            values, first_feature, own_scale, NUM_CELLS, NUM_CODES, NUM_OWN, BLOCK_FEATURES, DTYPE
        )  # fmt: skip
        # the next rows' bytes are on their way while the product runs
        rows += tl.num_programs(1) * BLOCK_ROWS
        values = window_bytes(
            obs, rows, rows < num_rows, first_feature, NUM_CELLS, NUM_CODES, ROW_BYTES, BLOCK_FEATURES
        )  # fmt: skip
        sums = tl.dot(tl.trans(tile), rows_grad, sums, input_precision=PRECISION)
    features = first_feature + tl.arange(0, BLOCK_FEATURES)
    at = (row_slice.to(tl.int64) * NUM_FEATURES + features)[:, None] * WIDTH + columns[None, :]
    tl.store(partial + at, sums, mask=(features < NUM_FEATURES)[:, None] & is_column)


def encode_window(
    obs: Tensor, weights: Tensor, own_scale: Tensor, *, num_cells: int, num_codes: int, out: Tensor | None = None
) -> Tensor:
    """F @ weights: the encoding of windows before the activation.

    Args:
        obs: (num_rows, row_bytes) uint8, contiguous.
        weights: (num_features, width) float32 or bfloat16, contiguous: the feature rows, as the module's head says.
        own_scale: (num_own,) float32, what an own-state byte is multiplied by.
        num_cells, num_codes: of the window; the codes include 0, empty.
        out: where to write the result, if not into a new tensor; contiguous.

    Returns:
        (num_rows, width) in the dtype of `weights`.
    """
    (num_rows, row_bytes), (num_features, width) = obs.shape, weights.shape
    assert obs.is_contiguous()
    assert weights.is_contiguous()
    assert num_features == count_features(num_cells, num_codes, len(own_scale))
    out = torch.empty(num_rows, width, dtype=weights.dtype, device=obs.device) if out is None else out
    block_width = _block_width(width)
    block_rows = _block_rows(obs, weights.dtype)
    encode_window_kernel[(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_width))](
        obs, weights, own_scale, out, num_rows,
        NUM_CELLS=num_cells, NUM_CODES=num_codes, NUM_OWN=len(own_scale), ROW_BYTES=row_bytes, WIDTH=width,
        BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


def window_weight_grad(obs: Tensor, grad: Tensor, own_scale: Tensor, *, num_cells: int, num_codes: int) -> Tensor:
    """F.T @ grad: the gradient of the feature rows; the same from call to call, bit for bit.

    The rows are cut into slices that run side by side; their sums are added up in the end.

    Args:
        grad: (num_rows, width) float32 or bfloat16, contiguous: dL/d(encoding).
        obs, own_scale, num_cells, num_codes: as in `encode_window`.

    Returns:
        (num_features, width) float32.
    """
    (num_rows, row_bytes), width = obs.shape, grad.shape[1]
    assert obs.is_contiguous()
    assert grad.is_contiguous()
    num_features = count_features(num_cells, num_codes, len(own_scale))
    block_rows = 32 if obs.is_cuda else 16
    # a block of features comes from neighbouring columns, so it must not cross from one code to the next
    block_features = 64 if triton.cdiv(num_cells, CHUNK) % 2 else 128
    block_width = _block_width(width)
    num_blocks = triton.cdiv(num_features, block_features), triton.cdiv(width, block_width)
    num_row_blocks = max(1, triton.cdiv(num_rows, block_rows))
    num_slices = max(1, min(_NUM_PROGRAMS // (num_blocks[0] * num_blocks[1]), num_row_blocks))
    partial = torch.empty(num_slices, num_features, width, device=obs.device)
    window_weight_grad_kernel[(num_blocks[0], num_slices, num_blocks[1])](
        obs, grad, own_scale, partial, num_rows,
        NUM_CELLS=num_cells, NUM_CODES=num_codes, NUM_OWN=len(own_scale),
        ROW_BYTES=row_bytes, WIDTH=width,
        BLOCKS_PER_SLICE=triton.cdiv(num_row_blocks, num_slices),
        BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features, BLOCK_WIDTH=block_width, num_warps=8, num_stages=3,
    )  # fmt: skip
    return partial.sum(dim=0)


class _WindowProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, obs: Tensor, weights: Tensor, own_scale: Tensor, num_cells: int, num_codes: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(obs, own_scale)
        ctx.sizes = {"num_cells": num_cells, "num_codes": num_codes}
        return encode_window(obs, weights.to(dtype), own_scale, **ctx.sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        obs, own_scale = ctx.saved_tensors
        return None, window_weight_grad(obs, grad.contiguous(), own_scale, **ctx.sizes), None, None, None, None


def window_product(
    obs: Tensor, weights: Tensor, own_scale: Tensor, *, num_cells: int, num_codes: int, dtype: torch.dtype
) -> Tensor:
    """`encode_window` in `dtype`, differentiable in weights (num_features, width) float32."""
    result: Tensor = _WindowProduct.apply(obs, weights, own_scale, num_cells, num_codes, dtype)
    return result
