"""PufferLib-style envs: both kinds of reset, worked by hand on toys."""

import pytest
from toy_envs import LatePuffer, NativePuffer, play, step

from dual_policy_plugin.envs.adapt import as_host
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.types import ObservationSpace


def test_a_late_reset_is_swallowed_and_the_final_observation_kept():
    env = LatePuffer()
    runner, rows = play(env)
    assert rows.observations.tolist() == [[0, 0, -1], [0, 0, -1]]
    for time in (1, 2):
        step(runner, rows, 3, 4)
        assert rows.observations.tolist() == [[0, time, 3], [0, time, 4]]
        assert rows.rewards.tolist() == [4, 5]
        assert not rows.dones.any()
    step(runner, rows, 1, 2)
    assert rows.dones.all()
    assert rows.truncated.all()
    assert rows.episode_ends.all()
    assert rows.rewards.tolist() == [2, 3]
    assert rows.final_observations.tolist() == [[0, 3, 1], [0, 3, 2]]
    assert rows.observations.tolist() == [[1, 0, -1], [1, 0, -1]]
    step(runner, rows, 4, 0)  # a real first step of episode 1: its actions count, nothing costs 100
    assert rows.observations.tolist() == [[1, 1, 4], [1, 1, 0]]
    assert rows.rewards.tolist() == [5, 1]
    assert not rows.dones.any()
    assert not rows.truncated.any()
    assert env.fakes == 0
    assert len(env.seeds) == len(set(env.seeds)) == 2


def test_a_late_reset_after_a_termination_is_no_truncation():
    runner, rows = play(LatePuffer(terminates=True))
    for _ in range(3):
        step(runner, rows, 0, 0)
    assert rows.episode_ends.all()
    assert rows.dones.all()
    assert not rows.truncated.any()


def test_an_agent_that_is_done_early_stays_out_until_all_are():
    env = LatePuffer()
    runner, rows = play(env)
    step(runner, rows, 0, 0)
    env.terminals[1] = True  # the env's flags are sticky; seen with the next step's
    original = env.step

    def early(actions):
        result = original(actions)
        env.terminals[1] = True
        return result

    env.step = early
    step(runner, rows, 2, 2)
    assert rows.dones.tolist() == [False, True]
    assert rows.weights.tolist() == [1, 1]
    assert rows.observations.tolist() == [[0, 2, 2], [0, 0, 0]]
    env.step = original
    step(runner, rows, 1, 1)
    assert rows.weights.tolist() == [1, 0]
    assert rows.rewards.tolist() == [2, 0]
    assert rows.truncated.tolist() == [True, False]
    assert rows.episode_ends.all()


def test_a_native_reset_keeps_the_first_observation_of_the_next_episode():
    env = NativePuffer()
    runner, rows = play(env)
    step(runner, rows, 1, 2)
    assert rows.weights.tolist() == [1, 1]
    step(runner, rows, 1, 2)  # agent 1 is done alone, its seat is empty in the next step
    assert rows.dones.tolist() == [False, True]
    assert rows.weights.tolist() == [1, 1]
    assert rows.rewards.tolist() == [2, 3]
    assert rows.observations.tolist() == [[0, 2, 1], [0, 0, 0]]
    step(runner, rows, 1, 2)
    assert rows.weights.tolist() == [1, 0]
    assert rows.rewards.tolist() == [2, 0]
    assert rows.dones.tolist() == [False, True]
    assert rows.observations.tolist() == [[0, 3, 1], [0, 3, 2]]
    step(runner, rows, 1, 2)  # the episode ends; its final observation is gone, so nothing is truncated
    assert rows.episode_ends.all()
    assert rows.dones.all()
    assert not rows.truncated.any()
    assert rows.observations[0].tolist() == [2, 0, -1]


def test_a_cut_of_a_native_env_has_its_final_observation():
    runner, rows = play(NativePuffer(), cut=1)
    step(runner, rows, 3, 4)
    assert rows.truncated.all()
    assert rows.final_observations.tolist() == [[0, 1, 3], [0, 1, 4]]
    assert rows.observations.tolist() == [[1, 0, -1], [1, 0, -1]]


def test_an_env_must_say_when_it_resets():
    env = LatePuffer()
    env.late_reset = None
    with pytest.raises(ConfigError, match=r"env.name=toy: LatePuffer.late_reset=None does not say"):
        as_host(env, "toy")


def test_the_known_late_reset_classes_need_not_say_so():
    kind = type("MettaGridPufferEnv", (LatePuffer,), {"late_reset": None})
    runner, rows = play(kind())
    for _ in range(3):
        step(runner, rows, 0, 0)
    assert rows.truncated.all()


def test_an_env_may_bring_its_own_space():
    env = LatePuffer()
    env.dual_policy_observation_space = ObservationSpace(kind="vector", shape=(3,), features=("episode", "t", "last"))
    env.action_names = ("noop", "north", "south", "west", "east")
    spec = as_host(env, "toy").spec
    assert spec.observation_space.features == ("episode", "t", "last")
    assert spec.actions == ("noop", "north", "south", "west", "east")


def test_names_must_fit_and_actions_must_be_discrete():
    env = LatePuffer()
    env.action_names = ("noop", "north")
    with pytest.raises(ConfigError, match=r"env.name=toy names 2 actions, its action space has 5"):
        as_host(env, "toy")
    env = LatePuffer()
    env.single_action_space = object()
    with pytest.raises(ConfigError, match=r"use an env with Discrete actions"):
        as_host(env, "toy")
    with pytest.raises(ConfigError, match=r"env.name=toy makes a dict; return a PettingZoo ParallelEnv"):
        as_host({}, "toy")
