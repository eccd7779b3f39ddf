"""A tiny tensor env of which every game can be worked out by hand, and policies that write down what they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.types import EnvSpec, ObservationSpace, StepResult

ACTIONS = ("0", "1", "2")
NUMBER, SEAT, STEP, EPISODE = range(4)


class Desk:
    """An action is its own reward. An observation is (number of the env, seat, step, episode).

    Env number n's episodes last `lengths[n % len(lengths)]` steps. With `scores`, the seats' scores are those.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        *,
        num_agents: int = 4,
        lengths: Sequence[int] = (3,),
        roles: tuple[str, ...] = (),
        scores: Sequence[float] | None = None,
    ) -> None:
        self.spec = EnvSpec(
            name="desk",
            num_envs=len(numbers),
            num_agents=num_agents,
            observation_space=ObservationSpace(
                kind="vector", shape=(4,), features=("number", "seat", "step", "episode")
            ),
            actions=ACTIONS,
            max_episode_steps=64,
            roles=roles,
        )
        self.numbers = torch.tensor(numbers)
        self.lengths = torch.tensor(lengths)[self.numbers % len(lengths)]
        self.scores = None if scores is None else torch.tensor([list(scores)] * len(numbers))
        self.seeds: list[int] = []
        self.played: list[Tensor] = []
        self.is_closed = False

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        self.seeds.append(seed)
        self.time, self.episode = torch.zeros_like(self.numbers), torch.zeros_like(self.numbers)

    def observe(self, seats: Tensor, out: Tensor) -> None:
        view = out.view(len(self.numbers), len(seats), 4)
        for feature, column in ((NUMBER, self.numbers), (STEP, self.time), (EPISODE, self.episode)):
            view[:, :, feature] = column.unsqueeze(1)
        view[:, :, SEAT] = seats

    def step(self, actions: Tensor) -> StepResult:
        self.played.append(actions.clone())
        self.time = self.time + 1
        ends = self.time == self.lengths
        self.time, self.episode = torch.where(ends, 0, self.time), self.episode + ends
        dones = ends.unsqueeze(1).expand_as(actions)
        return StepResult(rewards=actions.float(), dones=dones, episode_ends=ends, scores=self.scores)

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        raise AssertionError("this env never truncates")

    def close(self) -> None:
        self.is_closed = True


class Spy(nn.Module):
    """Takes one action, or a random one where it is None; keeps the rows it saw and the state it had, call by call."""

    state_size = 1

    def __init__(self, action: int | None) -> None:
        super().__init__()
        self.action = action
        self.seen: list[Tensor] = []
        self.states: list[Tensor] = []

    def pack(self) -> None:
        pass

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.append(obs.clone())
        self.states.append(state.clone())
        logits = torch.zeros(len(obs), len(ACTIONS))
        if self.action is not None:
            logits.fill_(-torch.inf)[:, self.action] = 0.0
        return logits, torch.zeros(len(obs)), state + 1


def spies(*actions: int | None) -> list[Npc]:
    return [Npc(name=f"spy_{k}", policy=Spy(action)) for k, action in enumerate(actions)]
