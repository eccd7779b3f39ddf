"""Toy simulators whose every number can be worked out by hand, and in-process rows to play them in."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np

from dual_policy_plugin.envs.adapt import as_host
from dual_policy_plugin.envs.host import EpisodeRunner
from dual_policy_plugin.envs.shared_rows import create_memory, map_arrays, rows_of


def discrete(n, start=0):
    return SimpleNamespace(n=n, start=start)


def box(*shape):
    return SimpleNamespace(shape=shape, low=0.0, high=1.0)


class Script:
    """A ParallelEnv of agents a, b, c. An agent's observation is (number of the agent, step, its last action).

    Step 1: plain. Step 2: b terminates. Step 3: c joins. Step 4: a is truncated. Step 5: b is back. Step 6: b
    terminates and c is truncated, so the episode is over. Reward: 10 * step + action.
    """

    possible_agents = ("a", "b", "c")
    max_episode_steps = 50

    def __init__(self, action_start=0):
        self.agents, self.t, self.last, self.action_start = [], 0, {}, action_start
        self.log = []

    def observation_space(self, agent):
        return box(3)

    def action_space(self, agent):
        return discrete(4, self.action_start)

    def reset(self, seed=None, options=None):
        self.t, self.agents, self.last = 0, ["a", "b"], {}
        return self._seen(self.agents), {}

    def step(self, actions):
        assert set(actions) == set(self.agents), "an action for every agent that is there, and for no other"
        self.log.append(dict(actions))
        self.t, self.last = self.t + 1, actions
        here = list(self.agents)
        terminations = {agent: (self.t, agent) in ((2, "b"), (6, "b")) for agent in here}
        truncations = {agent: (self.t, agent) in ((4, "a"), (6, "c")) for agent in here}
        self.agents = [agent for agent in here if not (terminations[agent] or truncations[agent])]
        joined = {3: ["c"], 5: ["b"]}.get(self.t, [])
        self.agents += joined
        rewards = {agent: 10.0 * self.t + actions[agent] for agent in here}
        return self._seen(here + joined), rewards, terminations, truncations, {agent: {} for agent in here}

    def _seen(self, agents):
        return {
            agent: np.array([self.possible_agents.index(agent), self.t, self.last.get(agent, -1)], np.float64)
            for agent in agents
        }

    def close(self):
        pass


class Walker:
    """A ParallelEnv of two agents on a line. Observation: (place, steps taken, noise of the seed); action 1 goes north
    by one, 2 south. It never ends by itself, or terminates for all after `length` steps. Reward: the place."""

    possible_agents = ("left", "right")
    agents_leave = False
    action_names = ("stay", "north", "south")
    feature_names = ("place", "step", "noise")

    def __init__(self, max_episode_steps=8, length=None):
        self.max_episode_steps, self.length, self.agents = max_episode_steps, length, []

    def observation_space(self, agent):
        return box(3)

    def action_space(self, agent):
        return discrete(3)

    def reset(self, seed=None, options=None):
        self.random, self.t, self.agents = np.random.default_rng(seed), 0, list(self.possible_agents)
        self.places = dict.fromkeys(self.agents, 0)
        return self._seen(), {}

    def step(self, actions):
        self.t += 1
        for agent, action in actions.items():
            self.places[agent] += {0: 0, 1: 1, 2: -1}[action]
        over = self.t == self.length
        seen, rewards = self._seen(), {agent: float(place) for agent, place in self.places.items()}
        flags = dict.fromkeys(self.agents, over)
        if over:
            self.agents = []
        return seen, rewards, flags, dict.fromkeys(flags, False), {}

    def _seen(self):
        noise = self.random.random()
        return {agent: np.array([self.places[agent], self.t, noise], np.float32) for agent in self.possible_agents}

    def close(self):
        pass


class LatePuffer:
    """Puffer-style, two agents, one shared buffer. Observation: (episode, step, last action); reward: 1 + action.

    An episode is truncated after 3 steps (terminated where `terminates`). As MettaGrid's Puffer class, the next step
    would ignore its actions, reset, and report a reward of -100.
    """

    late_reset = True
    max_episode_steps = 9
    num_agents = 2
    single_observation_space = box(3)
    single_action_space = discrete(5)

    def __init__(self, terminates=False):
        self.observations = np.zeros((2, 3), np.float32)
        self.rewards = np.zeros(2, np.float32)
        self.terminals, self.truncations = np.zeros(2, bool), np.zeros(2, bool)
        self.terminates, self.episode, self.fakes, self.seeds = terminates, -1, 0, []

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.episode, self.t = self.episode + 1, 0
        self.terminals[:] = self.truncations[:] = False
        self.observations[:] = [self.episode, 0, -1]
        return self.observations, []

    def step(self, actions):
        if (self.terminals | self.truncations).all():
            self.fakes += 1
            self.reset()
            self.rewards[:] = -100
            return self.observations, self.rewards, self.terminals, self.truncations, []
        self.t += 1
        self.observations[:, 0], self.observations[:, 1], self.observations[:, 2] = self.episode, self.t, actions
        self.rewards[:] = 1 + actions
        (self.terminals if self.terminates else self.truncations)[:] = self.t == 3
        return self.observations, self.rewards, self.terminals, self.truncations, []


class NativePuffer(LatePuffer):
    """Like LatePuffer, but resets inside the step that ends an episode; agent 1 alone is done at step 2, and a mask
    empties its seat in step 3."""

    late_reset = False

    def __init__(self):
        super().__init__(terminates=False)
        self.masks = np.ones(2, bool)

    def step(self, actions):
        self.t += 1
        self.observations[:, 0], self.observations[:, 1], self.observations[:, 2] = self.episode, self.t, actions
        self.rewards[:] = 1 + actions
        self.terminals[:] = [False, self.t == 2]
        self.truncations[:] = self.t == 4
        self.masks[:] = [True, self.t != 2]
        if self.t == 4:
            self.episode, self.t = self.episode + 1, 0
            self.observations[:] = [self.episode, 0, -1]
        return self.observations, self.rewards, self.terminals, self.truncations, []


class Trouble(Walker):
    """A Walker whose env number `where` makes trouble in its third step."""

    def __init__(self, is_here, kind):
        super().__init__()
        self.is_here, self.kind = is_here, kind

    def step(self, actions):
        if self.is_here and self.t == 2:
            if self.kind == "raise":
                raise ValueError("the toy broke")
            if self.kind == "hang":
                time.sleep(60)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV}[self.kind])
        return super().step(actions)


class Sleepy(Walker):
    """A Walker whose step takes some seconds, and no processor."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def step(self, actions):
        time.sleep(self.seconds)
        return super().step(actions)


def make_script(index, action_start=0):
    return Script(action_start)


def make_walker(index, max_episode_steps=8, length=None):
    return Walker(max_episode_steps, length)


def make_late_puffer(index):
    return LatePuffer()


def make_trouble(index, where=0, kind="raise"):
    return Trouble(index == where, kind)


def make_sleepy(index, seconds):
    return Sleepy(seconds)


def make_wide(index, width):
    return Walker(max_episode_steps=width)


def make_uneven(index):
    return Walker(max_episode_steps=8 + index)


def play(env, name="toy", cut=10**9, seed=1):
    """A runner of one env in this process, started, and its rows."""
    host = as_host(env, name)
    memory = create_memory()
    try:
        rows = rows_of(map_arrays(memory, host.spec, 1, resize=True), 0)
    finally:
        os.close(memory)
    runner = EpisodeRunner(host, rows, 0)
    runner.reset(seed, cut)
    return runner, rows


def step(runner, rows, *actions):
    rows.actions[:] = actions
    runner.step()
    return rows
