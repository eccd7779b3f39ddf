"""From a pinned policy to a frozen module that can act: verified bytes -> decoded -> built -> loaded -> bound.

Whatever is wrong with a policy is found here, before the first step: other spaces, other shapes, missing weights,
numbers that are not finite, a net that does not answer as the Policy protocol says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dual_policy_plugin.checkpoint import (
    DESCRIPTION_KEY,
    PolicyFile,
    check_tensors,
    decode_policy,
    encode_policy,
    one_line,
    read_safetensors,
    short,
)
from dual_policy_plugin.errors import CheckpointError, ConfigError, SpacesError
from dual_policy_plugin.files import publish
from dual_policy_plugin.npc.resolver import PinnedPolicy, read_verified, resolve
from dual_policy_plugin.policies.binding import BoundPolicy, bind_policy
from dual_policy_plugin.policies.build import build_policy, given_architectures
from dual_policy_plugin.policies.memoryless import with_forward_step
from dual_policy_plugin.torch_file import decode_state_dict, strip_wrappers
from dual_policy_plugin.types import ObservationSpace

_Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def load_policy(
    pinned: PinnedPolicy,
    *,
    observation_space: ObservationSpace,
    actions: tuple[str, ...],
    default_agent: str,
    default_args: dict[str, Any],
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The pinned policy, bound to an env, frozen: eval mode, no gradients, float32 parameters on `device`, packed.

    Args:
        pinned: from `resolve`.
        observation_space: the env's.
        actions: the env's, in the order of their numbers.
        default_agent: architecture of a `.pt` file, which does not name its own.
        default_args: arguments of that architecture.
        device: where it will run.
        compute_dtype: dtype of its matrix products, where the architecture lets it be chosen.

    Raises:
        CheckpointError: the file is malformed, or its weights are not those of its architecture.
        SpacesError: it was made for other observations or actions.
        NpcError: the bytes are gone, or others than those that were pinned (DigestError).
    """
    if pinned.script is not None:
        try:
            policy = build_policy(pinned.script, {}, observation_space, actions)
        except SpacesError as error:
            raise SpacesError(f"{pinned.uri} does not fit the env: {error}; take a policy made for this env") from error
    else:
        data = read_verified(pinned)
        if _is_safetensors(data, pinned):
            file = decode_policy(data, pinned.uri)
            policy = _bind_file(file, observation_space, actions, pinned.uri)
        else:
            net = _load_state_dict(data, pinned.uri, default_agent, default_args, observation_space, actions)
            policy = with_forward_step(net)
    return _freeze(policy, observation_space, actions, device, compute_dtype, pinned.uri)


def load_policy_from_checkpoint(
    uri: str,
    device: str | torch.device = "cpu",
    *,
    observation_space: ObservationSpace | None = None,
    actions: tuple[str, ...] | None = None,
    agent: str | None = None,
    agent_args: dict[str, Any] | None = None,
    architectures: Mapping[str, Callable[..., nn.Module]] | None = None,
) -> nn.Module:
    """The policy at `uri` as an `nn.Module` in eval mode without gradients; it acts by `forward_step`.

    Args:
        uri: a path, file://..., builtin://... or a directory of checkpoints.
        device: where its parameters are put.
        observation_space: what it is bound to; None: its own. A `.pt` file and a script have none, so they need it.
        actions: names of the actions, likewise.
        agent: architecture of a `.pt` file; other files name their own.
        agent_args: arguments of that architecture.
        architectures: name -> callable (observation_space, actions, **args) -> nn.Module, for nets of your own.

    Raises:
        NpcError: nothing stands there, or it cannot be read.
        CheckpointError: it is no policy that can be loaded.
        ConfigError: the device is not there, or a `.pt` file or a script was named without what it lacks.
    """
    place = _check_device(device)
    pinned = resolve(uri)
    data = read_verified(pinned)
    if pinned.script is None and _is_safetensors(data, pinned):
        file = decode_policy(data, pinned.uri)
        space, names = observation_space or file.observation_space, actions or file.actions
        with given_architectures(architectures or {}):
            policy = _bind_file(file, space, names, pinned.uri)
        return _freeze(policy, space, names, place, torch.float32, pinned.uri)
    missing = [key for key, value in (("observation_space", observation_space), ("actions", actions)) if value is None]
    if pinned.script is None and agent is None:
        missing.append("agent")
    if observation_space is None or actions is None or missing:
        kind = "a script" if pinned.script is not None else "no policy file of this package"
        raise ConfigError(f"{uri} is {kind} and does not say what it is made for; pass {', '.join(missing)}")
    with given_architectures(architectures or {}):
        return load_policy(
            pinned,
            observation_space=observation_space,
            actions=actions,
            default_agent=agent or "",
            default_args=agent_args or {},
            device=place,
        )


