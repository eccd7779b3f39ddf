"""Fills Experience with one rollout: `horizon` steps of all envs by learner and NPCs together.

Takes env, MixedPolicy and random numbers; gives filled Experience and adds to the episode metrics. Behind this file
nothing knows of NPC rows. An env that can be stepped in halves is: while its workers step one half, the policies act
for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import torch

from dual_policy_plugin.envs.device_copies import to_device
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.policies.sampling import log_probs_of
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy, RandomNumbers
from dual_policy_plugin.types import AsyncVecEnv, StepResult, VecEnv


def start_rollouts(env: VecEnv, mixed: MixedPolicy, experience: Experience) -> None:
    """Puts the envs' current observations where the first rollout expects them: into the last slot."""
    mixed.observe(env, experience.obs[-1])


@torch.no_grad()
def collect_rollout(
    env: VecEnv, mixed: MixedPolicy, experience: Experience, metrics: EpisodeMetrics, numbers: RandomNumbers
) -> None:
    """Plays `horizon` steps and stores what the learner rows saw, did and got.

    Args:
        env: stands at the observation in `experience.obs[-1]`. Where it has `halves`, they are stepped in turn.
        mixed: both policies with their states; the learner's parameters may have changed since the last rollout.
        experience: overwritten.
        metrics: sums over episodes that end.
        numbers: uniform numbers for `horizon` steps.
    """
    mixed.learner.pack()  # type: ignore[operator]
    halves = env.halves() if isinstance(env, AsyncVecEnv) else None
    if halves is None:
        plays = [_play(env, mixed, experience, metrics, numbers)]
    else:
        middle = halves[0].spec.num_envs
        first, second = slice(0, middle), slice(middle, env.spec.num_envs)
        plays = [
            _play(half, mixed.part(envs), experience.part(mixed.rows(envs)), metrics.part(envs), numbers.part(envs))
            for half, envs in zip(halves, (first, second), strict=True)
        ]
    for _ in zip_longest(*plays):  # a step of each in turn, until all have ended
        pass


def _play(
    env: VecEnv, mixed: MixedPolicy, experience: Experience, metrics: EpisodeMetrics, numbers: RandomNumbers
) -> Iterator[None]:
    """The rollout of an env, or of one of two halves; stands still, once a step, while the env's workers step."""
    workers = env if isinstance(env, AsyncVecEnv) else None
    experience.obs[0].copy_(experience.obs[-1])
    experience.initial_state.copy_(mixed.learner_state)
    for t in range(experience.horizon):
        actions, logits, values = mixed.act(experience.obs[t], numbers.learner[t], numbers.npc[t])
        if workers is not None:
            workers.send(mixed.actions)
        experience.actions[t] = actions
        experience.log_probs[t] = log_probs_of(logits, actions)
        experience.values[t] = values

        yield
        result = env.step(mixed.actions) if workers is None else workers.receive()
        experience.rewards[t] = result.rewards.index_select(1, mixed.learner_seats).flatten()
        experience.dones[t] = result.dones.index_select(1, mixed.learner_seats).flatten()
        metrics.add(result)

        if experience.weights is not None and result.weights is not None:
            experience.weights[t] = result.weights.index_select(1, mixed.learner_seats).flatten()
        if experience.final_values is not None:
            _store_final_values(env, mixed, experience, result, t)
        mixed.end_step(result, experience.dones[t], numbers.draw[t])
        mixed.observe(env, experience.obs[t + 1])
    _, last_values, _ = mixed.learner.forward_step(experience.obs[-1], mixed.learner_state)  # type: ignore[operator]
    experience.last_values.copy_(last_values)


def _store_final_values(env: VecEnv, mixed: MixedPolicy, experience: Experience, result: StepResult, t: int) -> None:
    """V(final observation) of rows that step t truncated, with the recurrent state from before the reset."""
    assert experience.final_values is not None
    experience.final_values[t].zero_()
    assert result.truncated is not None
    is_truncated = result.truncated.cpu()  # there already, where workers step: no device is asked
    rows = is_truncated[:, list(mixed.assignment.learner_seats)].flatten().nonzero().squeeze(1)
    if len(rows) == 0:
        return
    final_obs = experience.obs[t + 1]  # free until the next observation is written
    env.observe_final(mixed.learner_seats, final_obs)
    rows = to_device(rows, final_obs.device)
    _, values, _ = mixed.learner.forward_step(final_obs[rows], mixed.learner_state[rows])  # type: ignore[operator]
    experience.final_values[t].index_copy_(0, rows, values)
