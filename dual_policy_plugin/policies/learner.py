"""The policy that trains: built fresh or from a checkpoint, and written to policy files.

Takes the config's agent and, if there is one, `trainer.initial_policy`; gives a Learner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.checkpoint import PolicyFile, encode_policy
from dual_policy_plugin.config import AgentConfig
from dual_policy_plugin.errors import CheckpointError, ConfigError
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.policies.binding import BoundPolicy
from dual_policy_plugin.policies.build import build_policy, is_ours
from dual_policy_plugin.policies.loading import check_answer, load_policy, read_description
from dual_policy_plugin.policies.scripted import SCRIPTED
from dual_policy_plugin.ranks.distributed import Ranks, sum_over_ranks
from dual_policy_plugin.types import EnvSpec, ObservationSpace


@dataclass(kw_only=True, slots=True, frozen=True)
class Learner:
    """The trained policy and what a policy file says about it."""

    policy: nn.Module
    """In the env's spaces."""
    inner: nn.Module
    """The net itself, in its own spaces: `policy`, or what it wraps where an initial policy had another order."""
    agent: AgentConfig
    observation_space: ObservationSpace
    """The net's own."""
    actions: tuple[str, ...]
    """The net's own."""

    @torch.no_grad()
    def update_statistics(self, experience: Experience, ranks: Ranks) -> None:
        """Merges a rollout's observations, of all ranks, into the net's normalization; nothing where it has none."""
        if not self.normalizes:
            return
        obs = experience.obs[:-1]  # (horizon, num_rows, num_features)
        if isinstance(self.policy, BoundPolicy):
            obs = self.policy.translate(obs, 2)  # the net's own order of features
        weights = obs.new_ones(obs.shape[:2]) if experience.weights is None else experience.weights
        weights = weights.unsqueeze(-1)
        totals = torch.cat([weights.sum().view(1), (obs * weights).sum(dim=(0, 1), dtype=torch.float64)])
        totals = sum_over_ranks(totals, ranks)
        count = totals[0].clamp(min=1.0)
        mean = (totals[1:] / count).float()
        # about the mean, not about 0: E[x^2] - E[x]^2 of a feature near 5000 loses its variance in float32
        squares = ((obs - mean).square() * weights).sum(dim=(0, 1), dtype=torch.float64)
        variance = (sum_over_ranks(squares, ranks) / count).float()
        self.inner.update_statistics(totals[0].float(), mean, variance)  # type: ignore[operator]

    @property
    def normalizes(self) -> bool:
        """Whether the net keeps running statistics of its observations."""
        return self.observation_space.kind == "vector" and hasattr(self.inner, "update_statistics")

    def encode(self, metadata: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> bytes:
        """The bytes of a policy file with the present weights, stored in `dtype`."""
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.inner.state_dict().items()
        }
        return encode_policy(
            PolicyFile(
                architecture=self.agent.name,
                args=self.agent.args,
                observation_space=self.observation_space,
                actions=self.actions,
                tensors=tensors,
                metadata=metadata,
            )
        )


def build_learner(
    agent: AgentConfig,
    spec: EnvSpec,
    *,
    seed: int,
    initial: PinnedPolicy | None,
    initial_agent: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Learner:
    """A learner with fresh weights, or with those of a checkpoint of the same architecture.

    Args:
        agent: architecture and arguments.
        spec: the env it will see.
        seed: of the fresh weights.
        initial: trainer.initial_policy, pinned; None: fresh weights.
        initial_agent: architecture of a bare state dict; None: the agent's.
        dtype: of matrix products.
        device: where it trains.

    Raises:
        ConfigError: unknown architecture or arguments, or an architecture that cannot learn.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    if agent.name in SCRIPTED:
        raise ConfigError(f"agent={agent.name} is a script, which cannot learn; use agent=fast or agent=mlp")
    if initial is not None and initial.script is not None:
        raise ConfigError(
            f"trainer.initial_policy.uri={initial.requested} is a script without weights; name a checkpoint, or null"
        )
    torch.manual_seed(seed)
    space, actions = spec.observation_space, spec.actions
    if initial is None:
        policy = inner = build_policy(agent.name, agent.args, space, actions)
        _check_can_learn(inner, agent.name)
    else:
        policy = load_policy(
            initial,
            observation_space=space,
            actions=actions,
            default_agent=initial_agent or agent.name,
            default_args=agent.args,
            device=torch.device("cpu"),
        )
        inner = policy.policy if isinstance(policy, BoundPolicy) else policy
        file = read_description(initial)
        if file is not None:
            space, actions = file.observation_space, file.actions
        fresh = build_policy(agent.name, agent.args, space, actions)
        _check_can_learn(fresh, agent.name)
        _check_same_net(inner, fresh, agent, file, initial.requested)
    inner.compute_dtype = dtype  # type: ignore[assignment]
    policy.to(device)
    if not is_ours(agent.name):
        _check_acts(policy.eval(), spec, agent.name, device)
    policy.train().requires_grad_()
    return Learner(policy=policy, inner=inner, agent=agent, observation_space=space, actions=actions)


def _check_can_learn(net: nn.Module, name: str) -> None:
    """Raises a ConfigError for a net that lacks a part of the Policy protocol, of which an NPC needs less."""
    missing = [part for part in ("state_size", "pack", "forward_step", "forward_segment") if not hasattr(net, part)]
    if missing:
        raise ConfigError(
            f"agent.name={name} cannot learn: its net has no {', '.join(missing)}; "
            "give it what docs/own_architecture.md lists, or let it play as an NPC"
        )


def _check_acts(policy: nn.Module, spec: EnvSpec, name: str, device: torch.device) -> None:
    """Raises a ConfigError for a net that answers otherwise than the Policy protocol says; it might train even so."""
    policy.pack()  # type: ignore[operator]
    try:
        check_answer(policy, spec.observation_space, spec.actions, device, f"agent.name={name}")
    except CheckpointError as error:
        raise ConfigError(f"{error}; docs/own_architecture.md says what is expected") from error


def _check_same_net(
    inner: nn.Module, fresh: nn.Module, agent: AgentConfig, file: PolicyFile | None, requested: str
) -> None:
    """The config's agent and the checkpoint's must be one: a learner of another kind than asked for helps nobody."""
    shapes, expected = ({name: t.shape for name, t in net.state_dict().items()} for net in (inner, fresh))
    if type(inner) is type(fresh) and shapes == expected:
        return
    name, args = (agent.name, agent.args) if file is None else (file.architecture, file.args)
    ours = " ".join([agent.name, *(f"agent.{key}={value}" for key, value in agent.args.items())])
    settings = " ".join([f"agent={name}", *(f"agent.{key}={value}" for key, value in args.items())])
    others = [f"agent.{key}" for key in agent.args if name == agent.name and key not in args]
    without = f" without {' and '.join(others)}" if others else ""
    raise ConfigError(
        f"trainer.initial_policy.uri={requested} holds another net than agent={ours}; set {settings}{without}"
    )
