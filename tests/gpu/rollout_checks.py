"""Whole rollouts and updates: fused beside plain, replayed beside called, stopped beside going on.

As in `kernel_checks.py`, device and sizes are arguments. Only a GPU records graphs; in the interpreter the same checks
compare calls with calls.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor, nn

from dual_policy_plugin.envs.arena import STATE_NAMES, Arena
from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.learning.ppo import PpoSettings, PpoUpdate
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.policies.sampling import log_probs_of
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.captured import CapturedPlay, Play
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.fused import FusedPlay, why_not_fused
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy, RandomNumbers
from dual_policy_plugin.run_state import (
    Counters,
    decode_state,
    encode_state,
    episode_tensors,
    learner_tensors,
    restore_episodes,
    restore_learner,
)
from tests.gpu.agreement import (
    assert_as_near,
    assert_drawn,
    assert_greedy,
    assert_near_as_vectors,
    assert_same,
)
from tests.gpu.env_checks import CPU, dyadic_chances
from tests.gpu.kernel_checks import make_net
from tests.harness import SETTINGS

PARAMETERS_MAY_DIFFER = 1e-3
"""Of their length, between an update that is called and one that is replayed: libraries may choose other products."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Size:
    """How large a game is."""

    num_envs: int
    horizon: int
    hidden: int
    tile: int | None = None
    """Rows of a program of the policy step; None: its own choice."""
    num_npcs: int = 1
    pct: float = 0.5
    arena: ArenaConfig = ArenaConfig()  # noqa: RUF009 -- it is frozen


class Game:
    """Env, policies, experience, metrics, update: one run without files. Games of one size are the same game."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        size: Size,
        *,
        agent: str = "fast",
        use_kernels: bool = True,
        capture: bool = False,
        is_decided: bool = True,
        settings: PpoSettings = SETTINGS,
    ) -> None:
        """With `use_kernels` all kernels run that there are for the agent; with `capture`, as graphs."""
        self.size, self.device = size, device
        self.env = Arena(size.arena, size.num_envs, device)
        self.env.use_kernels = use_kernels
        spec, split = self.env.spec, assign(size.arena.num_agents, size.pct, "interleaved")

        def net(seed: int) -> nn.Module:
            made = make_net(agent, seed, hidden=size.hidden, dtype=dtype, device=device, is_decided=is_decided)
            made.use_kernels = use_kernels
            return made

        # NPC 2 is greedy, where there is one
        npcs = [
            Npc(name=str(k), policy=net(10 + k).eval().requires_grad_(False), is_greedy=k == 2)
            for k in range(size.num_npcs)
        ]
        self.pool = NpcPool(npcs, num_envs=size.num_envs, num_npc=split.num_npc, device=device) if npcs else None
        if self.pool is not None:
            self.pool.probabilities.copy_(dyadic_chances(size.num_npcs))
        self.learner = net(1)
        self.mixed = MixedPolicy(self.learner, self.pool, split, spec, device)
        self.metrics = EpisodeMetrics(spec, split, self.pool, device, count_first=False, count_later=True)
        self.experience = allocate_experience(
            spec,
            horizon=size.horizon,
            num_rows=self.mixed.num_learner_rows,
            state_size=self.learner.state_size,
            device=device,
        )
        self.ppo = PpoUpdate(
            self.learner, settings, betas=(0.9, 0.999), eps=1e-5, ranks=Ranks(), use_kernels=use_kernels,
            capture=capture,
        )  # fmt: skip
        self.is_fused = use_kernels and agent == "fast"
        self.play = self._make_play(capture=capture)
        self.env.reset(3, stagger=True)
        start_rollouts(self.env, self.mixed, self.experience)

    def _make_play(self, *, capture: bool) -> Play:
        parts = self.env, self.mixed, self.experience, self.metrics
        play: Play = partial(collect_rollout, *parts)
        if self.is_fused:
            assert why_not_fused(self.env, self.mixed) == ""
            play = FusedPlay(*parts, tile=self.size.tile)
        return CapturedPlay(play) if capture else play

    def numbers(self, iteration: int) -> RandomNumbers:
        """The uniform numbers of an iteration."""
        return self.mixed.random_numbers(1, iteration * self.size.horizon, self.size.horizon)

    def iterate(self, iteration: int, learning_rate: float) -> dict[str, float]:
        """A rollout and its update."""
        self.play(self.numbers(iteration))
        return {name: float(loss) for name, loss in self.ppo.update(self.experience, learning_rate).items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that a rollout writes."""
        found = {field.name: getattr(self.experience, field.name) for field in fields(Experience)}
        found |= {f"env.{name}": getattr(self.env, name) for name in STATE_NAMES}
        found |= {"sums": self.metrics.sums, "returns": self.metrics.returns, "table": self.mixed.actions}
        found |= {"learner_state": self.mixed.learner_state}
        if self.pool is not None:
            found |= {"npc_state": self.pool.state, "npc_of_env": self.pool.npc_of_env}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def take_over(self, experience: Experience) -> None:
        """Copies another game's experience."""
        for field in fields(Experience):
            mine, theirs = getattr(self.experience, field.name), getattr(experience, field.name)
            if mine is not None:
                mine.copy_(theirs)


