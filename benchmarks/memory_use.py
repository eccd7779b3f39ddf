"""How much memory something takes: the tensors that it holds, and how high the peak went."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dual_policy_plugin.policies.stacked import StackedPolicies


class PeakMemory:
    """How far the peak of memory rises above what was held when this was made.

    CUDA: allocated bytes. CPU: resident bytes of this process, after the C library has given back what was free.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # what a graph was recorded from lies in reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a dead graph's memory serves no other
            torch.cuda.reset_peak_memory_stats(device)
        else:
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)
            with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is that of the process's whole life
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self._peak()

    def growth(self) -> int:
        """Bytes."""
        return max(0, self._peak() - self.before)

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensors_of(*owners: Any) -> dict[int, int]:
    """Address -> bytes of the storages of all tensors that objects hold; policies, stacked ones too, are left out."""
    found: dict[int, int] = {}
    waiting, seen = list(owners), set()
    while waiting:
        owner = waiting.pop()
        if id(owner) in seen or isinstance(owner, nn.Module | StackedPolicies | type):
            continue
        seen.add(id(owner))
        if isinstance(owner, Tensor):
            storage = owner.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(owner, dict):
            waiting += owner.values()
        elif isinstance(owner, list | tuple | set):
            waiting += owner
        elif type(owner).__module__.partition(".")[0] in ("dual_policy_plugin", "benchmarks"):
            if dataclasses.is_dataclass(owner):
                waiting += [getattr(owner, field.name, None) for field in dataclasses.fields(owner)]
            waiting += getattr(owner, "__dict__", {}).values()
    found.pop(0, None)  # empty tensors
    return found
