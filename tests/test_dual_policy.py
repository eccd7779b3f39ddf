"""The public API for other people's trainers: who acts where, what NPCs do there, arrays in and out, locks, resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from omegaconf import OmegaConf
from torch import Tensor, nn

from dual_policy_plugin import (
    CheckpointError,
    ConfigError,
    DigestError,
    DualPolicy,
    DualPolicyError,
    EnvError,
    NpcNotFoundError,
    ObservationSpace,
    RunError,
    SpacesError,
    load_policy_from_checkpoint,
    save_policy,
)
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import EnvSpec, StepResult

ENVS, AGENTS, FEATURES = 6, 4, 3
BOX, ACTIONS = Box(-1.0, 1.0, (FEATURES,), np.float32), ("stay", "left", "right")
SPACE = ObservationSpace(kind="vector", shape=(FEATURES,), features=("obs_0", "obs_1", "obs_2"))


class Plain(nn.Module):
    """A net of a user's own: obs -> logits, values (num_rows, 1)."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...], width: int = 8) -> None:
        super().__init__()
        self.body = nn.Linear(space.shape[0], width)
        self.logits, self.value = nn.Linear(width, len(actions)), nn.Linear(width, 1)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(obs).tanh()
        return 5 * self.logits(hidden), self.value(hidden)


class Actor(nn.Linear):
    """A net that gives logits alone."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...]) -> None:
        super().__init__(space.shape[0], len(actions))


class Counting(nn.Module):
    """A recurrent net: it counts its steps, and takes the action of that number."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...]) -> None:
        super().__init__()
        self.state_size = 1
        self.sharp = nn.Parameter(torch.tensor(1e4))
        self.num_actions = len(actions)

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        choice = (state[:, 0] % self.num_actions).long()
        return self.sharp * nn.functional.one_hot(choice, self.num_actions).float(), obs.new_zeros(len(obs)), state + 1


NETS: dict[str, Callable[..., nn.Module]] = {"plain": Plain, "actor": Actor, "counting": Counting}


def write(path: Path, agent: str = "plain", *, seed: int = 1, **options: Any) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[agent](SPACE, ACTIONS, **options.get("args", {}))
    return str(save_policy(path, net, agent=agent, observation_space=BOX, actions=ACTIONS, **options))


def open_dual(config: Any, **changes: Any) -> DualPolicy:
    options: dict[str, Any] = {
        "num_envs": ENVS,
        "num_agents": AGENTS,
        "observation_space": BOX,
        "actions": ACTIONS,
        "architectures": NETS,
        "precision": "fp32",
        "seed": 3,
    }
    return DualPolicy.open(config, **{**options, **changes})


def node(uri: str, **changes: Any) -> dict[str, Any]:
    return {"enabled": True, "checkpoint_npc": {"uri": uri}, **changes}


def observations(step: int = 0) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((ENVS, AGENTS, FEATURES))


def play(dual: DualPolicy, first: int, last: int) -> list[np.ndarray]:
    """NPC actions of some steps; every third step ends the episodes of the even envs."""
    taken = []
    for step in range(first, last):
        taken.append(dual.act(observations(step)))
        dones = (np.arange(ENVS) % 2 == 0) & (step % 3 == 2)
        dual.end_step(observations(step)[:, :, 0], dones)
    return taken