def check_replays_are_calls(
    device: torch.device, dtype: torch.dtype, size: Size, *, agent: str = "fast", num_iterations: int = 8
) -> None:
    """Rollouts from a graph (warm-up, recording, replays) are those of plain calls, bit for bit.

    Between rollouts the learner's weights and the NPCs' chances are rewritten, as a run does: a replay that went on
    with old ones would differ.
    """
    graph = Game(device, dtype, size, agent=agent, capture=device.type == "cuda")
    calls = Game(device, dtype, size, agent=agent)
    for iteration in range(num_iterations):
        for game in (graph, calls):
            game.play(game.numbers(iteration))
        for name, tensor in calls.tensors().items():
            assert_same(f"rollout {iteration}, {name}", graph.tensors()[name], tensor)
        for game in (graph, calls):
            game.ppo.parameters.flat.data.mul_(0.97)
            if game.pool is not None:
                game.pool.probabilities.copy_(game.pool.probabilities.roll(1))
    assert calls.metrics.sums[:, 0].sum() > 0, "no episode ended"
    if device.type == "cuda":
        assert graph.play._captured._graph is not None, "nothing was recorded"


def check_fused_rollout(device: torch.device, dtype: torch.dtype, size: Size, *, num_iterations: int = 2) -> None:
    """Fused rollouts against plain ones that take the same actions, and against what the policies would have drawn.

    The exact twin plays in float32 on the CPU, the plain one in `dtype` on the device. What the env gives is the same
    bit for bit; what the policies give is as near to the exact twin as the plain one is.
    """
    fused = Game(device, dtype, size)
    plain = Game(device, dtype, size, use_kernels=False)
    exact = Game(CPU, torch.float32, size, use_kernels=False)
    tables = _record_actions(fused.env)
    for iteration in range(num_iterations):
        tables.clear()
        fused.play(fused.numbers(iteration))
        numbers = exact.numbers(iteration)
        for field in fields(RandomNumbers):
            assert_same(field.name, getattr(fused.numbers(iteration), field.name), getattr(numbers, field.name))
        _play_forced(plain, tables, plain.numbers(iteration), dtype, is_checked=False)
        _play_forced(exact, tables, numbers, dtype, is_checked=True)
        ours, theirs, truth = (game.tensors() for game in (fused, plain, exact))
        for name, wanted in truth.items():
            if name in ("log_probs", "values", "initial_state", "last_values", "learner_state", "npc_state"):
                if wanted.any():  # the first initial state is all zeros
                    assert_as_near(f"rollout {iteration}, {name}", ours[name], theirs[name], wanted, dtype)
            else:
                assert_same(f"rollout {iteration}, {name}", ours[name], wanted)
    assert exact.experience.dones.any(), "no episode ended"
    assert exact.metrics.sums[:, 0].sum() > 0, "no episode was counted"


def _record_actions(env: Arena) -> list[Tensor]:
    """The action tables of all steps from now on, on the CPU."""
    tables: list[Tensor] = []
    step = env.step

    def recording(actions: Tensor) -> object:
        tables.append(actions.to(CPU, copy=True))
        return step(actions)

    env.step = recording  # type: ignore[method-assign]
    return tables


