"""PettingZoo envs: a toy worked by hand, and real ones."""

import sys

import numpy as np
import pytest
import torch
from toy_envs import Script, Walker, box, discrete, play, step

from dual_policy_plugin.config import EnvConfig
from dual_policy_plugin.envs.adapt import as_host
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.envs.pettingzoo import PETTINGZOO_IDS, make
from dual_policy_plugin.errors import ConfigError, EnvError

A, B, C = 0, 1, 2


def test_agents_that_die_join_and_return_are_worked_by_hand():
    env = Script()
    runner, rows = play(env)
    assert runner._host.spec.has_weights
    assert rows.observations.tolist() == [[0, 0, -1], [1, 0, -1], [0, 0, 0]]

    step(runner, rows, 1, 2, 3)  # c's seat is empty
    assert rows.observations.tolist() == [[0, 1, 1], [1, 1, 2], [0, 0, 0]]
    assert rows.rewards.tolist() == [11, 12, 0]
    assert rows.dones.tolist() == [False, False, True]
    assert rows.weights.tolist() == [1, 1, 0]

    step(runner, rows, 1, 2, 3)  # b dies: it acted, so its weight is 1
    assert rows.observations.tolist() == [[0, 2, 1], [0, 0, 0], [0, 0, 0]]
    assert rows.rewards.tolist() == [21, 22, 0]
    assert rows.dones.tolist() == [False, True, True]
    assert rows.weights.tolist() == [1, 1, 0]
    assert not rows.truncated.any()

    step(runner, rows, 0, 2, 3)  # c joins: it sees, but did not act, and its state is still zeroed
    assert rows.observations.tolist() == [[0, 3, 0], [0, 0, 0], [2, 3, -1]]
    assert rows.dones.tolist() == [False, True, True]
    assert rows.weights.tolist() == [1, 0, 0]

    step(runner, rows, 3, 2, 3)  # a is truncated while c plays on
    assert rows.observations.tolist() == [[0, 0, 0], [0, 0, 0], [2, 4, 3]]
    assert rows.final_observations[A].tolist() == [0, 4, 3]
    assert rows.truncated.tolist() == [True, False, False]
    assert rows.dones.tolist() == [True, True, False]
    assert rows.weights.tolist() == [1, 0, 1]
    assert rows.rewards.tolist() == [43, 0, 43]

    step(runner, rows, 3, 2, 1)  # b is back
    assert rows.observations.tolist() == [[0, 0, 0], [1, 5, -1], [2, 5, 1]]
    assert rows.weights.tolist() == [0, 0, 1]
    assert rows.episode_ends.tolist() == [False]

    step(runner, rows, 3, 0, 2)  # b terminates, c is truncated: nobody is left, a new episode begins
    assert rows.episode_ends.tolist() == [True]
    assert rows.dones.tolist() == [True, True, True]
    assert rows.truncated.tolist() == [False, False, True]
    assert rows.final_observations[C].tolist() == [2, 6, 2]
    assert rows.weights.tolist() == [0, 1, 1]
    assert rows.rewards.tolist() == [0, 60, 62]
    assert rows.observations.tolist() == [[0, 0, -1], [1, 0, -1], [0, 0, 0]]
    assert env.log[3] == {"a": 3, "c": 3}

    step(runner, rows, 1, 2, 3)
    assert rows.rewards.tolist() == [11, 12, 0]
    assert not rows.truncated.any()


def test_actions_count_from_where_the_space_starts():
    env = Script(action_start=7)
    runner, rows = play(env)
    step(runner, rows, 0, 3, 1)
    assert env.log == [{"a": 7, "b": 10}]