def test_npcs_act_as_they_do_in_a_run_of_ours(tmp_path: Path) -> None:
    """The same seed, the same policies: the very actions of MixedPolicy, over two blocks of random numbers."""
    uris = [write(tmp_path / f"{i}.safetensors", seed=i, args={"width": 5 + i}) for i in range(2)]
    dual = open_dual(node(uris[0], pool=[uris[1]]))
    policies = [load_policy_from_checkpoint(uri, architectures=NETS) for uri in uris]
    npcs = [Npc(name=str(i), policy=policy) for i, policy in enumerate(policies)]
    pool = NpcPool(npcs, num_envs=ENVS, num_npc=2, device=torch.device("cpu"))
    spec = EnvSpec(
        name="x", num_envs=ENVS, num_agents=AGENTS, observation_space=SPACE, actions=ACTIONS, max_episode_steps=9
    )
    mixed = MixedPolicy(policies[0], pool, assign(AGENTS, 0.5), spec, torch.device("cpu"))
    numbers = mixed.random_numbers(3, 0, 70)
    for step in range(70):
        obs = torch.tensor(observations(step)).float()
        expected = pool.act(obs[:, 2:].flatten(0, 1), numbers.npc[step]).view(ENVS, 2)
        assert torch.equal(torch.tensor(dual.act(observations(step))), expected)
        ends = torch.arange(ENVS) % 5 == step % 5
        dones = ends.unsqueeze(1).expand(ENVS, AGENTS)
        dual.end_step(np.zeros((ENVS, AGENTS)), ends.numpy())
        mixed.end_step(StepResult(rewards=obs, dones=dones, episode_ends=ends), torch.zeros(0), numbers.draw[step])
    assert set(pool.npc_of_env.tolist()) == {0, 1}