def read_description(pinned: PinnedPolicy) -> PolicyFile | None:
    """What a pinned policy file says about itself; None for a script and for a foreign file, which say nothing.

    Raises:
        CheckpointError: the file is malformed.
        NpcError: the bytes are gone, or others than those that were pinned (DigestError).
    """
    if pinned.script is not None:
        return None
    data = read_verified(pinned)
    return decode_policy(data, pinned.uri) if _is_safetensors(data, pinned) else None


def import_policy(
    old: Path,
    new: Path,
    *,
    agent: str,
    args: dict[str, Any],
    observation_space: ObservationSpace,
    actions: tuple[str, ...],
) -> PolicyFile:
    """Writes a foreign state dict (`.pt`, or a `.safetensors` without our description) as a policy file.

    Args:
        old: the file to convert; it stays.
        new: the policy file to write; must not exist.
        agent: the architecture that the weights belong to.
        args: its arguments.
        observation_space: what the weights were trained to see.
        actions: the actions that they were trained to choose from.

    Raises:
        CheckpointError: the weights are not those of the architecture, or `new` is no new .safetensors file.
    """
    if new.suffix != ".safetensors":
        raise CheckpointError(f"{new}: a policy file is named .safetensors; write to {new.with_suffix('.safetensors')}")
    if new.exists():
        raise CheckpointError(f"{new} exists already; remove it or choose another name")
    pinned = resolve(str(old))
    policy = _load_state_dict(read_verified(pinned), pinned.uri, agent, args, observation_space, actions)
    file = PolicyFile(
        architecture=agent,
        args=args,
        observation_space=observation_space,
        actions=actions,
        tensors=policy.state_dict(),
        metadata={"step": 0, "epoch": 0, "imported": {"name": old.name, "sha256": pinned.sha256}},
    )
    publish(new, encode_policy(file))
    return file


def _is_safetensors(data: bytes, pinned: PinnedPolicy) -> bool:
    """By content; a file that is named so must be so."""
    return data[8:9] == b"{" or (pinned.path is not None and pinned.path.suffix == ".safetensors")


def _load_state_dict(
    data: bytes, where: str, agent: str, args: dict[str, Any], space: ObservationSpace, actions: tuple[str, ...]
) -> nn.Module:
    """A policy of the named architecture with the weights of a foreign file."""
    with torch.random.fork_rng(devices=[]):  # the random numbers of the run are not touched
        policy = build_policy(agent, args, space, actions)
    expected = policy.state_dict().keys()
    if data[8:9] == b"{":
        metadata, tensors = read_safetensors(data, where)
        if DESCRIPTION_KEY in metadata:
            raise CheckpointError(f"{where} is a policy file already; it needs no import")
        tensors = strip_wrappers(tensors, expected)
    else:
        tensors = decode_state_dict(data, where, expected=expected)
    return _load_tensors(policy, tensors, f"{where} (as agent {agent})")


def _bind_file(file: PolicyFile, space: ObservationSpace, actions: tuple[str, ...], where: str) -> nn.Module:
    """The net that a policy file describes, with its weights, bound to an env.

    It is built without memory first: a file whose arguments promise a larger net than it has weights for is refused
    before that net is allocated.
    """
    try:
        with torch.device("meta"):
            shapes = _shapes(_build(file, where).state_dict())
    except CheckpointError as error:
        if isinstance(error.__cause__, ConfigError):
            raise
        shapes = None  # an installed architecture may need real tensors to be built
    if shapes is not None:
        _check_shapes(shapes, _shapes(file.tensors), where)
    policy = _load_tensors(_build(file, where), file.tensors, where)
    return bind_policy(
        with_forward_step(policy),
        own_space=file.observation_space,
        own_actions=file.actions,
        env_space=space,
        env_actions=actions,
        where=where,
    )


