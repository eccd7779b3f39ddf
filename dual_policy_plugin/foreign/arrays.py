"""Arrays of somebody else's trainer, numpy's or torch's, checked and turned into our tensors; and what goes back.

Between `dual_policy.py`, the public API, and everything below it, which knows tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dual_policy_plugin.errors import EnvError

Array = TypeVar("Array", np.ndarray[Any, Any], Tensor)


def pick_seats(obs: Any, shape: tuple[int, ...], seats: Tensor, dtype: str) -> Tensor:
    """The observations of some seats, as a tensor where `seats` are.

    Args:
        obs: an array or a tensor.
        shape: (num_envs, num_agents, *shape), what it must have.
        seats: (num_seats,) int64.
        dtype: float32, which any number becomes; or uint8, which `obs` must have.

    Returns:
        (num_envs, num_seats, *shape).

    Raises:
        EnvError: another shape, dtype or device.
    """
    if not isinstance(obs, np.ndarray | Tensor):
        raise EnvError(f"obs is a {type(obs).__name__}; use a numpy array or a tensor of shape {shape}")
    if tuple(obs.shape) != shape:
        raise EnvError(f"obs has shape {tuple(obs.shape)}, expected (num_envs, num_agents, ...) = {shape}")
    if dtype == "uint8" and str(obs.dtype).removeprefix("torch.") != "uint8":
        raise EnvError(f"obs has dtype {obs.dtype}, expected uint8, as the observation space says")
    wanted: torch.dtype = getattr(torch, dtype)
    if isinstance(obs, Tensor):
        _check_device(obs, "obs", seats.device)
        return obs.detach().index_select(1, seats).to(wanted)
    picked = obs.take(seats.tolist(), axis=1).astype(dtype, copy=False)  # a copy of its own, in order
    return torch.from_numpy(picked).to(seats.device)


def as_table(
    values: Any, name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Numbers of a step as a tensor; for bool, true where they are not 0.

    Args:
        values: an array, a tensor or lists.
        name: for messages.
        shapes: those that are right.
        dtype, device: of the result.

    Raises:
        EnvError: another shape or device, or no numbers.
    """
    if isinstance(values, Tensor):
        _check_device(values, name, device)
        tensor = values.detach()
    else:
        array = np.array(values)  # a copy: theirs may be read-only
        if array.dtype.kind not in "biuf":
            raise EnvError(f"{name} holds {array.dtype}; use numbers")
        tensor = torch.from_numpy(array).to(device)
    if tuple(tensor.shape) not in shapes:
        raise EnvError(f"{name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")
    return tensor != 0 if dtype == torch.bool else tensor.to(dtype)


def as_actions(actions: Array, shape: tuple[int, int]) -> Array:
    """The learner seats' actions as a table.

    Args:
        actions: whole numbers of that shape, or all of them as one row.
        shape: (num_envs, num_seats).

    Raises:
        EnvError: another shape, or no whole numbers.
    """
    shapes = (shape, (shape[0] * shape[1],))
    if not isinstance(actions, np.ndarray | Tensor) or tuple(actions.shape) not in shapes:
        found = f"shape {tuple(actions.shape)}" if hasattr(actions, "shape") else f"a {type(actions).__name__}"
        raise EnvError(f"actions has {found}, expected the learner seats' actions, {shapes[0]} or {shapes[1]}")
    if isinstance(actions, Tensor):
        if actions.is_floating_point() or actions.dtype == torch.bool:
            raise EnvError(f"actions has dtype {actions.dtype}; use whole numbers, for example torch.int64")
        return actions.detach().view(shape)
    if actions.dtype.kind not in "iu":
        raise EnvError(f"actions has dtype {actions.dtype}; use whole numbers, for example int64")
    return actions.reshape(shape)


def fill_table(actions: Array, seats: list[int], others: Tensor, other_seats: list[int]) -> Array:
    """A table of all seats' actions.

    Args:
        actions: (num_envs, len(seats)), from `as_actions`.
        seats: whose.
        others: (num_envs, len(other_seats)) int64.
        other_seats: the seats that are not in `seats`.

    Returns:
        (num_envs, num_agents), of the kind, dtype and device of `actions`.
    """
    shape = (len(others), len(seats) + len(other_seats))
    if isinstance(actions, Tensor):
        table = actions.new_empty(shape)
        table[:, seats] = actions
        table[:, other_seats] = others.to(table.device, table.dtype)
        return table
    array = np.empty(shape, actions.dtype)
    array[:, seats] = actions
    array[:, other_seats] = others.cpu().numpy()
    return array


def same_kind(result: Tensor, given: Array) -> Array:
    """`result` as a numpy array where `given` is one."""
    return result if isinstance(given, Tensor) else result.cpu().numpy()


def _check_device(values: Tensor, name: str, device: torch.device) -> None:
    if values.device != device:
        raise EnvError(f"{name} is on {values.device}, the NPCs on {device}; open with device={str(values.device)!r}")