@torch.no_grad()
def _play_forced(
    game: Game, tables: list[Tensor], numbers: RandomNumbers, dtype: torch.dtype, *, is_checked: bool
) -> None:
    """`collect_rollout` with given actions, by plain calls.

    Args:
        game: whose experience is filled.
        tables: (num_envs, num_agents) int64 for each step.
        numbers: what the actions were drawn with.
        dtype: of the products that the actions come from.
        is_checked: whether the game's own policies must give these actions.
    """
    env, mixed, experience, pool = game.env, game.mixed, game.experience, game.pool
    mixed.learner.pack()
    experience.obs[0].copy_(experience.obs[-1])
    experience.initial_state.copy_(mixed.learner_state)
    for t, table in enumerate(tables):
        mixed.actions.copy_(table)
        logits, values, state = mixed.learner.forward_step(experience.obs[t], mixed.learner_state)
        mixed.learner_state.copy_(state)
        actions = mixed.actions.index_select(1, mixed.learner_seats).flatten()
        experience.actions[t], experience.values[t] = actions, values
        experience.log_probs[t] = log_probs_of(logits, actions)
        if is_checked:
            assert_drawn(f"step {t}, learner", actions, logits, numbers.learner[t], dtype)
        npcs = [] if pool is None else _force_npcs(pool, mixed)
        for k, rows, npc_actions, npc_logits in npcs if is_checked else []:
            if pool.npcs[k].is_greedy:
                assert_greedy(f"step {t}, NPC {k}", npc_actions, npc_logits, dtype)
            else:
                assert_drawn(f"step {t}, NPC {k}", npc_actions, npc_logits, numbers.npc[t][rows], dtype)

        result = env.step(mixed.actions)
        experience.rewards[t] = result.rewards.index_select(1, mixed.learner_seats).flatten()
        experience.dones[t] = result.dones.index_select(1, mixed.learner_seats).flatten()
        game.metrics.add(result)
        mixed.end_step(result, experience.dones[t], numbers.draw[t])
        mixed.observe(env, experience.obs[t + 1])
    _, last_values, _ = mixed.learner.forward_step(experience.obs[-1], mixed.learner_state)
    experience.last_values.copy_(last_values)


def _force_npcs(pool: NpcPool, mixed: MixedPolicy) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Moves the NPCs' states on; gives for each NPC that plays its number, its rows, their actions and logits."""
    npc_of_row = pool.npc_of_env.repeat_interleave(pool.num_npc)
    actions = mixed.actions.index_select(1, mixed.npc_seats).flatten()
    found = []
    for k, npc in enumerate(pool.npcs):
        rows = npc_of_row == k
        if rows.any():
            logits, _, state = npc.policy.forward_step(mixed.npc_obs[rows], pool.state[rows])
            pool.state[rows] = state
            found.append((k, rows, actions[rows], logits))
    return found


def check_update_gradient(device: torch.device, dtype: torch.dtype, size: Size) -> None:
    """The gradient of a whole minibatch with kernels, as near to float32's as that of plain torch is.

    And the first update of all finds the policy where the rollout left it: nothing clipped, next to no KL divergence.
    """
    settings = replace(SETTINGS, epochs=1, num_minibatches=1, max_grad_norm=1e9)
    fused = Game(device, dtype, size, settings=settings)
    plain = Game(device, dtype, size, settings=settings, use_kernels=False)
    exact = Game(device, torch.float32, size, settings=settings, use_kernels=False)
    for iteration in range(2):  # the second rollout begins with states that are not zero
        fused.play(fused.numbers(iteration))
    assert fused.experience.dones.any(), "no episode ended"
    for game in (plain, exact):
        game.take_over(fused.experience)
    start = fused.ppo.parameters.flat.detach().clone()
    losses = [game.ppo.update(game.experience, 0.0) for game in (fused, plain, exact)]
    assert_same("parameters", fused.ppo.parameters.flat.detach(), start)
    named = [dict(game.learner.named_parameters()) for game in (fused, plain, exact)]
    for name in named[0]:
        assert_as_near(f"gradient of {name}", *(parameters[name].grad for parameters in named), dtype)
    assert float(losses[0]["clipfrac"]) == 0.0, losses[0]
    assert abs(float(losses[0]["approx_kl"])) < 1e-3, losses[0]
    for name in ("policy_loss", "value_loss", "entropy", "explained_variance"):
        assert abs(float(losses[0][name] - losses[2][name])) < 0.02, f"{name}: {losses[0][name]}, {losses[2][name]}"