def test_a_cut_truncates_who_is_there_and_nobody_else():
    runner, rows = play(Script(), cut=3)
    for _ in range(2):
        step(runner, rows, 1, 1, 1)
    step(runner, rows, 2, 2, 2)  # a acts, b is dead, c joins in the cut step: it has nothing to bootstrap
    assert rows.episode_ends.tolist() == [True]
    assert rows.truncated.tolist() == [True, False, False]
    assert rows.final_observations[A].tolist() == [0, 3, 2]
    assert rows.dones.tolist() == [True, True, True]
    assert rows.observations.tolist() == [[0, 0, -1], [1, 0, -1], [0, 0, 0]]
    for _ in range(5):
        step(runner, rows, 1, 1, 1)
        assert rows.episode_ends.tolist() == [False]  # the next episode has its full length
    step(runner, rows, 1, 1, 1)
    assert rows.episode_ends.tolist() == [True]


def test_a_fixed_action_moves_its_agent_and_no_other():
    runner, rows = play(Walker())
    for count in range(1, 6):
        step(runner, rows, 1, 2)
        assert rows.observations[:, 0].tolist() == [count, -count]
    assert runner._host.spec.actions == ("stay", "north", "south")
    assert runner._host.spec.observation_space.features == ("place", "step", "noise")


class Unequal(Walker):
    """The right agent sees two numbers only, or has more actions."""

    def __init__(self, sizes=(3, 3), actions=(3, 3)):
        super().__init__()
        self.sizes, self.counts = sizes, actions
        self.feature_names = self.action_names = None

    def observation_space(self, agent):
        return box(self.sizes[self.possible_agents.index(agent)])

    def action_space(self, agent):
        return discrete(self.counts[self.possible_agents.index(agent)])

    def _seen(self):
        return {"left": np.array([1, 2, 3]), "right": np.array([4, 5])}


def test_smaller_observations_have_zeros_behind_them():
    _, rows = play(Unequal(sizes=(3, 2)))
    assert rows.observations.tolist() == [[1, 2, 3], [4, 5, 0]]


def test_other_action_counts_are_refused():
    with pytest.raises(ConfigError, match=r"different numbers of actions \(\{'left': 3, 'right': 4\}\)"):
        as_host(Unequal(actions=(3, 4)), "toy")


def test_an_agent_that_leaves_against_the_envs_word_ends_the_run():
    env = Script()
    env.agents_leave = False
    env.possible_agents = ("a", "b")
    runner, rows = play(env)
    step(runner, rows, 0, 0)
    with pytest.raises(EnvError, match=r"agents_leave = False"):
        step(runner, rows, 0, 0)


