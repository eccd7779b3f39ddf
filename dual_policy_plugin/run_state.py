"""All that a continued run needs, as one file of plain numbers: tensors by name and counters as JSON.

`train.py` saves it after each checkpoint, and between two where it is told to stop, and restores it when the run
directory has one. With an env that can hand out its state (the arena) the continuation goes on inside the episodes;
with others all envs start anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dual_policy_plugin.checkpoint import read_safetensors
from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.learning.ppo import PpoUpdate
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.policies.loading import read_description
from dual_policy_plugin.ranks.distributed import Ranks, copy_from_first, scatter_tensors, share_text
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import VecEnv

STATE_NAME = "training.safetensors"
FACTS_KEY = "run"
"""Names what is no tensor in the file: counters and roster as JSON."""
EPISODE_STATE = ("mixed", "pool", "metrics", "env")
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
    learner: Mapping[str, Tensor],
    episodes: Sequence[Mapping[str, Tensor]],
    roster: Mapping[str, Any] | None = None,
) -> bytes:
    """The state between two iterations.

    Args:
        counters: of the run.
        learner: as `learner_tensors` gives them.
        episodes: as `episode_tensors` gives them, of each rank.
        roster: `Roster.as_dict` of a run with NPCs.
    """
    tensors = dict(learner)
    for rank, of_rank in enumerate(episodes):
        tensors |= {f"rank{rank}.{name}" if rank else name: tensor for name, tensor in of_rank.items()}
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    facts = {"counters": asdict(counters), "roster": roster}
    metadata = {FACTS_KEY: json.dumps(facts)}  # one entry: safetensors writes several in a random order
    return bytes(safetensors.torch.save(whole, metadata=metadata))


@dataclass(kw_only=True, slots=True, frozen=True)
class SavedState:
    """What `encode_state` was given, read once."""

    counters: Counters
    roster: dict[str, Any] | None
    tensors: dict[str, Tensor]

    def episodes(self) -> list[dict[str, Tensor]]:
        """The running episodes of each rank; empty where the env could not hand out its state."""
        found: list[dict[str, Tensor]] = []
        while True:
            prefix = f"rank{len(found)}." if found else ""
            of_rank = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] in EPISODE_STATE
            }
            if not any(name.startswith("env.") for name in of_rank):
                return found
            found.append(of_rank)


def decode_state(data: bytes, where: str) -> SavedState:
    """A saved state; `where` names it in errors.

    Raises:
        RunError: it was saved by another version.
    """
    metadata, tensors = read_safetensors(data, where)
    try:
        facts = json.loads(metadata[FACTS_KEY])
        return SavedState(counters=Counters(**facts["counters"]), roster=facts["roster"], tensors=tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{where} was saved by another version of this package; use that one, or another run="
        ) from error


def restore_learner(state: SavedState, where: str, mixed: MixedPolicy, ppo: PpoUpdate) -> None:
    """Puts the saved policy and its optimizer into the live ones.

    Raises:
        RunError: the state was saved by a run of another shape.
    """
    live = learner_tensors(mixed, ppo)
    _check_fits(state.tensors, live, where)
    for name, tensor in live.items():
        tensor.copy_(state.tensors[name])


def restore_episodes(
    state: SavedState | None, where: str, env: VecEnv, mixed: MixedPolicy, metrics: EpisodeMetrics, ranks: Ranks
) -> int:
    """Puts the running episodes of every rank where they were, if as many ranks saved theirs; all call it together.

    Returns:
        How many ranks saved theirs. Where that is not the number of ranks now, nothing has changed: all envs are to
        begin new episodes.

    Raises:
        RunError: the state was saved by a run of another shape.
    """
    live = episode_tensors(env, mixed, metrics)
    device = mixed.learner_state.device
    saved = state.episodes() if state is not None and hasattr(env, "load_state_dict") else []
    num_saved = int(share_text(str(len(saved)), ranks, device))
    if num_saved != ranks.world_size:
        return num_saved
    for of_rank in saved:
        _check_fits(of_rank, live, where)
    own = scatter_tensors(saved, live, ranks, device)
    of_env = {name.removeprefix("env."): own.pop(name) for name in live if name.startswith("env.")}
    for name, tensor in own.items():
        live[name].copy_(tensor)
    env.load_state_dict(of_env)  # type: ignore[attr-defined]
    return num_saved


def _check_fits(saved: Mapping[str, Tensor], live: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in live.items():
        if name not in saved or saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise RunError(f"{where}: its {name} does not fit this run; use another run= name")


def share_counters(counters: Counters, ranks: Ranks, device: torch.device) -> Counters:
    """The first rank's counters, on every rank; only that one has read the run directory."""
    return Counters(**json.loads(share_text(json.dumps(asdict(counters)), ranks, device)))


def share_learner(mixed: MixedPolicy, ppo: PpoUpdate, ranks: Ranks) -> None:
    """Gives every rank the first one's policy and optimizer."""
    for tensor in learner_tensors(mixed, ppo).values():
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
    epoch = json.loads(metadata[FACTS_KEY])["counters"]["iteration"]
    if epoch != description.metadata.get("epoch"):
        raise ConfigError(
            f"{key}: the run keeps the optimizer of epoch {epoch}, after which it was saved last; name that "
            "checkpoint, continue the run to its next one where there is none, or use false"
        )
    for name, tensor in ppo.adam_state().items():
        if saved[f"adam.{name}"].shape != tensor.shape:
            raise ConfigError(f"{key}: its optimizer is of another net; use false")
        tensor.copy_(saved[f"adam.{name}"])


def learner_tensors(mixed: MixedPolicy, ppo: PpoUpdate) -> dict[str, Tensor]:
    """Policy and optimizer, which all ranks have alike, by name; copying into them changes the run."""
    return {
        "learner.parameters": ppo.parameters.flat.data,
        **{
            f"learner.buffer.{name}": buffer
            for name, buffer in mixed.learner.state_dict().items()
            if name in ppo.buffers
        },
        **{f"adam.{name}": tensor for name, tensor in ppo.adam_state().items()},
    }


def episode_tensors(env: VecEnv, mixed: MixedPolicy, metrics: EpisodeMetrics) -> dict[str, Tensor]:
    """What belongs to the episodes that run on this rank, by name; the env's are copies, where it hands out any."""
    tensors = {
        "mixed.learner_state": mixed.learner_state,
        "metrics.returns": metrics.returns,
        "metrics.is_counting": metrics.is_counting,
    }
    if mixed.pool is not None:
        tensors["pool.state"] = mixed.pool.state
        tensors["pool.npc_of_env"] = mixed.pool.npc_of_env
    if hasattr(env, "state_dict"):
        tensors |= {f"env.{name}": tensor for name, tensor in env.state_dict().items()}
    return tensors
