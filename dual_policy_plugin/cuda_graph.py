"""A function recorded once as a CUDA graph and replayed after: no launch overhead, no Python, the same kernels.

Used by the rollout and the update. The function must read and write tensors that stay where they are, make no host
sync, and take nothing but what those tensors hold (a Python number would be baked in).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from dual_policy_plugin.errors import RunError

Result = TypeVar("Result")

WARM_UPS = 3
"""Calls that run as they are before the recording: kernels are compiled and chosen in them."""


class CapturedCall(Generic[Result]):
    """Calls a function: as it is for the first calls, then by replaying its recording.

    All calls do their work, the first ones too: nothing is played twice for a warm-up. What the function returns lies
    in the graph's own memory and is overwritten by the next call.
    """

    def __init__(self, function: Callable[[], Result], name: str) -> None:
        """Takes the function, and what it is called in an error."""
        self._function, self._name = function, name
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        """Runs the function on what its tensors hold now."""
        if self._graph is None and self._num_calls == WARM_UPS:
            gc.collect()  # a dead graph or tensor is not to be found, and given back, while this one is recorded
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads (NCCL's watchdog) may call CUDA meanwhile
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._result = self._function()
            except RuntimeError as error:  # a policy from elsewhere may ask the device, which nothing recorded may
                reason = str(error).partition("\n")[0]
                raise RunError(
                    f"trainer.fused=true: {self._name} cannot be recorded as a CUDA graph ({reason}); use false"
                ) from error
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
            return self._result  # type: ignore[return-value]
        self._num_calls += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def release(self) -> None:
        """Gives the recording back, at once, whoever still knows this object; it is not to be called again."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._result = None
