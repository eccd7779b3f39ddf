"""What an env and a policy are: the two protocols that everything else is written against.

An env simulates `num_envs` copies at once and knows nothing of learner and NPC: it is asked for the observations of
some seats and is given one action for every seat. A policy maps observations and a recurrent state to action logits
and a value. Who acts for which seat is known to `rollout/assignment.py` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # workers import this module and must not wait for torch
    from torch import Tensor

SPACE_KINDS = ("window", "tokens", "vector")


@dataclass(kw_only=True, slots=True, frozen=True)
class ObservationSpace:
    """What one agent sees at one step, with a name for every feature (policies are bound to envs by these names).

    Three kinds:
        window: uint8 `(num_bytes,)`. The first height*width bytes are the codes of an egocentric window, row by row
            from its north-west corner; then one byte per name in `own`; the rest is padding (zeros).
            `features[code]` names the code; code 0 is "empty".
        tokens: uint8 `(num_tokens, 3)`: (location, feature, value). location is row << 4 | column in the window, or
            0xFE for a token that belongs to no cell; a token whose location is 0xFF is padding. `features[id]` names
            the feature, `scales[id]` is what its value is divided by.
        vector: float32 `(num_features,)`. `features[i]` names entry i.
    """

    kind: str
    shape: tuple[int, ...]
    features: tuple[str, ...]
    window: tuple[int, int] = (0, 0)
    """(height, width) of the window; (0, 0) for vector."""
    own: tuple[str, ...] = ()
    """Names of the own-state bytes behind the window; window kind only."""
    scales: tuple[float, ...] = ()
    """What an own-state byte (window) or a feature's value (tokens) is divided by before a net sees it."""

    @property
    def dtype(self) -> str:
        """Name of the torch dtype of an observation."""
        return "float32" if self.kind == "vector" else "uint8"


@dataclass(kw_only=True, slots=True, frozen=True)
class EnvSpec:
    """The fixed facts of a vectorised env."""

    name: str
    """As in the config: arena, mettagrid, pettingzoo:<id>, ..."""
    num_envs: int
    num_agents: int
    """Seats per env, padded seats included."""
    observation_space: ObservationSpace
    actions: tuple[str, ...]
    """Names of the discrete actions, in the order of their numbers."""
    max_episode_steps: int
    """Upper bound of an episode's length."""
    has_truncation: bool = False
    """Whether a step may end an episode by truncation (then `observe_final` works)."""
    has_weights: bool = False
    """Whether a seat may be empty for a while (agents that die or join)."""
    counters: tuple[str, ...] = ()
    """Names of the env's own counters per agent and episode (hearts, ...)."""
    roles: tuple[str, ...] = ()
    """The role of each seat; only seats of one role can be swapped without changing the game. Empty: all are equal."""


@dataclass(slots=True)
class StepResult:
    """What one step did. All tensors are owned by the env and overwritten by its next step."""

    rewards: Tensor
    """(num_envs, num_agents) float32."""
    dones: Tensor
    """(num_envs, num_agents) bool. True where this step ended the agent's episode, for every seat of an env whose
    episode ended, and at every step in which the seat was empty: so a state zeroed where done is right for all."""
    episode_ends: Tensor
    """(num_envs,) bool. True where the env's episode ended: the next observation is the first of a new one."""
    truncated: Tensor | None = None
    """(num_envs, num_agents) bool, a subset of dones: ended by a limit, not by the rules. None: never. May lie on the
    host whatever the device is: its reader must know the rows, and would wait if it had to ask a device."""
    weights: Tensor | None = None
    """(num_envs, num_agents) float32. 1 where the agent acted in this step, 0 where the seat was empty. None: all 1."""
    scores: Tensor | None = None
    """(num_envs, num_agents) float32. The env's own verdict per agent, compared in place of returns to say who won an
    episode; read only where the episode ended. None: returns decide."""
    counters: Tensor | None = None
    """(num_envs, num_agents, len(spec.counters)) float32, the episode's totals up to and including this step; read
    only where the episode ended."""


class VecEnv(Protocol):
    """Many copies of one multi-agent env, stepped together, that start a new episode by themselves."""

    spec: EnvSpec

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        """Starts a first episode in every env. With `stagger`, envs begin (or end) it at different phases, so that
        they do not all end together later; those shortened episodes are not counted by the metrics."""

    def observe(self, seats: Tensor, out: Tensor) -> None:
        """Writes the current observations of `seats` (num_seats,) int64 of all envs into
        `out` (num_envs * num_seats, *shape), env-major."""

    def step(self, actions: Tensor) -> StepResult:
        """Steps all envs with `actions` (num_envs, num_agents) int64, an action for every seat."""

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        """Like `observe`, but where the last step truncated the row, the final observation of the ended episode.
        Other rows of `out` are left as they are. Only for specs with `has_truncation`."""

    def close(self) -> None:
        """Ends workers and frees what the env holds; may be called twice."""


@runtime_checkable
class AsyncVecEnv(VecEnv, Protocol):
    """A VecEnv that is stepped elsewhere, by workers: the trainer can use one half while the other half steps."""

    def send(self, actions: Tensor) -> None:
        """Begins a step; `receive` ends it, and nothing else may be asked of these envs in between."""

    def receive(self) -> StepResult:
        """What the step did that `send` began."""

    def halves(self) -> tuple[AsyncVecEnv, AsyncVecEnv] | None:
        """The first and the other envs, as two envs that are views of this one; None where it cannot be split."""


class Policy(Protocol):
    """A recurrent or memoryless policy over discrete actions; always also an `nn.Module`.

    Its state is one tensor `(num_rows, state_size)` float32, zeros at an episode's start; state_size 0 if memoryless.
    """

    state_size: int

    def pack(self) -> None:
        """Takes note of parameters that changed: `forward_step` may run through copies made here."""

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: obs (num_rows, *shape), state (num_rows, state_size) -> logits (num_rows, num_actions) float32,
        values (num_rows,) float32, next state."""

    def forward_segment(self, obs: Tensor, state: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        """A segment: obs (horizon, num_rows, *shape), the state before its first step, dones (horizon, num_rows)
        -> logits (horizon, num_rows, num_actions), values (horizon, num_rows). The state is zeroed after a done."""
