"""Copies between the memory of the env workers and a CUDA device, none of which holds up the device or the host.

Used by `WorkerVecEnv` where the trainer is on a GPU. The shared block itself is pinned, so a copy needs no staging
buffer on the host. Each half of the envs has rows of its own on the device: while the policies read one half's, the
other half's arrive on a stream of their own. Nothing here runs on a CPU-only machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from dual_policy_plugin.errors import EnvError

CUDA_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
PULLED = ("observations", "rewards", "dones", "weights", "counters", "episode_ends")
"""What a device needs of a step. Truncated rows are rare, and looked up on the host: asking the device would wait."""


def pin(shared: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """Pins the block that `shared` lies in; gives the function that ends this, to be called before it is unmapped.

    Raises:
        EnvError: CUDA refuses.
    """
    tensors = [tensor for tensor in shared.values() if tensor.numel()]
    start = min(tensor.data_ptr() for tensor in tensors)
    size = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors) - start
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        error = cudart.cudaHostRegister(start, size, CUDA_HOST_REGISTER_PORTABLE)
    if int(error) != 0:
        reason = cudart.cudaGetErrorString(error)
        raise EnvError(
            f"env.num_envs: the {size} bytes that the env workers share cannot be pinned ({reason}); use fewer envs, "
            "or device=cpu"
        )

    def unpin() -> None:
        with contextlib.suppress(RuntimeError):  # a device that failed has said so where it was used
            torch.cuda.synchronize(device)  # no copy may be under way
        cudart.cudaHostUnregister(start)

    return unpin


def allocate_copies(shared: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on the device for what a step brings there, shaped like the shared ones."""
    return {key: torch.zeros_like(shared[key], device=device) for key in PULLED}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, without waiting for the device; a CPU's stays as it is."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class DeviceCopies:
    """The way of some envs' rows from and to the device.

    No event keeps a copy from overwriting what is still read, because of the order of things:
        the device's rows: `pull` follows a step that the workers began after `push` was through, and `push` is ordered
            after all that the current stream was given before, so also after all that read the last step's rows;
        the workers' rows: likewise they begin to write when `push` is through, and the last `pull` was before that.
    Whoever uses an env must read its rows on one stream, the one on which it calls.
    """

    def __init__(self, shared: dict[str, Tensor], local: dict[str, Tensor]) -> None:
        self._actions = shared["actions"]
        self._pairs = [(local[key], shared[key]) for key in PULLED]
        self._device = local["rewards"].device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # blocking: whoever waits for it sleeps, and leaves the core to a worker
        self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def push(self, actions: Tensor) -> Callable[[], None]:
        """Begins to copy the actions into the workers' memory; gives the function that waits until they are there."""
        self._actions.copy_(actions, non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(self._device))
        return self._arrived.synchronize

    def pull(self) -> None:
        """Copies what the step brought to the device; what the current stream is given from now on finds it there."""
        with torch.cuda.stream(self._stream):
            for local, shared in self._pairs:
                local.copy_(shared, non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def settle(self) -> None:
        """Waits for all copies and all that reads their rows: a reset follows no `push`."""
        torch.cuda.synchronize(self._device)
