"""Dual-policy training in somebody else's trainer: which seats learn, frozen NPCs that act for the others, metrics.

Takes the `dual_policy` node that the plugin gives any Hydra app, and at every step the observations, rewards and dones
of their env, as numpy arrays or tensors; gives actions, and at every iteration the metrics. Env, net, update and config
stay theirs. Everything that can be wrong with an NPC ends `DualPolicy.open`, before the first step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dual_policy_plugin import rng
from dual_policy_plugin.config import Config, DualPolicyConfig, TrainerConfig
from dual_policy_plugin.config_checks import check
from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.errors import EnvError, RunError
from dual_policy_plugin.evaluate import assign_seats
from dual_policy_plugin.foreign.arrays import Array, as_actions, as_table, fill_table, pick_seats, same_kind
from dual_policy_plugin.foreign.opening import hold_to_lock, keep_lock, load_node, seat_npcs
from dual_policy_plugin.foreign.spaces import action_names_of, as_space
from dual_policy_plugin.hydra_app.dual_policy_node import DUAL_POLICY_KEY
from dual_policy_plugin.players import pin_players
from dual_policy_plugin.policies.build import compute_dtype, given_architectures
from dual_policy_plugin.policies.npcs import LOCK_NAME, recorded_npcs
from dual_policy_plugin.policies.pool import NpcPool
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.roster import Roster
from dual_policy_plugin.types import EnvSpec, StepResult

Architectures = Mapping[str, Callable[..., nn.Module]]
_STEPS_AT_ONCE = 32
"""Random numbers are made for so many steps at a time."""
log = logging.getLogger(__name__)


class DualPolicy:
    """Learner and NPC seats of a training run, the NPCs that act there, and what was played; made by `open`.

    At every step one of `act` and `fill`, then `end_step`; once an iteration `take_metrics`.

    Attributes:
        learner_seats: the seats of each env that train, ascending.
        npc_seats: the other ones; empty where no NPC is configured.
        npcs: requested, uri, sha256, name, ... of every NPC, as it was pinned.
    """

    def __init__(
        self,
        spec: EnvSpec,
        obs_shape: tuple[int, ...],
        assignment: Assignment,
        pool: NpcPool | None,
        roster: Roster | None,
        npcs: list[dict[str, Any]],
        *,
        seed: int,
        device: torch.device,
        stack: ExitStack,
    ) -> None:
        """For `open`. `obs_shape` is an agent's observation as the env has it; `close` leaves `stack`."""
        self.learner_seats, self.npc_seats = list(assignment.learner_seats), list(assignment.npc_seats)
        self.npcs = npcs
        self._spec, self._pool, self._roster = spec, pool, roster
        self._seed, self._device, self._stack = seed, device, stack
        self._obs_shape = (spec.num_envs, spec.num_agents, *obs_shape)
        self._metrics = EpisodeMetrics(spec, assignment, pool, device, count_first=True, count_later=True)
        self._seats = torch.tensor(self.npc_seats, dtype=torch.int64, device=device)
        self._step, self._has_acted = 0, False
        self._numbered_from = -1  # the step that the random numbers begin with
        self._u_act = self._u_draw = torch.empty(0)

    @classmethod
    def open(
        cls,
        config: DualPolicyConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
        *,
        num_envs: int,
        num_agents: int,
        observation_space: Any,
        actions: Any,
        seed: int = 0,
        run_dir: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        precision: str = "auto",
        architectures: Architectures | None = None,
        key: str = DUAL_POLICY_KEY,
    ) -> Self:
        """Pins, locks, verifies, loads and seats the configured NPCs.

        Args:
            config: the node `cfg.trainer.dual_policy`; the URI of one NPC, for half of the seats; or None: all learn.
            num_envs: envs that are stepped together.
            num_agents: seats per env.
            observation_space: of one agent: a Box, which NPCs see flattened, or an ObservationSpace.
            actions: a Discrete, the number of actions, or their names; policies are bound to an env by the names.
            seed: of the NPCs' own random numbers. torch's and numpy's global generators are not touched.
            run_dir: where npc.lock.json is written, and held to when it is there; None: nowhere.
            device: cpu, cuda, cuda:N or auto; tensors are to be there.
            precision: auto, fp32 or bf16, of the matrix products of this package's nets.
            architectures: name -> callable (observation_space, actions, **args) -> nn.Module, for policies of your own.
            key: where the node stands in your config, for the error lines.

        Raises:
            DualPolicyError: anything that is wrong with the config or an NPC.
        """
        dual = load_node(config, key)
        for name, count in (("num_envs", num_envs), ("num_agents", num_agents)):
            check(type(count) is int and count > 0, name, count, "use a whole number above 0")
        check(type(seed) is int, "seed", seed, "use a whole number")
        space, obs_shape = as_space(observation_space)
        spec = EnvSpec(
            name="yours",
            num_envs=num_envs,
            num_agents=num_agents,
            observation_space=space,
            actions=action_names_of(actions),
            max_episode_steps=1,  # nobody asks
        )
        assignment = assign_seats(num_agents, dual)
        if assignment.num_npc == 0:
            dual = replace(dual, npc=None, pool=[])
        lock_path = None if run_dir is None else Path(run_dir) / LOCK_NAME
        trainer = TrainerConfig(dual_policy=hold_to_lock(dual, lock_path), precision=precision)
        settings, place = Config(seed=seed, trainer=trainer), choose_device(device)
        with ExitStack() as stack, given_architectures(architectures or {}):
            players = pin_players(settings, None, Ranks(), place, stack)
            npcs = players.load("npc", settings, spec, dtype=compute_dtype(precision, place), device=place)
            if lock_path is not None and players.lock:
                keep_lock(lock_path, players.lock)
            pool, roster = seat_npcs(npcs, players, dual, spec, assignment, place) if npcs else (None, None)
            record = recorded_npcs(players.lock)
            names = {one["name"]: f"{one['uri']} sha256:{one['sha256'][:12]}" for one in record}
            log.info("learner seats %s, NPC seats %s, NPCs %s", assignment.learner_seats, assignment.npc_seats, names)
            return cls(
                spec, obs_shape, assignment, pool, roster, record, seed=seed, device=place, stack=stack.pop_all()
            )

    def act(self, obs: Array) -> Array:
        """The actions of the NPC seats; their states move on.

        Args:
            obs: (num_envs, num_agents, *shape), of all seats; those of the learner's are not read.

        Returns:
            (num_envs, num_npc) int64, in the order of `npc_seats`, of the kind of `obs`.

        Raises:
            EnvError: other shapes or another device than `open` was told, or no `end_step` since the last actions.
        """
        return same_kind(self._act(obs), obs)

    def fill(self, actions: Array, obs: Array) -> Array:
        """The action table of all seats: the learner's actions, and those that the NPCs take.

        Args:
            actions: (num_envs, num_learner) whole numbers, in the order of `learner_seats`; or all of them as one row.
            obs: as for `act`.

        Returns:
            (num_envs, num_agents), a new one, of the kind and dtype of `actions`.

        Raises:
            EnvError: as `act`.
        """
        mine = as_actions(actions, (self._spec.num_envs, len(self.learner_seats)))
        return fill_table(mine, self.learner_seats, self._act(obs), self.npc_seats)

    @torch.no_grad()
    def end_step(self, rewards: Any, dones: Any, episode_ends: Any = None, *, scores: Any = None) -> None:
        """Adds the step to the metrics, zeroes states where an agent's episode ended, draws an env's next NPC.

        Args:
            rewards: (num_envs, num_agents).
            dones: (num_envs, num_agents) or (num_envs,); true where the step ended the agent's episode, by the rules or
                by a limit, and at every step that it is out of the game.
            episode_ends: (num_envs,), true where the next observations are of a new episode; None: all agents are done.
            scores: (num_envs, num_agents), the env's own verdict, compared in place of returns to say who won an
                episode; read where one ended.

        Raises:
            EnvError: other shapes or another device than `open` was told.
        """
        per_env, per_seat = self._obs_shape[:1], self._obs_shape[:2]
        rewards = as_table(rewards, "rewards", [per_seat], torch.float32, self._device)
        dones = as_table(dones, "dones", [per_seat, per_env], torch.bool, self._device)
        dones = dones.unsqueeze(1).expand(per_seat) if dones.dim() == 1 else dones
        if episode_ends is None:
            ends = dones.all(dim=1)
        else:
            ends = as_table(episode_ends, "episode_ends", [per_env], torch.bool, self._device)
        if scores is not None:
            scores = as_table(scores, "scores", [per_seat], torch.float32, self._device)
        self._metrics.add(StepResult(rewards=rewards, dones=dones, episode_ends=ends, scores=scores))
        if self._pool is not None:
            _, u_draw = self._numbers()
            self._pool.end_steps(dones.index_select(1, self._seats).flatten(), ends, u_draw)
        self._step, self._has_acted = self._step + 1, False

    def take_metrics(self) -> dict[str, float]:
        """The figures of the episodes that ended since the last call, by their names; and the NPCs' next shares.

        Names of episodes that there were none of are absent.
        """
        sums = self._metrics.take_sums(Ranks()).cpu()
        if self._pool is not None and self._roster is not None:
            self._roster.add(sums[:, 1].tolist(), sums[:, 0].tolist())
            self._pool.set_probabilities(self._roster.probabilities())
        return self._metrics.figures(sums)

    def start_episodes(self) -> None:
        """New episodes in all envs, where they were reset: states zeroed, the running episodes forgotten."""
        self._has_acted = False
        self._metrics.start_episodes()
        self._metrics.is_counting.fill_(True)
        if self._pool is not None:
            self._pool.start_episodes()

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: plain values, and tensors on the CPU."""
        roster = None if self._roster is None else self._roster.as_dict()
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors().items()}
        counts = {"step": self._step, "has_acted": self._has_acted}
        return {"facts": self._facts(), **counts, "roster": roster, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Where your envs begin anew, call `start_episodes` after it.

        Raises:
            RunError: the state is of another run: other NPCs, seats or seed.
        """
        if state.get("facts") != self._facts():
            raise RunError(
                f"the state of DualPolicy is of {state.get('facts')}, this run has {self._facts()}; start a new run"
            )
        if self._roster is not None and self._pool is not None:
            self._roster.restore(state["roster"], "the state of DualPolicy")
            self._pool.set_probabilities(self._roster.probabilities())
        for name, tensor in self._tensors().items():
            tensor.copy_(state["tensors"][name])
        self._step, self._has_acted = int(state["step"]), bool(state["has_acted"])

    def close(self) -> None:
        """Gives the NPCs' files in the cache free; may be called twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _act(self, obs: Any) -> Tensor:
        """(num_envs, num_npc) int64 on our device."""
        if self._has_acted:
            raise EnvError("act or fill came twice for one step, so states would move on twice; call end_step between")
        seen = pick_seats(obs, self._obs_shape, self._seats, self._spec.observation_space.dtype)
        self._has_acted = True
        if self._pool is None:
            return self._seats.new_empty(self._spec.num_envs, 0)
        u_act, _ = self._numbers()
        rows = seen.reshape(-1, *self._spec.observation_space.shape)
        return self._pool.act(rows, u_act).view(self._spec.num_envs, -1)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Uniform numbers of this step, as in our own runs: (num_envs * num_npc,) to act, (num_envs,) to draw NPCs."""
        t = self._step % _STEPS_AT_ONCE
        first = self._step - t
        if first != self._numbered_from:
            steps = torch.arange(first, first + _STEPS_AT_ONCE, device=self._device).unsqueeze(1)
            envs = torch.arange(self._spec.num_envs, device=self._device).unsqueeze(0)
            rows = torch.arange(self._spec.num_envs * len(self.npc_seats), device=self._device).unsqueeze(0)
            self._u_act = rng.uniform(self._seed, rng.ACTION_NPC, steps, rows)
            self._u_draw = rng.uniform(self._seed, rng.NPC_DRAW, steps, envs)
            self._numbered_from = first
        return self._u_act[t], self._u_draw[t]

    def _facts(self) -> dict[str, Any]:
        """What a state belongs to."""
        envs = {"num_envs": self._spec.num_envs, "num_agents": self._spec.num_agents}
        npcs = [str(one["sha256"])[:12] for one in self.npcs]
        return envs | {"learner_seats": self.learner_seats, "seed": self._seed, "npcs": npcs}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes, written in place."""
        metrics, pool = self._metrics, self._pool
        tensors = {"returns": metrics.returns, "is_counting": metrics.is_counting, "sums": metrics.sums}
        return tensors if pool is None else tensors | {"npc_state": pool.state, "npc_of_env": pool.npc_of_env}
