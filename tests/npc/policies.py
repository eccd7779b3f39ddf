"""Small policy files for the tests of sources: our header, and weights that mean nothing."""

from __future__ import annotations

import json
from typing import Any


def policy_bytes(epoch: int, *, size: int = 1000, **metrics: Any) -> bytes:
    """A policy file with our description and `size` bytes of weights."""
    metadata = {"epoch": epoch, "step": epoch * 100, "metrics": metrics, "run": "run_a"}
    description = {"format": 1, "architecture": "fast", "actions": ["noop", "north"], "metadata": metadata}
    header: dict[str, Any] = {
        "__metadata__": {"dual_policy": json.dumps(description)},
        "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    return (
        len(text).to_bytes(8, "little")
        + text
        + bytes(i * 7 % 251 for i in range(256)) * (size // 256)
        + bytes(size % 256)
    )
