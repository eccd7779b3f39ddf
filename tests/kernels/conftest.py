"""Kernels run in Triton's interpreter here, on CPU tensors; it must be switched on before Triton is imported."""

from __future__ import annotations

import importlib.util
import os

os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton") is None:  # there is none for macOS
    collect_ignore_glob = ["*"]
