"""Recorded games are evaluation's own, step for step, and the frames show what stood in its env."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from dual_policy_plugin.envs.arena import make_arena
from dual_policy_plugin.envs.arena_text import show_map
from dual_policy_plugin.errors import ConfigError, EnvError
from dual_policy_plugin.evaluate import SEED_OFFSET, evaluate_pinned, load_pinned, read_spec
from dual_policy_plugin.evaluation.matches import play_pairings, seatings_of
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.replay.arena_frames import arena_frames
from dual_policy_plugin.replay.frames import FACINGS, Frames, Game
from dual_policy_plugin.replay.record import ActionLog, Episode, make_episode, record
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.types import StepResult
from tests.replay.games import CPU, HUNTER, MEDIUM, METTAGRID, SMALL, WEAK, arena_games, config_of, random_policies


@pytest.mark.parametrize(
    ("words", "episodes"),
    [
        ((), 4),
        (("env.num_envs=1",), 4),  # a group for each seating, two rounds each
        (("env.num_envs=5",), 12),
        (("env.num_agents=3",), 3),  # two against one: no swap
        (("trainer.dual_policy.assignment=interleaved", "env.num_envs=4"), 8),
    ],
)
def test_the_games_are_those_of_play_pairings(words: tuple[str, ...], episodes: int) -> None:
    config = config_of(*SMALL, *words)
    pinned = [resolve(MEDIUM), resolve(WEAK)]
    recording, result = record(*pinned, config, episodes=episodes, seed=5, device=CPU)
    spec = read_spec(config)
    args = {key: value for key, value in config.env.args.items() if value is not None}
    (played,) = play_pairings(
        load_pinned(pinned, spec, config, CPU),
        [(0, 1)],
        lambda numbers: make_arena(len(numbers), args, CPU, env_numbers=numbers),
        seatings_of(assign(spec.num_agents, 0.5, config.trainer.dual_policy.assignment), spec),
        episodes=episodes, seed=5 + SEED_OFFSET, max_envs=config.env.num_envs, device=CPU,
    )  # fmt: skip
    assert played.episodes == len(recording.episodes) == episodes
    means = np.array([episode.means(-1) for episode in recording.episodes])
    assert means.mean(axis=0).tolist() == pytest.approx([played.first_return, played.second_return], abs=1e-12)
    assert sum(episode.share for episode in recording.episodes) == played.wins == result.wins
    assert means.sum() > 0


def test_an_odd_number_is_the_first_of_one_more_and_swapped_games_begin_alike() -> None:
    three, four = arena_games(episodes=3), arena_games(episodes=4)
    assert [episode.start for episode in four.episodes] == [0, 0, 1, 1]
    assert [episode.policy_of_seat for episode in four.episodes] == [(0, 0, 1, 1), (1, 1, 0, 0)] * 2
    for one, other in zip(three.episodes, four.episodes, strict=False):
        assert np.array_equal(one.frames.cells, other.frames.cells)
    first, swapped, next_map = (episode.frames for episode in four.episodes[:3])
    assert (first.walls, first.mines, first.altars) == (swapped.walls, swapped.mines, swapped.altars)
    assert np.array_equal(first.cells[0], swapped.cells[0])
    assert not np.array_equal(first.cells, swapped.cells)
    assert first.mines != next_map.mines
    assert three.teams == (0, 0, 1, 1)
    assert three.capacity == 3


class MapLog(ActionLog):
    """Also writes down how the first env stands before each step."""

    seen: list[tuple[str, list[list[int]]]]

    def step(self, actions: Tensor) -> StepResult:
        env = self._env
        own = [values[0].tolist() for values in (env.ore, env.hearts, env.frozen, env.cooldown, env.facings)]  # type: ignore[attr-defined]
        self.__dict__.setdefault("seen", []).append((show_map(env), own))  # type: ignore[arg-type]
        return super().step(actions)


def test_the_frames_show_what_stood_in_the_env_that_was_played() -> None:
    config, logs = config_of(*SMALL), []

    def watch(env):  # type: ignore[no-untyped-def]
        logs.append(MapLog(env))
        return logs[0]

    evaluate_pinned(resolve(HUNTER), [resolve(WEAK)], config, episodes=2, seed=5 + SEED_OFFSET, device=CPU, watch=watch)
    frames = arena_games(policy=HUNTER, episodes=2).episodes[0].frames
    assert len(logs[0].seen) == frames.num_steps == 40
    for t, (text, own) in enumerate(logs[0].seen):
        assert drawn_as_text(frames, t) == text
        state = [frames.state[name][t].tolist() for name in ("ore", "hearts", "frozen", "cooldown")]
        assert [*state, frames.facings[t].tolist()] == own
    assert max(map(max, (own[2] for _, own in logs[0].seen))) == 8  # somebody was frozen


def drawn_as_text(frames: Frames, t: int) -> str:
    """As `show_map` has it; a spent altar is a wall there."""
    letters = np.full(frames.height * frames.width, ".")
    letters[frames.walls], letters[frames.mines] = "#", "M"
    for cell, stock in zip(frames.altars, frames.stocks[t], strict=True):
        letters[cell] = "A" if stock else "#"
    for seat, cell in enumerate(frames.cells[t]):
        letters[cell] = str(seat)
    return "\n".join("".join(row) for row in letters.reshape(frames.height, frames.width))


def test_the_last_frame_is_how_the_episode_ended_not_how_the_next_begins() -> None:
    for episode in arena_games(episodes=4).episodes:
        frames = episode.frames
        check_hearts_are_kept(episode)
        height, width = frames.height, frames.width
        moved = np.abs(frames.cells[-1] // width - frames.cells[-2].astype(int) // width)
        moved = moved + np.abs(frames.cells[-1] % width - frames.cells[-2].astype(int) % width)
        assert moved.max() <= 1
        assert frames.cells.max() < height * width


def check_hearts_are_kept(episode: Episode) -> None:
    """Whatever the altars lost the agents have; nobody stands in anything."""
    frames = episode.frames
    given = frames.stocks[0].astype(int).sum() - frames.stocks.astype(int).sum(axis=1)
    assert given.tolist() == frames.returns.sum(axis=1).tolist()
    assert frames.returns.tolist() == frames.state["hearts"].tolist()
    taken = [*frames.walls, *frames.mines, *frames.altars]
    assert not np.isin(frames.cells, taken).any()
    assert all(len(set(cells)) == len(cells) for cells in frames.cells.tolist())


def test_mettagrid_is_drawn_from_its_own_objects(tmp_path: Path) -> None:
    config = config_of(*METTAGRID)
    one, other = map(resolve, random_policies(config, tmp_path))
    recording, result = record(one, other, config, episodes=2, seed=3, device=CPU)
    means = np.array([episode.means(-1) for episode in recording.episodes]).mean(axis=0)
    assert means.tolist() == pytest.approx([result.learner_return, result.opponent_return])
    assert means.sum() > 0
    assert (recording.capacity, recording.teams) == (5, ())
    for episode in recording.episodes:
        frames = episode.frames
        check_hearts_are_kept(episode)
        assert [len(frames.walls), len(frames.mines), len(frames.altars)] == [2, 3, 3]
        rows, columns = np.divmod(frames.cells.astype(int), 5)
        moved = np.abs(np.diff(rows, axis=0)) + np.abs(np.diff(columns, axis=0))
        assert moved.max() == 1
        assert (frames.facings[1:][moved == 1] > 0).all()
        north = (np.diff(rows, axis=0) == -1) & (moved == 1)
        assert {FACINGS[facing] for facing in frames.facings[1:][north]} == {"north"}
        before, after = frames.facings[0], frames.facings[-1]
        assert (before == 0).all()
        assert set(after.tolist()) <= {1, 2, 3, 4}


def test_a_game_that_does_not_come_out_the_same_is_refused() -> None:
    split = assign(4, 0.5)
    args = {"num_agents": 4, "episode_steps": 4}
    game = Game(seed=1, number=0, actions=np.zeros((4, 4), np.uint8), returns=np.zeros(4))
    frames = arena_frames(game, args)
    assert make_episode(0, split, game, frames, "arena").share == 0.5
    with pytest.raises(
        EnvError, match=r"brought \[0.0, 0.0, 0.0, 0.0\] where evaluation counted \[0.0, 1.0, 0.0, 0.0\]"
    ):
        make_episode(0, split, replace(game, returns=np.array([0.0, 1, 0, 0])), frames, "arena")


def test_the_side_with_the_higher_mean_wins_not_the_one_with_more_seats() -> None:
    game = Game(seed=1, number=0, actions=np.zeros((2, 3), np.uint8), returns=np.array([1.0, 1.0, 1.5]))
    frames = arena_frames(game, {"num_agents": 3, "episode_steps": 2})
    frames = replace(frames, returns=np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1.5]], np.float32))
    episode = make_episode(0, assign(3, 2 / 3), game, frames, "arena")
    assert episode.share == 0
    assert episode.means(2) == (1.0, 1.5)


def test_what_cannot_be_recorded_is_said_before_anything_is_played() -> None:
    policies = resolve(MEDIUM), resolve(WEAK)
    with pytest.raises(ConfigError, match="use --episodes 12 at most"):
        record(*policies, config_of("env.episode_steps=10000"), episodes=13, seed=1, device=CPU)
    with pytest.raises(ConfigError, match=r"env.name=pettingzoo cannot be drawn, replay knows arena and mettagrid"):
        record(*policies, config_of("env=pettingzoo", "env.id=simple_spread_v3"), episodes=1, seed=1, device=CPU)
    alone = config_of(*SMALL, "trainer.dual_policy.training_agents_pct=1.0")
    with pytest.raises(ConfigError, match=r"training_agents_pct=1.0 leaves no seat to an opponent"):
        record(*policies, alone, episodes=1, seed=1, device=CPU)
