"""From an architecture's name and arguments to a module; the one table of architectures.

Names beyond the table come from installed packages through the entry-point group `dual_policy.policies`: a callable
`(observation_space, actions, **args) -> nn.Module` that follows the Policy protocol; or from the running program, which
hands such callables over itself. Nothing is ever imported by a path that stands in a config or a checkpoint.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.policies.nets import FastPolicy, MlpPolicy
from dual_policy_plugin.policies.scripted import SCRIPTED
from dual_policy_plugin.types import ObservationSpace

ENTRY_POINT_GROUP = "dual_policy.policies"
_TABLE: dict[str, Callable[..., nn.Module]] = {"fast": FastPolicy, "mlp": MlpPolicy, **SCRIPTED}
_GIVEN: ContextVar[Mapping[str, Callable[..., nn.Module]]] = ContextVar("_GIVEN", default=MappingProxyType({}))


@contextmanager
def given_architectures(architectures: Mapping[str, Callable[..., nn.Module]]) -> Iterator[None]:
    """Inside it, these names are known too: constructors that the running program holds, no texts that name some.

    Raises:
        ConfigError: a name of ours, or one whose value cannot be called.
    """
    for name, constructor in architectures.items():
        if name in _TABLE:
            raise ConfigError(f"architectures has the name {name}, which is an architecture of this package; rename it")
        if not callable(constructor):
            raise ConfigError(f"architectures[{name!r}] is no callable (observation_space, actions, **args); give one")
    token = _GIVEN.set(architectures)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def is_ours(name: str) -> bool:
    """Whether an architecture comes with this package."""
    return name in _TABLE


def architecture(name: str) -> Callable[..., nn.Module]:
    """The constructor of an architecture.

    Raises:
        ConfigError: no such name; names the nearest one. Or what is installed under it cannot be imported.
    """
    if name in _TABLE:
        return _TABLE[name]
    given = _GIVEN.get()
    if name in given:
        return given[name]
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        try:
            constructor: Callable[..., nn.Module] = installed[name].load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"agent={name} stands for {installed[name].value}, which cannot be loaded: {error}; "
                "mend the package that names it, or install what it needs"
            ) from error
        if not callable(constructor):
            raise ConfigError(
                f"agent={name} stands for {installed[name].value}, which is no callable; name a class there"
            )
        return constructor
    known = sorted({*_TABLE, *given, *installed})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"agent={name} is not known; {hint}there are {', '.join(known)}")


def build_policy(
    name: str, args: dict[str, Any], observation_space: ObservationSpace, actions: tuple[str, ...]
) -> nn.Module:
    """A freshly initialized policy.

    Raises:
        ConfigError: unknown name, or arguments that the architecture does not take.
    """
    constructor = architecture(name)
    _check_args(name, args, constructor)
    try:
        return constructor(observation_space, actions, **args)
    except TypeError as error:
        raise ConfigError(f"agent={name} does not take {args}: {error}") from error


def _check_args(name: str, args: dict[str, Any], constructor: Callable[..., nn.Module]) -> None:
    """Raises a ConfigError for an argument that the constructor has no parameter for, naming the nearest one."""
    parameters = list(inspect.signature(constructor).parameters.values())[2:]  # after observation space and actions
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for key, value in args.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean agent.{near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ConfigError(f"agent.{key}={value!r} is no setting of agent={name}; {hint}")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for `trainer.precision`; auto takes bf16 where the hardware multiplies it.

    Raises:
        ConfigError: bf16 was asked for and the GPU has none.
    """
    if precision == "fp32":
        return torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "bf16" and not has_bf16:
            raise ConfigError("trainer.precision=bf16 is not possible on this GPU; use fp32 or auto")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 or precision == "bf16" else torch.float32
