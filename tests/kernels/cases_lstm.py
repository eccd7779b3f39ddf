"""The LSTM's kernels as they are launched on a GPU: hidden size 128 in bfloat16, and the other sizes."""

from __future__ import annotations

import torch

from dual_policy_plugin.kernels.lstm import backward_kernel, forward_kernel, launch_shape, shared_bytes
from tests.kernels.ahead_of_time import Case

FORWARD = {
    "gates_x": "*bf16", "weight_hh": "*bf16", "state": "*fp32", "dones": "*i1", "gates": "*bf16", "cells": "*fp32",
    "hiddens": "*bf16", "outputs": "*bf16", "num_rows": "i32",
}  # fmt: skip
BACKWARD = {
    "grad_outputs": "*bf16", "gates": "*bf16", "weight_hh": "*bf16", "cells": "*fp32", "dones": "*i1",
    "grad_gates": "*bf16", "num_rows": "i32",
}  # fmt: skip
LIMITS = {80: 163 * 1024, 90: 227 * 1024}


def lstm_case(capability: int, hidden_size: int, *, backward: bool) -> Case:
    """One kernel at one size on one chip, held to the bound by which `supports` lets it run."""
    chip = (capability // 10, capability % 10)
    block_rows, num_warps = launch_shape(chip, backward=backward)
    limit = min(shared_bytes(hidden_size, torch.bfloat16, chip), LIMITS[capability])
    return Case(
        name=f"lstm {'backward' if backward else 'forward'} {hidden_size} sm_{capability}",
        kernel=backward_kernel if backward else forward_kernel,
        signature=BACKWARD if backward else FORWARD,
        constexprs={"HORIZON": 64, "H": hidden_size, "BLOCK_ROWS": block_rows, "IS_EXACT": False},
        num_warps=num_warps,
        num_stages=1,
        tensor_cores=hidden_size == 128,
        max_shared={capability: limit},
        capabilities=(capability,),
    )


CASES = [
    lstm_case(capability, size, backward=backward)
    for capability in (80, 90)
    for size in (128, 64, 16)
    for backward in (False, True)
]
