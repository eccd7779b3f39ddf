"""Foreign envs in worker processes behind the VecEnv protocol; everything a step reads or writes is shared memory.

Takes a function that makes one simulator; gives a `WorkerVecEnv`. Each of `num_workers` processes (`crew.py`) steps its
share of the envs (`worker_process.py`). A step writes the actions into the shared block, tells every worker and waits
for all. Each half of the envs can be used as an env of its own, so that the workers step one while the trainer finds
the actions for the other.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin.envs.crew import Crew
from dual_policy_plugin.envs.device_copies import DeviceCopies, allocate_copies, pin, to_device
from dual_policy_plugin.envs.host import HostSpec
from dual_policy_plugin.envs.worker_process import RESET, STEP
from dual_policy_plugin.types import EnvSpec, StepResult

log = logging.getLogger(__name__)


class WorkerVecEnv:
    """`num_envs` simulators in worker processes (a `types.AsyncVecEnv`).

    Where an env's first episode is staggered it is truncated at its phase, with a final observation, whatever the
    simulator knows of truncation: so `has_truncation` is always True here. Results do not depend on `num_workers`.
    """

    spec: EnvSpec
    _halves: tuple[WorkerVecEnv, WorkerVecEnv] | None

    def __init__(
        self,
        make: Callable[..., Any],
        args: dict[str, Any],
        *,
        name: str,
        num_envs: int,
        num_workers: int,
        device: torch.device | str = "cpu",
        env_numbers: Sequence[int] | None = None,
    ) -> None:
        """Starts the workers and builds all envs.

        Args:
            make: `make(index, **args)`, at the top of a module; gives one env (see `adapt.as_host`).
            args: its keyword arguments, of JSON types.
            name: the env's name, for `spec` and messages.
            num_envs: how many envs.
            num_workers: how many processes; never more than envs.
            device: where observations are wanted and StepResult's tensors live.
            env_numbers: of each env, for its seeds; equal numbers play equal episodes. None: 0, 1, 2, ... The `index`
                of an env counts from the first number, so that no two here share one.
        """
        num_workers = min(num_workers, num_envs)
        numbers = list(range(num_envs)) if env_numbers is None else list(env_numbers)
        assert len(numbers) == num_envs, "a number for every env"
        self._crew = Crew(make, args, name=name, env_numbers=numbers, num_workers=num_workers)
        self.spec = _env_spec(self._crew.spec, name, num_envs)
        self._shared = {key: torch.from_numpy(array) for key, array in self._crew.arrays.items()}
        self._local = self._shared
        device = torch.device(device)
        try:
            if device.type != "cpu":
                self._crew.at_end(pin(self._shared, device))
                self._local = allocate_copies(self._shared, device)
            self._narrow((0, 1), slice(0, num_envs))
            middle = num_envs // 2
            if middle and (device.type != "cpu" or num_workers < num_cores()):
                self._halves = self._half(0, slice(0, middle)), self._half(1, slice(middle, num_envs))
        except BaseException:
            self.close()
            raise

    def halves(self) -> tuple[WorkerVecEnv, WorkerVecEnv] | None:
        """The first num_envs // 2 envs and the others, as two envs on the same memory; every worker has envs of both.

        None with one env; and where a trainer on the CPU has no core beside the workers': then nothing can go on at the
        same time, and calling the policies twice a step only costs.
        """
        return self._halves

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        """Starts episode 0 in every env; with `stagger` env i's is cut after (i + 1) / num_envs of the longest one."""
        self._crew.settle()
        if self._copies is not None:
            self._copies.settle()
        self._crew.order(self._workers, RESET, {"seed": seed, "stagger": stagger, "halves": self._which})
        self._finish(RESET)

    def step(self, actions: Tensor) -> StepResult:
        """Steps all envs with `actions` (num_envs, num_agents) int64; an env that ended begins its next episode."""
        self.send(actions)
        return self.receive()

    def send(self, actions: Tensor) -> None:
        """Begins the step that `receive` ends; the workers do it meanwhile."""
        if self._copies is None:
            self._shared["actions"].copy_(actions)
            self._crew.order(self._workers, STEP[self._which])
        else:
            self._crew.order(self._workers, STEP[self._which], after=self._copies.push(actions))

    def receive(self) -> StepResult:
        """What the step did that `send` began, once all workers have done it."""
        self._finish(STEP[self._which])
        return self._result

    def _finish(self, command: bytes) -> None:
        self._crew.wait(self._workers, command)
        if self._copies is not None:
            self._copies.pull()

    def observe(self, seats: Tensor, out: Tensor) -> None:
        """Writes the observations of `seats` (num_seats,) into `out` (num_envs * num_seats, *shape), env-major."""
        observations, columns = self._local["observations"], self._columns(seats)
        shape = (self.spec.num_envs, seats.shape[0], *self.spec.observation_space.shape)
        if isinstance(columns, slice):
            out.view(shape).copy_(observations[:, columns])
        else:
            torch.index_select(observations, 1, seats, out=out.view(shape))

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        """Writes the final observations of rows that the last step truncated; other rows of `out` stay."""
        columns = self._columns(seats)
        is_truncated = self._shared["truncated"][:, columns]  # (num_envs, num_seats)
        if not is_truncated.any():
            return
        env, seat = is_truncated.nonzero(as_tuple=True)
        final = self._shared["final_observations"][:, columns][env, seat]
        out[to_device(env * seats.shape[0] + seat, out.device)] = to_device(final, out.device)

    def _columns(self, seats: Tensor) -> slice | Tensor:
        """`seats` as an index of the shared block: a slice where they are a range. Remembered: callers keep theirs."""
        for known, columns in self._known_seats:
            if known is seats:
                return columns
        numbers = seats.tolist()
        first = numbers[0] if numbers else 0
        is_range = numbers == list(range(first, first + len(numbers)))
        columns = slice(first, first + len(numbers)) if is_range else seats.cpu().clone()
        self._known_seats.append((seats, columns))
        return columns

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        self._crew.close()

    def _half(self, which: int, envs: slice) -> WorkerVecEnv:
        half = copy.copy(self)
        half._narrow((which,), envs)
        return half

    def _narrow(self, which: tuple[int, ...], envs: slice) -> None:
        """Makes this the env of the given halves, which are these envs."""
        self._which, self._halves = which, None
        shares = enumerate(self._crew.halves)
        self._workers = [index for index, share in shares if any(share[i][1] > share[i][0] for i in which)]
        self.spec = replace(self.spec, num_envs=envs.stop - envs.start)
        is_local = self._local is self._shared
        self._shared = {key: tensor[envs] for key, tensor in self._shared.items()}
        self._local = self._shared if is_local else {key: tensor[envs] for key, tensor in self._local.items()}
        self._copies = None if is_local else DeviceCopies(self._shared, self._local)
        self._result = self._make_result()
        self._known_seats: deque[tuple[Tensor, slice | Tensor]] = deque(maxlen=8)

    def _make_result(self) -> StepResult:
        local = self._local
        return StepResult(
            rewards=local["rewards"],
            dones=local["dones"],
            episode_ends=local["episode_ends"][:, 0],
            truncated=self._shared["truncated"],
            weights=local["weights"] if self.spec.has_weights else None,
            counters=local["counters"] if self.spec.counters else None,
        )


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _env_spec(host: HostSpec, name: str, num_envs: int) -> EnvSpec:
    return EnvSpec(
        name=name,
        num_envs=num_envs,
        num_agents=host.num_agents,
        observation_space=host.observation_space,
        actions=host.actions,
        max_episode_steps=host.max_episode_steps,
        has_truncation=True,
        has_weights=host.has_weights,
        counters=host.counters,
        roles=host.roles,
    )
