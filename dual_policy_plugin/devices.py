"""Where a run computes: the device, the CPU's threads, and the kernels that a GPU has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.config import Config
from dual_policy_plugin.envs.build import num_processes
from dual_policy_plugin.envs.workers import num_cores
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.types import VecEnv


def set_threads(config: Config, make_host: Callable[..., Any] | None = None) -> None:
    """As many CPU threads as `trainer.threads` says; without it as many cores as the env's workers leave free.

    torch's threads spin between two operations: on a worker's core they cost the env 3 to 10 times its step.
    """
    num_free = num_cores() - num_processes(config.env, config.trainer.num_workers, make_host)
    torch.set_num_threads(config.trainer.threads or max(1, num_free))


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that `device=` names; auto takes CUDA where there is one. A GPU becomes the current one: kernels and
    graphs are launched there.

    Args:
        name: auto, cpu, cuda or cuda:N.
        local_rank: which process of this machine we are: auto and cuda give each its own GPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 0:
        # with its number, which set_device wants; a process that sees one GPU was given that one
        name = f"cuda:{local_rank if torch.cuda.device_count() > 1 else 0}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ConfigError(f"device={name} is not there, torch sees {there} CUDA devices; use auto or cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device.index)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device={name} does not work here ({reason}); use auto or cpu") from error
    return device


def check_triton() -> None:
    """Without Triton a GPU would run, silently, at a fraction of its speed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "trainer.fused=true needs the package triton, which is not installed; pip install triton, or use false"
        ) from error


def use_kernels(env: VecEnv, learner: nn.Module, device: torch.device, *, fused: bool) -> str:
    """Switches on the kernels of env and learner, where they have some; gives what the log says of the update."""
    if not fused:
        return "plain torch"
    from dual_policy_plugin.kernels.lstm import supports

    if hasattr(env, "use_kernels"):
        env.use_kernels = True
    if not hasattr(learner, "use_kernels"):
        return "plain torch in one CUDA graph: this agent has no kernels"
    if isinstance(learner, FastPolicy) and not supports(learner.hidden_size, learner.compute_dtype, device):
        return f"plain torch in one CUDA graph: no LSTM kernel for agent.hidden_size={learner.hidden_size}"
    learner.use_kernels = True  # type: ignore[assignment]
    return "fused kernels in one CUDA graph"