def _build(file: PolicyFile, where: str) -> nn.Module:
    """The net of a policy file, freshly initialized; the random numbers of the run are not touched."""
    try:
        with torch.random.fork_rng(devices=[]):
            return build_policy(file.architecture, file.args, file.observation_space, file.actions)
    except Exception as error:  # an architecture may answer bad arguments with anything
        raise CheckpointError(f"{where}: its architecture cannot be built: {one_line(error)}") from error


def _load_tensors(policy: nn.Module, tensors: dict[str, Tensor], where: str) -> nn.Module:
    """`policy` with all its parameters and buffers from `tensors`."""
    _check_shapes(_shapes(policy.state_dict()), _shapes(tensors), where)
    policy.load_state_dict(tensors, strict=True)
    check_tensors(policy.state_dict(), where)  # again: a float64 may not fit a float32
    return policy


def _shapes(tensors: Mapping[str, Tensor]) -> _Shapes:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _check_shapes(expected: _Shapes, given: _Shapes, where: str) -> None:
    """Raises a CheckpointError that names up to three tensors, unless names, shapes and kinds of numbers agree."""
    for problem, names in (
        ("lacks", expected.keys() - given.keys()),
        ("has unexpected", given.keys() - expected.keys()),
    ):
        if names:
            raise CheckpointError(f"{where} {problem} {_few(names)}; its weights are not those of its architecture")
    wrong = {
        f"{short(name)} is {_describe(given[name])}, expected {_describe(expected[name])}"
        for name in expected
        if given[name][0] != expected[name][0]
        or (given[name][1] != expected[name][1] and not _are_floats(given[name][1], expected[name][1]))
    }
    if wrong:
        raise CheckpointError(f"{where} has other shapes than its architecture: {_few(wrong, '; ')}")


def _are_floats(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point for dtype in dtypes)


def _describe(shape: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{str(shape[1]).removeprefix('torch.')}{list(shape[0])}"


def _few(names: Collection[str], separator: str = ", ") -> str:
    """Up to three names and the count of the others."""
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(short(name, 160) for name in sorted(names)[:3]) + others


def _freeze(
    policy: nn.Module,
    space: ObservationSpace,
    actions: tuple[str, ...],
    device: torch.device,
    compute_dtype: torch.dtype,
    where: str,
) -> nn.Module:
    """`policy` ready to act, after it answered once as the Policy protocol says."""
    policy = policy.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    net = policy.policy if isinstance(policy, BoundPolicy) else policy
    if hasattr(net, "compute_dtype"):
        net.compute_dtype = compute_dtype  # type: ignore[assignment]
    if hasattr(policy, "pack"):
        policy.pack()  # type: ignore[operator]
    check_answer(policy, space, actions, device, where)
    return policy


def check_answer(
    policy: nn.Module, space: ObservationSpace, actions: tuple[str, ...], device: torch.device, where: str
) -> None:
    """Raises a CheckpointError unless one step on empty observations gives finite answers of the right shapes."""
    num_rows = 2
    dtype = torch.float32 if space.kind == "vector" else torch.uint8
    obs = torch.zeros(num_rows, *space.shape, dtype=dtype, device=device)
    try:
        before = torch.zeros(num_rows, policy.state_size, device=device)  # type: ignore[call-overload]
        with torch.no_grad():
            logits, values, state = policy.forward_step(obs, before)  # type: ignore[operator]
    except Exception as error:
        raise CheckpointError(f"{where}: the policy cannot act: {one_line(error)}") from error
    shapes = (tuple(logits.shape), tuple(values.shape), tuple(state.shape))
    expected = ((num_rows, len(actions)), (num_rows,), tuple(before.shape))
    if shapes != expected:
        raise CheckpointError(f"{where}: the policy answers {num_rows} rows with shapes {shapes}, expected {expected}")
    # a logit of minus infinity is an action that is never taken; amax hands NaN on
    is_sound = torch.isfinite(values).all() & torch.isfinite(state).all() & torch.isfinite(logits.amax(dim=1)).all()
    if not bool(is_sound):
        raise CheckpointError(f"{where}: the policy's answer to an empty observation is not finite")


def _check_device(device: str | torch.device) -> torch.device:
    """The device, if it is there."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} is not there: {one_line(error)}; use cpu or cuda") from error
    return place
