"""All that a continued run needs, as one file of plain numbers: tensors by name and counters as JSON.

`train.py` saves it after each checkpoint, and between two where it is told to stop, and restores it when the run
directory has one. With an env that can hand out its state (the arena) the continuation goes on inside the episodes;
with others all envs start anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dual_policy_plugin.checkpoint import read_safetensors
from dual_policy_plugin.distributed import Ranks, copy_from_first, share_text
from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.learning.ppo import PpoUpdate
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.policies.loading import read_description
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import VecEnv

STATE_NAME = "training.safetensors"
EPISODE_STATE = ("mixed", "pool", "metrics")
"""First parts of the names of tensors that belong to the running episodes."""


@dataclass(kw_only=True, slots=True)
class Counters:
    """How far a run is."""

    iteration: int = 0
    """Finished iterations; also the checkpoint's epoch."""
    agent_step: int = 0
    """Learner steps with weight 1, over all ranks."""
    env_agent_step: int = 0
    """Steps of all agents, over all ranks."""
    num_learner: int = 0
    """Learners in each env now; 0: as the run began."""
    share_wins: float = 0.0
    """Wins, draws as half, since the schedule of the share last looked at them."""
    share_episodes: float = 0.0
    """Episodes since then."""
    score_sum: float = 0.0
    """Of the metric that chooses the best checkpoint, over the iterations since the last one, weighed."""
    score_weight: float = 0.0
    """Of those iterations."""

    def add_iteration(self, learner_steps: int, env_agent_steps: int) -> None:
        """Counts a rollout of all ranks; a learner step of weight 0 is none."""
        self.iteration += 1
        self.agent_step += learner_steps
        self.env_agent_step += env_agent_steps


def encode_state(
    counters: Counters,
    env: VecEnv,
    mixed: MixedPolicy,
    ppo: PpoUpdate,
    metrics: EpisodeMetrics,
    roster: Mapping[str, Any] | None = None,
) -> bytes:
    """The state between two iterations; `roster` is `Roster.as_dict` of a run with NPCs."""
    tensors = _live_tensors(mixed, ppo, metrics)
    if hasattr(env, "state_dict"):
        tensors |= {f"env.{name}": tensor for name, tensor in env.state_dict().items()}
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"counters": json.dumps(asdict(counters)), "roster": json.dumps(roster)}
    return bytes(safetensors.torch.save(whole, metadata=metadata))


@dataclass(kw_only=True, slots=True, frozen=True)
class SavedState:
    """What `encode_state` was given, read once."""

    counters: Counters
    roster: dict[str, Any] | None
    tensors: dict[str, Tensor]


def decode_state(data: bytes, where: str) -> SavedState:
    """A saved state; `where` names it in errors."""
    metadata, tensors = read_safetensors(data, where)
    counters = Counters(**json.loads(metadata["counters"]))
    return SavedState(counters=counters, roster=json.loads(metadata["roster"]), tensors=tensors)


def restore_state(
    state: SavedState, where: str, env: VecEnv, mixed: MixedPolicy, ppo: PpoUpdate, metrics: EpisodeMetrics
) -> None:
    """Puts the tensors of a saved state into the live objects.

    Raises:
        RunError: the state was saved by a run of another shape.
    """
    saved = state.tensors
    has_env = hasattr(env, "load_state_dict") and any(name.startswith("env.") for name in saved)
    live = _live_tensors(mixed, ppo, metrics)
    for name, tensor in live.items():
        if name.split(".")[0] in EPISODE_STATE and not has_env:
            continue  # all envs start anew, and so do their states
        if name not in saved or saved[name].shape != tensor.shape:
            raise RunError(f"{where}: its {name} does not fit this run; use another run= name")
        tensor.copy_(saved[name])
    if has_env:
        env.load_state_dict({name[4:]: tensor for name, tensor in saved.items() if name.startswith("env.")})  # type: ignore[attr-defined]


def share_counters(counters: Counters, ranks: Ranks, device: torch.device) -> Counters:
    """The first rank's counters, on every rank; only that one has read the run directory."""
    return Counters(**json.loads(share_text(json.dumps(asdict(counters)), ranks, device)))


def share_state(mixed: MixedPolicy, ppo: PpoUpdate, metrics: EpisodeMetrics, ranks: Ranks) -> None:
    """Gives every rank the first one's policy and optimizer.

    The envs of the other ranks start anew: the state holds the first one's.
    """
    if ranks.world_size == 1:
        return
    for name, tensor in _live_tensors(mixed, ppo, metrics).items():
        if name.split(".")[0] not in EPISODE_STATE:
            copy_from_first(tensor, ranks)


def keep_optimizer(pinned: PinnedPolicy, ppo: PpoUpdate) -> None:
    """Takes Adam's moments from the run that made a checkpoint, for trainer.initial_policy.keep_optimizer.

    Raises:
        ConfigError: the checkpoint stands in no run directory, or its run has gone on since.
    """
    key = f"trainer.initial_policy.keep_optimizer=true with uri={pinned.requested}"
    path = None if pinned.path is None else pinned.path.parent.parent / "state" / STATE_NAME
    description = read_description(pinned)
    if path is None or description is None or not path.is_file():
        raise ConfigError(
            f"{key}: the optimizer stands in a run's state/ only; name a checkpoint of a run, or use false"
        )
    metadata, saved = read_safetensors(path.read_bytes(), str(path))
    epoch = json.loads(metadata["counters"])["iteration"]
    if epoch != description.metadata.get("epoch"):
        raise ConfigError(
            f"{key}: the run keeps the optimizer of epoch {epoch}, after which it was saved last; name that "
            "checkpoint, continue the run to its next one where there is none, or use false"
        )
    for name, tensor in ppo.adam_state().items():
        if saved[f"adam.{name}"].shape != tensor.shape:
            raise ConfigError(f"{key}: its optimizer is of another net; use false")
        tensor.copy_(saved[f"adam.{name}"])


def _live_tensors(mixed: MixedPolicy, ppo: PpoUpdate, metrics: EpisodeMetrics) -> dict[str, Tensor]:
    """The tensors that a run's future depends on, by name; copying into them changes the run."""
    tensors = {
        "learner.parameters": ppo.parameters.flat.data,
        **{
            f"learner.buffer.{name}": buffer
            for name, buffer in mixed.learner.state_dict().items()
            if name in ppo.buffers
        },
        **{f"adam.{name}": tensor for name, tensor in ppo.adam_state().items()},
        "mixed.learner_state": mixed.learner_state,
        "metrics.returns": metrics.returns,
        "metrics.is_counting": metrics.is_counting,
    }
    if mixed.pool is not None:
        tensors["pool.state"] = mixed.pool.state
        tensors["pool.npc_of_env"] = mixed.pool.npc_of_env
    return tensors