def test_arrays_come_back_as_the_kind_that_came(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.safetensors")
    dual, twin = open_dual(uri), open_dual(uri)
    mine = np.arange(ENVS * 2, dtype=np.int32).reshape(ENVS, 2)
    table = dual.fill(mine, observations())
    assert isinstance(table, np.ndarray)
    assert (table.dtype, table.shape) == (np.dtype(np.int32), (ENVS, AGENTS))
    assert np.array_equal(table[:, :2], mine)
    theirs = twin.act(torch.tensor(observations()))
    assert isinstance(theirs, Tensor)
    assert (theirs.dtype, theirs.shape) == (torch.int64, (ENVS, 2))
    assert table[:, 2:].tolist() == theirs.tolist()
    dual.end_step(np.zeros((ENVS, AGENTS)), np.zeros(ENVS, bool))
    flat = dual.fill(torch.tensor(mine).flatten(), torch.tensor(observations()))
    assert isinstance(flat, Tensor)
    assert flat.dtype == torch.int32
    assert flat[:, :2].tolist() == mine.tolist()


def test_read_only_and_strided_arrays_and_learners_gradients_do_no_harm(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.safetensors")
    dual, twin = open_dual(uri), open_dual(uri)
    strided = np.asfortranarray(observations().astype(np.float32))[::-1]
    strided.flags.writeable = False
    obs = torch.tensor(strided.copy(), requires_grad=True)
    actions = twin.act(obs)
    assert np.array_equal(dual.act(strided), actions.numpy())
    assert not actions.requires_grad
    rewards = np.ones((ENVS, AGENTS))
    rewards.flags.writeable = False
    dual.end_step(rewards, np.zeros((ENVS, AGENTS), np.float32))
    assert rewards.sum() == ENVS * AGENTS


def test_only_npc_rows_are_read_and_weights_never_change(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.safetensors")
    dual, twin = open_dual(node(uri, assignment="interleaved")), open_dual(node(uri, assignment="interleaved"))
    assert (dual.learner_seats, dual.npc_seats) == ([0, 2], [1, 3])
    (net,) = [npc.policy for npc in dual._pool.npcs]  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for step in range(3):
        obs = observations(step)
        expected = twin.act(obs)
        obs[:, dual.learner_seats] = np.nan
        assert np.array_equal(dual.act(obs), expected)
        for one in (dual, twin):
            one.end_step(np.zeros((ENVS, AGENTS)), np.zeros(ENVS))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.safetensors")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    play(open_dual(uri), 0, 4)
    assert torch.equal(torch.rand(3), expected)


def test_metrics_are_ours_worked_by_hand(tmp_path: Path) -> None:
    dual = open_dual(node(write(tmp_path / "a.safetensors"), training_agents_pct=0.25), num_envs=2)
    obs = np.zeros((2, AGENTS, FEATURES))
    dual.act(obs)
    dual.end_step([[3, 1, 1, 1], [1, 2, 0, 0]], [False, True])  # env 1: 1 against 2/3
    assert dual.take_metrics() == {
        "dual_policy/policy_a_agent_count": 1,
        "dual_policy/npc_agent_count": 3,
        "dual_policy/episodes": 1,
        "dual_policy/policy_a_reward": 1,
        "dual_policy/policy_a_reward_total": 1,
        "dual_policy/npc_reward": pytest.approx(2 / 3),
        "dual_policy/npc_reward_total": 2,
        "dual_policy/combined_reward": 0.75,
        "dual_policy/combined_reward_total": 3,
        "dual_policy/win_rate": 1,
    }
    dual.act(obs)
    dual.end_step([[0, 4, 4, 4], [0, 0, 0, 0]], np.ones((2, AGENTS)))  # 3 against 5; 0 against 0
    figures = dual.take_metrics()
    assert (figures["dual_policy/episodes"], figures["dual_policy/win_rate"]) == (2, 0.25)
    dual.act(obs)
    dual.end_step([[9, 0, 0, 0], [0, 0, 0, 0]], [1, 0], scores=[[0, 1, 1, 1], [0, 0, 0, 0]])
    assert dual.take_metrics()["dual_policy/win_rate"] == 0
    assert "dual_policy/win_rate" not in dual.take_metrics()


def test_states_start_anew_where_an_agent_is_done(tmp_path: Path) -> None:
    dual = open_dual(write(tmp_path / "c.safetensors", "counting"), num_envs=2)
    obs = np.zeros((2, AGENTS, FEATURES))
    dones = np.zeros((2, AGENTS), bool)
    dones[0, 3] = True
    taken = []
    for _ in range(3):
        taken.append(dual.act(obs).tolist())
        dual.end_step(np.zeros((2, AGENTS)), dones)
    assert taken == [[[0, 0], [0, 0]], [[1, 0], [1, 1]], [[2, 0], [2, 2]]]
    dual.start_episodes()
    assert dual.act(obs).tolist() == [[0, 0], [0, 0]]
    dual.end_step(np.ones((2, AGENTS)), np.ones(2))
    figures = dual.take_metrics()
    assert (figures["dual_policy/episodes"], figures["dual_policy/policy_a_reward"]) == (2, 1)


def test_an_env_keeps_its_npc_for_an_episode_and_matchmaking_chooses_the_next(tmp_path: Path) -> None:
    uris = [write(tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("easy", "hard"))]
    args = {"min_games": 1, "explore": 0.0}
    dual = open_dual(node(uris[0], pool=[uris[1]], matchmaking="pfsp", matchmaking_args=args), num_envs=64)
    pool = dual._pool
    assert pool is not None
    seen = pool.npc_of_env.clone()
    obs = np.zeros((64, AGENTS, FEATURES))
    dual.act(obs)
    dual.end_step(np.zeros((64, AGENTS)), np.zeros(64))
    assert torch.equal(pool.npc_of_env, seen)
    dual.act(obs)
    wins = (seen == 0).numpy()[:, None] * np.array([1, 1, 0, 0]) + (seen == 1).numpy()[:, None] * np.array([0, 0, 1, 1])
    dual.end_step(wins, np.ones(64))  # the learner wins against the easy one alone
    figures = dual.take_metrics()
    assert (figures["dual_policy/npc/easy/win_rate"], figures["dual_policy/npc/hard/win_rate"]) == (1, 0)
    dual.act(obs)
    dual.end_step(np.zeros((64, AGENTS)), np.ones(64))
    assert pool.npc_of_env.tolist() == [1] * 64


def test_a_resume_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    uris = [write(tmp_path / "a.safetensors"), write(tmp_path / "c.safetensors", "counting")]
    config = node(uris[0], pool=[uris[1]], matchmaking="adaptive")
    whole = open_dual(config)
    expected = play(whole, 0, 40)
    stopped = open_dual(config)
    play(stopped, 0, 17)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = open_dual(config)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert np.array_equal(np.stack(play(resumed, 17, 40)), np.stack(expected[17:]))
    assert resumed.take_metrics() == whole.take_metrics()
    state = stopped.state_dict()
    with pytest.raises(RunError, match="seed"):
        open_dual(config, seed=4).load_state_dict(state)
    with pytest.raises(RunError, match=r"'npcs': \['[0-9a-f]{12}', '[0-9a-f]{12}'\]"):
        open_dual(node(uris[1], pool=[uris[0]])).load_state_dict(state)
    write(tmp_path / "a.safetensors", seed=2)  # the name is the same, the bytes are not
    with pytest.raises(RunError, match="start a new run"):
        open_dual(config).load_state_dict(state)


def test_a_state_from_within_a_step_goes_on_there(tmp_path: Path) -> None:
    """The actions were taken: to take them again would move a recurrent net's state on twice."""
    uri = write(tmp_path / "c.safetensors", "counting")
    dual, resumed = open_dual(uri), open_dual(uri)
    dual.act(observations())
    resumed.load_state_dict(dual.state_dict())
    with pytest.raises(EnvError, match="call end_step between"):
        resumed.act(observations())
    for one in (dual, resumed):
        one.end_step(np.zeros((ENVS, AGENTS)), np.zeros(ENVS))
    assert np.array_equal(resumed.act(observations()), dual.act(observations()))


def test_the_lock_is_written_when_all_is_well_and_held_to(tmp_path: Path) -> None:
    uri, run_dir = write(tmp_path / "a.safetensors"), tmp_path / "run"
    with pytest.raises(SpacesError, match="actions"):
        open_dual(uri, run_dir=run_dir, actions=("stay", "left", "up"))
    assert not (run_dir / "npc.lock.json").exists()
    dual = open_dual(uri, run_dir=run_dir)
    locked = json.loads((run_dir / "npc.lock.json").read_text())["npcs"]
    assert [(one["name"], one["sha256"]) for one in locked] == [(one["name"], one["sha256"]) for one in dual.npcs]
    text = (run_dir / "npc.lock.json").read_bytes()
    open_dual(uri, run_dir=run_dir)
    assert (run_dir / "npc.lock.json").read_bytes() == text
    other = write(tmp_path / "b.safetensors", seed=2)
    with pytest.raises(NpcNotFoundError, match=r"not in npc\.lock\.json"):
        open_dual(other, run_dir=run_dir)
    open_dual(other, run_dir=tmp_path / "other")
    with pytest.raises(DigestError, match="pins other NPCs"):
        open_dual(node(uri, lock=str(tmp_path / "other" / "npc.lock.json")), run_dir=run_dir)
    write(tmp_path / "a.safetensors", seed=9)
    with pytest.raises(DigestError, match="sha256"):
        open_dual(uri, run_dir=run_dir)


def test_nets_of_ones_own_load_from_both_kinds_of_file(tmp_path: Path) -> None:
    net = Plain(SPACE, ACTIONS, width=5)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    save_policy(
        tmp_path / "deep" / "a.safetensors",
        net,
        agent="plain",
        args={"width": 5},
        observation_space=BOX,
        actions=ACTIONS,
        metadata={"epoch": 7},
    )
    obs = torch.tensor(observations()).float().flatten(0, 1)
    logits, values = net(obs)
    saved = load_policy_from_checkpoint(str(tmp_path / "deep" / "a.safetensors"), architectures=NETS)
    given = {"mine": partial(Plain, width=5)}
    bare = load_policy_from_checkpoint(
        str(tmp_path / "a.pt"), observation_space=SPACE, actions=ACTIONS, agent="mine", architectures=given
    )
    for policy in (saved, bare):
        answer = policy.forward_step(obs, torch.zeros(len(obs), 0))  # type: ignore[operator]
        assert torch.equal(answer[0], logits)
        assert torch.equal(answer[1], values.squeeze(1))
    latest = {"uri": str(tmp_path / "deep"), "type": "latest"}
    assert open_dual({"enabled": True, "checkpoint_npc": latest}).npcs[0]["metadata"]["epoch"] == 7
    dual = open_dual({"enabled": True, "checkpoint_npc": {"uri": str(tmp_path / "a.pt"), "agent": "mine"}},
                     architectures=given)  # fmt: skip
    assert dual.act(observations()).shape == (ENVS, 2)
    assert open_dual(write(tmp_path / "b.safetensors", "actor")).act(observations()).shape == (ENVS, 2)


def test_policies_are_bound_by_names(tmp_path: Path) -> None:
    uri = write(tmp_path / "c.safetensors", "counting")
    turned = open_dual(uri, actions=("right", "left", "stay"))
    assert set(turned.act(observations()).flatten().tolist()) == {2}  # its action 0, stay, is number 2 here


def test_observations_of_any_box_and_of_ours(tmp_path: Path) -> None:
    box = Box(0, 255, (2, 2), np.uint8)
    spaces = {"observation_space": box, "actions": Discrete(3)}
    save_policy(tmp_path / "a.safetensors", Plain(ObservationSpace(kind="vector", shape=(4,), features=tuple("abcd")),
                ACTIONS), agent="plain", **spaces)  # fmt: skip
    dual = open_dual(str(tmp_path / "a.safetensors"), **spaces)
    assert dual.act(np.zeros((ENVS, AGENTS, 2, 2), np.uint8)).shape == (ENVS, 2)
    medium = load_policy_from_checkpoint("builtin://arena/medium")
    assert medium.state_size > 0  # type: ignore[operator]
    from dual_policy_plugin.npc.resolver import resolve
    from dual_policy_plugin.policies.loading import read_description

    file = read_description(resolve("builtin://arena/medium"))
    assert file is not None
    arena = open_dual("builtin://arena/medium", observation_space=file.observation_space, actions=file.actions)
    codes = np.zeros((ENVS, AGENTS, 128), np.uint8)
    assert arena.act(codes).shape == (ENVS, 2)
    arena.end_step(np.zeros((ENVS, AGENTS)), np.zeros(ENVS))
    with pytest.raises(EnvError, match="dtype float32, expected uint8"):
        arena.act(codes.astype(np.float32))


def test_without_a_node_all_learn(tmp_path: Path) -> None:
    for config in (None, {"enabled": False}, node(write(tmp_path / "a.safetensors"), training_agents_pct=1.0)):
        dual = open_dual(config, run_dir=tmp_path / "run")
        assert (dual.learner_seats, dual.npc_seats, dual.npcs) == ([0, 1, 2, 3], [], [])
        mine = np.arange(ENVS * AGENTS).reshape(ENVS, AGENTS)
        assert np.array_equal(dual.fill(mine, observations()), mine)
        dual.end_step(np.ones((ENVS, AGENTS)), np.ones(ENVS))
        figures = dual.take_metrics()
        assert figures["dual_policy/policy_a_reward"] == 1
        assert not any("npc" in name or "win_rate" in name for name in figures)
    assert not (tmp_path / "run").exists()


def test_the_node_may_be_omegaconfs(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"dual": node(write(tmp_path / "a.safetensors"), training_agents_pct=0.75)})
    assert open_dual(cfg.dual, key="dual").npc_seats == [3]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"actions": 0}, ConfigError, "actions=0 is not possible"),
        ({"actions": Discrete(3, start=1)}, ConfigError, "number actions from 0"),
        ({"actions": BOX}, ConfigError, "use an env with Discrete actions"),
        ({"observation_space": Discrete(3)}, ConfigError, "use one agent's Box"),
        ({"num_envs": 0}, ConfigError, "num_envs=0 is not possible"),
        ({"num_agents": 1}, ConfigError, "training_agents_pct"),
        ({"architectures": {"mlp": Plain}}, ConfigError, "rename it"),
        ({"architectures": {"plain": "my.module.Net"}}, ConfigError, "is no callable"),
        ({"architectures": None}, CheckpointError, "agent=plain is not known"),
        ({"architectures": {"plain": lambda space, actions: nn.Identity()}}, CheckpointError, "unexpected"),
        ({"observation_space": Box(-1, 1, (5,))}, SpacesError, "it has 3 features, the env 5"),
        ({"device": "cuda:7"}, ConfigError, "device=cuda:7"),
        ({"seed": None}, ConfigError, "seed=None is not possible; use a whole number"),
        ({"actions": MultiDiscrete([3, 2])}, ConfigError, "use an env with Discrete actions"),
        ({"actions": range(3)}, ConfigError, "give each a name of its own, or pass the number"),
        ({"actions": ("stay", "left", "left")}, ConfigError, "give each a name of its own"),
        ({"actions": ()}, ConfigError, "give each a name of its own"),
        ({"run_dir": "/dev/null/run"}, RunError, "run_dir=/dev/null/run cannot be made: Not a directory; use"),
    ],
)
def test_what_is_wrong_ends_open(tmp_path: Path, changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        open_dual(write(tmp_path / "a.safetensors"), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"enabled": True}, r"my.place.checkpoint_npc.uri is not set"),
        (
            {"enabled": True, "self_play": {"snapshot_interval": 5}},
            r"my.place.self_play is done by `dual-policy train`",
        ),
        ({"enabled": True, "checkpoint_npc": {"uri": "gone.safetensors"}}, "gone.safetensors"),
        ({"enabled": True, "lr": 1}, r"my.place.lr is not a known key"),
    ],
)
def test_a_node_that_cannot_work_is_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DualPolicyError, match=message):
        open_dual(config, key="my.place")


