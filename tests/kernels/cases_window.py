"""The window encoder's kernels at the arena's size, for `ahead_of_time.py`."""

from __future__ import annotations

from dual_policy_plugin.kernels.window import encode_window_kernel, window_weight_grad_kernel
from tests.kernels.ahead_of_time import Case

ARENA = {"NUM_CELLS": 121, "NUM_CODES": 8, "NUM_OWN": 5, "ROW_BYTES": 128, "WIDTH": 128}


def encode(dtype: str, block_rows: int) -> Case:
    return Case(
        name=f"encode_window_{dtype}",
        kernel=encode_window_kernel,
        signature={"obs": "*u8", "weights": f"*{dtype}", "own_scale": "*fp32", "out": f"*{dtype}", "num_rows": "i32"},
        constexprs={**ARENA, "BLOCK_ROWS": block_rows, "BLOCK_WIDTH": 128},
        num_warps=8,
        num_stages=2,
        tensor_cores=dtype == "bf16",
    )


def weight_grad(dtype: str) -> Case:
    blocks = {"BLOCKS_PER_SLICE": 497, "BLOCK_ROWS": 32, "BLOCK_FEATURES": 128, "BLOCK_WIDTH": 128}
    return Case(
        name=f"window_weight_grad_{dtype}",
        kernel=window_weight_grad_kernel,
        signature={"obs": "*u8", "grad": f"*{dtype}", "own_scale": "*fp32", "partial": "*fp32", "num_rows": "i32"},
        constexprs={**ARENA, **blocks},
        num_warps=8,
        num_stages=3,
        tensor_cores=dtype == "bf16",
    )


CASES = [encode("bf16", 128), encode("fp32", 64), weight_grad("bf16"), weight_grad("fp32")]
