"""How the rollouts of a run are played: plainly on a CPU; on a GPU as one captured graph, fused where kernels fit.

Takes the live objects of a run; gives a function that plays one rollout, and a line for the log that says how.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dual_policy_plugin.cuda_graph import CapturedCall
from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.rollout.collector import collect_rollout
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.fused import FusedPlay, why_not_fused
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy, RandomNumbers
from dual_policy_plugin.types import VecEnv

Play = Callable[[RandomNumbers], None]


def choose_play(
    env: VecEnv, mixed: MixedPolicy, experience: Experience, metrics: EpisodeMetrics, *, fused: bool
) -> tuple[Play, str]:
    """How to play a rollout, and what to tell the user of it.

    Args:
        env, mixed, experience, metrics: as for `collect_rollout`; always these objects.
        fused: `trainer.fused`: whether a GPU may use kernels and graphs.
    """
    plain = partial(collect_rollout, env, mixed, experience, metrics)
    if experience.obs.device.type != "cuda":
        return plain, "plain torch"
    num_npcs = len(mixed.pool.npcs) if mixed.pool is not None else 0
    cost = f"; each of the {num_npcs} slots for NPCs forwards all NPC rows" if num_npcs > 1 else ""
    if not fused:
        return plain, f"plain torch, for trainer.fused=false{cost}"
    if not isinstance(env, Arena):
        where = f"env.name={env.spec.name} runs in worker processes, which no CUDA graph can hold"
        return plain, f"plain torch: {where}{cost}"
    why_not = why_not_fused(env, mixed)
    if why_not:
        return CapturedPlay(partial(_pack_and_play, mixed, plain)), f"plain torch in one CUDA graph: {why_not}{cost}"
    return CapturedPlay(FusedPlay(env, mixed, experience, metrics)), "fused kernels in one CUDA graph"


def _pack_and_play(mixed: MixedPolicy, play: Play, numbers: RandomNumbers) -> None:
    """Plays a rollout with what the pool's slots hold by then: a recording keeps the places of packed weights."""
    if mixed.pool is not None:
        mixed.pool.pack()
    play(numbers)


class CapturedPlay:
    """A way to play rollouts, recorded as one CUDA graph that reads its random numbers from fixed tensors."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._numbers: RandomNumbers | None = None
        self._captured: CapturedCall[None] | None = None

    def __call__(self, numbers: RandomNumbers) -> None:
        """Plays one rollout with `numbers`, always of the same shapes."""
        if self._numbers is None or self._captured is None:
            self._numbers = fixed = RandomNumbers(
                learner=torch.empty_like(numbers.learner),
                npc=torch.empty_like(numbers.npc),
                draw=torch.empty_like(numbers.draw),
            )
            self._captured = CapturedCall(partial(self._play, fixed), "the rollout")
        self._numbers.learner.copy_(numbers.learner)
        self._numbers.npc.copy_(numbers.npc)
        self._numbers.draw.copy_(numbers.draw)
        self._captured()