def test_wrong_arrays_are_named_with_what_was_expected(tmp_path: Path) -> None:
    dual = open_dual(write(tmp_path / "a.safetensors"))
    obs, table = observations(), np.zeros((ENVS, AGENTS))
    with pytest.raises(EnvError, match=r"obs has shape \(6, 3\), expected .* = \(6, 4, 3\)"):
        dual.act(obs[:, 0])
    with pytest.raises(EnvError, match="obs is a list"):
        dual.act(obs.tolist())
    dual.act(obs)
    with pytest.raises(EnvError, match="call end_step between"):
        dual.act(obs)
    with pytest.raises(EnvError, match=r"rewards has shape \(6,\), expected \(6, 4\)"):
        dual.end_step(table[:, 0], table)
    with pytest.raises(EnvError, match=r"dones has shape \(4,\), expected \(6, 4\) or \(6,\)"):
        dual.end_step(table, table[0])
    with pytest.raises(EnvError, match="rewards holds"):
        dual.end_step(table.astype(str), table)
    with pytest.raises(EnvError, match="rewards is on meta, the NPCs on cpu"):
        dual.end_step(torch.zeros(ENVS, AGENTS, device="meta"), table)
    dual.end_step(table, table)
    with pytest.raises(EnvError, match=r"actions has shape \(6, 4\), expected .* \(6, 2\) or \(12,\)"):
        dual.fill(table.astype(int), obs)
    with pytest.raises(EnvError, match="whole numbers"):
        dual.fill(table[:, :2], obs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # at the import of torch.compile
def test_a_policy_file_that_would_not_load_is_not_written(tmp_path: Path) -> None:
    spaces = {"observation_space": BOX, "actions": ACTIONS}
    net = Plain(SPACE, ACTIONS)
    with pytest.raises(CheckpointError, match=r"write to .*a.safetensors"):
        save_policy(tmp_path / "a.pt", net, agent="plain", **spaces)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="plain numbers"):
        save_policy(tmp_path / "a.safetensors", net, agent="plain", args={"f": print}, **spaces)  # type: ignore[arg-type]
    for wrapped in (torch.compile(net), nn.DataParallel(net)):
        with pytest.raises(CheckpointError, match=r"pass the net itself$"):
            save_policy(tmp_path / "a.safetensors", wrapped, agent="plain", **spaces)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="agent=None is not possible"):
        save_policy(tmp_path / "a.safetensors", net, agent=None, **spaces)  # type: ignore[arg-type]
    net.body.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        save_policy(tmp_path / "a.safetensors", net, agent="plain", **spaces)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_step_costs_little(tmp_path: Path) -> None:
    """130 us beside the nets on one core, measured; 20 times as much would still pass here."""
    dual = open_dual(write(tmp_path / "a.safetensors"))
    obs, mine, table, ends = observations(), np.zeros((ENVS, 2), int), np.zeros((ENVS, AGENTS)), np.zeros(ENVS)
    times = []
    for _ in range(100):
        start = time.perf_counter()
        dual.fill(mine, obs)
        dual.end_step(table, ends)
        times.append(time.perf_counter() - start)
    assert sorted(times)[50] < 2.6e-3


def test_importing_the_package_stays_light() -> None:
    probe = (
        "import sys, dual_policy_plugin as d; print('torch' in sys.modules);"
        "d.ObservationSpace; print('torch' in sys.modules); d.DualPolicy; d.save_policy"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
