"""Kernels run in Triton's interpreter here, on CPU tensors; it must be switched on before Triton is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