class PaysTheAbsent(Script):
    """Pays c, which is not there in the first step."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards | {"c": 2.5}, *rest


def test_paying_an_agent_that_is_not_there_ends_the_run():
    runner, rows = play(PaysTheAbsent())
    with pytest.raises(EnvError, match=r"agent c is paid 2.5 in a step that it was not in; whoever waits"):
        step(runner, rows, 0, 0, 0)


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(ConfigError, match=r"env.id=simple_spred_v3 is no known .* did you mean simple_spread_v3"):
        make_env(EnvConfig(name="pettingzoo", args={"id": "simple_spred_v3"}), device="cpu", num_workers=1)
    with pytest.raises(ConfigError, match=r"env.id=os.path"):
        make_env(EnvConfig(name="pettingzoo", args={"id": "os.path"}), device="cpu", num_workers=1)
    with pytest.raises(ConfigError, match=r"env.kwargs.max_cycle is no setting .* did you mean max_cycles"):
        make(0, id="simple_spread_v3", kwargs={"max_cycle": 7})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"env.id is not set; use one of simple_adversary_v3, "),
        ({"id": "simple_spread_v3", "max_episode_steps": 0}, r"env.max_episode_steps=0 is not possible"),
        ({"id": "simple_spread_v3", "kwargs": 3}, r"env.kwargs=3 is not possible"),
        ({"id": "simple_spread_v3", "kwarg": {}}, r"env.kwarg is no setting .* did you mean kwargs"),
    ],
)
def test_bad_args_are_named_before_any_worker_starts(args, message):
    with pytest.raises(ConfigError, match=message):
        make_env(EnvConfig(name="pettingzoo", args=args), device="cpu", num_workers=1)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpe2.simple_spread_v3", None)
    with pytest.raises(EnvError, match=r"^env.id=simple_spread_v3 cannot be imported .* pip install mpe2$"):
        make(0, id="simple_spread_v3")


@pytest.mark.parametrize("name", [name for name in PETTINGZOO_IDS if name.startswith("simple")])
def test_every_mpe_env_plays_and_is_truncated_at_its_length(name):
    runner, rows = play(make(0, id=name, kwargs={"max_cycles": 4}))
    assert runner._host.spec.max_episode_steps == 4
    actions = [0] * runner._host.spec.num_agents
    for _ in range(3):
        step(runner, rows, *actions)
        assert not rows.dones.any()
    step(runner, rows, *actions)
    assert rows.truncated.all()
    assert rows.episode_ends.all()
    assert rows.final_observations.any()


def test_spread_runs_in_workers_and_the_npc_seat_goes_where_its_action_says():
    env = make_env(
        EnvConfig(name="pettingzoo", num_envs=3, args={"id": "simple_spread_v3", "kwargs": {"max_cycles": 30}}),
        device="cpu",
        num_workers=2,
    )
    try:
        assert env.spec.name == "pettingzoo:simple_spread_v3"
        assert (env.spec.num_agents, env.spec.observation_space.shape, env.spec.has_weights) == (3, (18,), False)
        env.reset(5)
        seats, out = torch.arange(3), torch.zeros(9, 18)
        env.observe(seats, out)
        before = out.view(3, 3, 18)[:, :, 2:4].clone()  # the agent's own place
        for _ in range(10):
            env.step(torch.tensor([[0, 0, 4]] * 3))  # the last seat always goes up
        env.observe(seats, out)
        moved = out.view(3, 3, 18)[:, :, 2:4] - before
        assert (moved[:, 2, 1] > 0.5).all()
        assert (moved[:, 2, 1] > moved[:, :2, 1].amax(1)).all()
    finally:
        env.close()


def test_knights_archers_zombies_empties_the_seats_of_the_dead():
    runner, rows = play(make(0, id="knights_archers_zombies_v11", max_episode_steps=700))
    generator = np.random.default_rng(0)
    was_empty = np.zeros(4, bool)
    empty_steps = 0
    for _ in range(1400):
        step(runner, rows, *generator.integers(0, 6, 4))
        assert np.array_equal(rows.weights == 0, was_empty)
        assert rows.dones[was_empty].all()
        was_empty = rows.dones & ~rows.episode_ends[0]
        assert not rows.observations[was_empty].any()
        empty_steps += int(was_empty.sum())
    assert empty_steps > 5


def test_an_agents_role_is_its_name_without_its_number():
    class Cast(Walker):
        possible_agents = ("guard_0", "guard_1", "thief2")

    assert as_host(Cast(), "cast").spec.roles == ("guard", "guard", "thief")
    Cast.roles = ()
    assert as_host(Cast(), "cast").spec.roles == ()
    Cast.roles = ["in", "out", "in"]
    assert as_host(Cast(), "cast").spec.roles == ("in", "out", "in")
    Cast.roles = ["in"]
    with pytest.raises(ConfigError, match=r"env.name=cast has 3 agents and 1 roles; give each agent one"):
        as_host(Cast(), "cast")
    del Cast.roles
    Cast.possible_agents = ("agent_0", "agent_1", "agent_2")
    assert as_host(Cast(), "cast").spec.roles == ()


def test_the_roles_of_a_real_env_reach_the_trainer():
    assert make(0, id="simple_tag_v3").spec.roles == ("adversary",) * 3 + ("agent",)
    env = make_env(
        EnvConfig(name="pettingzoo", num_envs=1, args={"id": "simple_adversary_v3"}), device="cpu", num_workers=1
    )
    try:
        assert env.spec.roles == ("adversary", "agent", "agent")
    finally:
        env.close()
