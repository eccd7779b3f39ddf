"""PufferLib-style envs as hosts: `step(actions)` gives the 5-tuple and overwrites its numpy buffers.

What the env must have: `single_observation_space`, `single_action_space` (Discrete), `num_agents`, `reset(seed)` ->
(observations, infos), `step(actions)` -> (observations, rewards, terminals, truncations, infos), and `late_reset`:

late_reset = True: the step that ends an episode shows its final observation; the env would reset itself in the next
    step, ignore that step's actions and report a transition that never was. The worker resets at once instead, so
    that transition never happens. An agent that is done earlier than the others stays out until they are.
late_reset = False: the env resets inside the step that ends an episode and shows the first observation of the next.
    The final observation is lost, so a truncation of its own counts as a termination. An agent that is done alone
    plays on in its next episode.

`late_reset` is known for the classes of LATE_RESET_CLASSES. Optional attributes: `masks` (which seats are taken),
`agents_leave` = False where all play to the end, which saves the update its weights, `action_names`, `feature_names`,
`roles` (of each seat; without it all are equal), `max_episode_steps`, `dual_policy_observation_space` (an
ObservationSpace; without it observations are flattened to a float32 vector as they are).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dual_policy_plugin.envs.host import (
    DEFAULT_MAX_EPISODE_STEPS,
    HostSpec,
    Rows,
    action_names,
    seat_roles,
    vector_space,
)
from dual_policy_plugin.errors import ConfigError, EnvError

LATE_RESET_CLASSES = ("MettaGridPufferEnv", "GymnasiumPufferEnv", "PettingZooPufferEnv")


class PufferHost:
    """One PufferLib-style env; its rewards, flags and observations are copied out right after each step."""

    def __init__(self, env: Any, name: str) -> None:
        owner = f"env.name={name}"
        self._env = env
        self._late_reset = _late_reset(env, owner)
        space = getattr(env, "dual_policy_observation_space", None)
        if space is None:
            size = math.prod(env.single_observation_space.shape)
            space = vector_space(size, getattr(env, "feature_names", None), owner)
        self.spec = HostSpec(
            num_agents=int(env.num_agents),
            observation_space=space,
            actions=action_names(env.single_action_space, getattr(env, "action_names", None), owner),
            max_episode_steps=int(getattr(env, "max_episode_steps", DEFAULT_MAX_EPISODE_STEPS)),
            has_weights=bool(getattr(env, "agents_leave", self._late_reset or hasattr(env, "masks"))),
            roles=seat_roles(getattr(env, "roles", ()), int(env.num_agents), owner),
        )
        self._is_out = np.zeros(self.spec.num_agents, bool)  # done before the others (late_reset only)
        self._is_seated = np.ones(self.spec.num_agents, bool)  # acts in the coming step
        self._actions = np.zeros(self.spec.num_agents, np.int32)

    def start(self, seed: int, rows: Rows) -> None:
        """Resets the env, also where it has just reset itself: so the episode depends on `seed` alone."""
        observations, _ = self._env.reset(seed=seed)
        self._is_out[:] = False
        self._seat()
        self._show(observations, rows)

    def step(self, rows: Rows) -> bool:
        """One step; True where all seats are done at once (late_reset: as soon as all are done)."""
        np.copyto(self._actions, rows.actions, casting="same_kind")
        observations, rewards, terminals, truncations, _ = self._env.step(self._actions)
        acted = self._is_seated
        terminals, truncations = np.asarray(terminals, bool), np.asarray(truncations, bool)
        over = (terminals | truncations) & acted
        rows.weights[:] = acted
        rows.rewards[:] = np.where(acted, rewards, 0)
        rows.dones[:] = over | ~acted
        rows.truncated[:] = over & ~terminals if self._late_reset else False
        if self._late_reset:
            self._is_out |= over
            flat = np.asarray(observations).reshape(rows.final_observations.shape)
            rows.final_observations[rows.truncated] = flat[rows.truncated]
        self._seat()
        self._show(observations, rows)
        ended = not self._is_seated.any() if self._late_reset else bool(rows.dones.all() and over.any())
        if not (ended or self.spec.has_weights or self._is_seated.all()):
            raise EnvError("an agent left before the episode's end, but the env says agents_leave = False")
        return ended

    def count(self, rows: Rows) -> None:
        """No counters."""

    def close(self) -> None:
        """Closes the env."""
        if hasattr(self._env, "close"):
            self._env.close()

    def _seat(self) -> None:
        masks = getattr(self._env, "masks", None)
        taken = np.ones_like(self._is_out) if masks is None else np.asarray(masks, bool)
        self._is_seated = taken & ~self._is_out

    def _show(self, observations: Any, rows: Rows) -> None:
        rows.observations[:] = np.asarray(observations).reshape(rows.observations.shape)
        rows.observations[~self._is_seated] = 0


def _late_reset(env: Any, owner: str) -> bool:
    declared = getattr(env, "late_reset", None)
    if declared is None and any(kind.__name__ in LATE_RESET_CLASSES for kind in type(env).__mro__):
        return True
    if not isinstance(declared, bool):
        raise ConfigError(
            f"{owner}: {type(env).__name__}.late_reset={declared} does not say when the env resets; set it to True "
            "where the step after an episode's end does, to False where the step that ends it does"
        )
    return declared