LEARNING_RATES = (1e-3, 5e-4, 2e-4, 1e-3, 0.1, 5e-4)
"""The fifth drives the policy so far that the update stops at target_kl; on a GPU the last three are replays."""


def check_updates_are_calls(device: torch.device, dtype: torch.dtype, size: Size) -> None:
    """Updates from a graph are those of plain calls: learning rates that change, one update that target_kl stops."""
    settings = replace(SETTINGS, epochs=2, num_minibatches=2, target_kl=0.02)
    graph = Game(device, dtype, size, settings=settings, is_decided=False, capture=device.type == "cuda")
    calls = Game(device, dtype, size, settings=settings, is_decided=False)
    stops = []
    for update, learning_rate in enumerate(LEARNING_RATES):
        calls.play(calls.numbers(update))
        graph.take_over(calls.experience)
        losses = [game.ppo.update(game.experience, learning_rate) for game in (graph, calls)]
        for name, loss in losses[1].items():
            torch.testing.assert_close(losses[0][name], loss, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert float(graph.ppo.is_stopped) == float(calls.ppo.is_stopped)
        stops.append(float(calls.ppo.is_stopped))
        ours, wanted = (game.ppo.parameters.flat for game in (graph, calls))
        assert_near_as_vectors(f"update {update}, parameters", ours, wanted, relative=PARAMETERS_MAY_DIFFER)
        for name, wanted in calls.ppo.adam_state().items():
            ours = graph.ppo.adam_state()[name]
            assert_near_as_vectors(f"update {update}, {name}", ours, wanted, relative=PARAMETERS_MAY_DIFFER)
    assert stops == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], stops
    if device.type == "cuda":
        ((_, captured),) = graph.ppo._captured
        assert captured._graph is not None, "nothing was recorded"


def check_restored_state(device: torch.device, dtype: torch.dtype, size: Size, *, num_iterations: int = 5) -> None:
    """A state that is put back into a run whose graphs are recorded, and into a new one, goes on as the run did.

    Saved after `num_iterations`: on a GPU the fifth is a replay.
    """
    settings = replace(SETTINGS, num_minibatches=1)
    game = Game(device, dtype, size, is_decided=False, settings=settings, capture=device.type == "cuda")
    for iteration in range(num_iterations):
        game.iterate(iteration, 1e-3)
    saved = encode_state(
        Counters(iteration=num_iterations),
        learner_tensors(game.mixed, game.ppo),
        [episode_tensors(game.env, game.mixed, game.metrics)],
    )

    def go_on(game: Game) -> tuple[dict[str, Tensor], Tensor]:
        game.metrics.sums.zero_()
        game.play(game.numbers(num_iterations))
        seen = {name: tensor.clone() for name, tensor in game.tensors().items()}
        game.ppo.update(game.experience, 1e-3)
        game.iterate(num_iterations + 1, 1e-3)
        return seen, game.ppo.parameters.flat.detach().clone()

    wanted, parameters = go_on(game)
    new = Game(device, dtype, size, is_decided=False, settings=settings)
    for where, other in (("the same run", game), ("a new run", new)):
        state = decode_state(saved, "state")
        restore_learner(state, "state", other.mixed, other.ppo)
        assert restore_episodes(state, "state", other.env, other.mixed, other.metrics, Ranks()) == 1
        counters = state.counters
        assert counters.iteration == num_iterations
        start_rollouts(other.env, other.mixed, other.experience)
        seen, reached = go_on(other)
        for name, tensor in wanted.items():
            assert_same(f"{where}, {name}", seen[name], tensor)
        assert_near_as_vectors(f"{where}, parameters", reached, parameters, relative=PARAMETERS_MAY_DIFFER)
