"""Self-play: snapshots of the learner join the pool of their own run, one NPC an episode, nothing lost in a restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dual_policy_plugin.checkpoint import decode_policy
from dual_policy_plugin.config import Config
from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.errors import ConfigError, DigestError, RunError
from dual_policy_plugin.experience import allocate_experience
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.train import train
from dual_policy_plugin.types import StepResult
from tests.harness import CPU
from tests.ranks.scripts import run_ranks

DUAL = "trainer.dual_policy"
SMALL = [
    "device=cpu", "agent.hidden_size=16", "env.num_envs=8", "evals.episodes=0", "trainer.horizon=8", "report=false",
    "trainer.threads=1", "trainer.num_minibatches=2", "trainer.anneal_lr=false", "trainer.checkpoint_interval=1000",
    "wandb=off",
]  # fmt: skip
STEPS = 8 * 4 * 8
"""Learner steps of an iteration."""


def compose(
    path: Path, *overrides: str, run: str = "run", iterations: int = 8, episode: int = 16
) -> tuple[Config, str]:
    return compose_config(
        [
            "+dual_policy=self_play", *SMALL, f"train_dir={path}", f"run={run}", f"env.episode_steps={episode}",
            f"trainer.total_timesteps={iterations * STEPS}", f"{DUAL}.self_play.window=2",
            f"{DUAL}.self_play.snapshot_interval=2", *overrides,
        ]
    )  # fmt: skip


def play(path: Path, *overrides: str, **settings: Any) -> dict[str, Any]:
    config, text = compose(path, *overrides, **settings)
    return train(config, resolved_yaml=text)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def shares(line: dict[str, float]) -> dict[str, float]:
    """The NPCs' shares of an iteration, by name."""
    found = (name.removeprefix("dual_policy/npc/").partition("/") for name in line)
    return {name: line[f"dual_policy/npc/{name}/share"] for name, _, figure in found if figure == "share"}


def state_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The roster and the tensors of a run's state."""
    with safe_open(path / "state/training.safetensors", "pt") as file:
        return json.loads(file.metadata()["run"])["roster"], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def snapshots_of(path: Path) -> list[dict[str, str]]:
    return decode_policy(path.read_bytes(), str(path)).metadata["snapshots"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Recorder:
    """What the pool's methods saw: at each step, which NPC, with which weights, played in each env."""

    steps: list[list[tuple[str, float]]] = field(default_factory=list)
    """For each step and env: name of the NPC, and a sum over its weights."""
    ends: list[list[bool]] = field(default_factory=list)
    """For each step and env: whether the episode ended there."""
    begins_zeroed: list[bool] = field(default_factory=list)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        act, end_steps = NpcPool.act, NpcPool.end_steps

        def noting_act(pool: NpcPool, obs: Tensor, uniforms: Tensor) -> Tensor:
            sums = [float(pool.weights(k)["weight_ih"].double().sum()) for k in range(len(pool.npcs))]
            self.steps.append([(pool.npcs[k].name, sums[k]) for k in pool.npc_of_env.tolist()])
            if self.ends:
                states = pool.state.view(len(pool.npc_of_env), -1)[torch.tensor(self.ends[-1])]
                self.begins_zeroed.append(bool((states == 0).all()))
            return act(pool, obs, uniforms)

        def noting_ends(pool: NpcPool, dones: Tensor, episode_ends: Tensor, uniforms: Tensor) -> None:
            end_steps(pool, dones, episode_ends, uniforms)
            self.ends.append(episode_ends.tolist())

        monkeypatch.setattr(NpcPool, "act", noting_act)
        monkeypatch.setattr(NpcPool, "end_steps", noting_ends)

    def episodes(self) -> Iterator[list[tuple[str, float]]]:
        """Who played, step by step, in each episode of each env."""
        for env in range(len(self.steps[0])):
            episode = []
            for step, ends in zip(self.steps, self.ends, strict=True):
                episode.append(step[env])
                if ends[env]:
                    yield episode
                    episode = []
            yield episode


def test_a_run_without_any_npc_plays_against_its_own_past(tmp_path: Path) -> None:
    result = play(tmp_path, "trainer.keep_checkpoints=1", iterations=9)
    run = tmp_path / "run"
    seen = [shares(line) for line in lines(run)]
    assert set(seen[3]) == {"snapshot-0", "snapshot-2"}
    assert {"snapshot-4", "snapshot-6"} <= set(seen[8])
    assert "snapshot-0" not in seen[8]
    played = {name for one in seen for name, share in one.items() if share > 0}
    assert {"snapshot-0", "snapshot-2", "snapshot-4"} <= played
    assert not any("//" in name for line in lines(run) for name in line)
    assert result["npcs"] == []

    checkpoints = run / "checkpoints"
    roster, _ = state_of(run)
    known = {entry["name"]: entry["sha256"] for entry in [*roster["slots"], *roster["waiting"]] if entry["name"]}
    for name, digest in known.items():  # on the disk though one checkpoint is all that retention keeps
        assert sha256(checkpoints / f"model_{int(name[9:]):04d}.safetensors") == digest
    last = snapshots_of(checkpoints / "latest.safetensors")
    assert last[0]["name"] == "snapshot-4"
    assert all(known[one["name"]] == one["sha256"] for one in last if one["name"] in known)
    assert snapshots_of(checkpoints / "model_0000.safetensors") == []
    pinned = json.loads((run / "state/checkpoints.json").read_text())["pinned"]
    assert pinned == {"pool": sorted(int(name[9:]) for name in known)}


def test_a_snapshot_plays_with_the_weights_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.watch(monkeypatch)
    play(tmp_path, "trainer.keep_checkpoints=9", "trainer.learning_rate=0.01")
    played = {one for step in recorder.steps for one in step}
    assert len(played) >= 3
    for name, total in played:
        path = tmp_path / f"run/checkpoints/model_{int(name[9:]):04d}.safetensors"
        assert total == float(decode_policy(path.read_bytes(), "").tensors["weight_ih"].double().sum())
    assert len({total for _, total in played}) == len(played)  # it did learn meanwhile


def test_no_policy_is_overwritten_while_an_env_plays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.watch(monkeypatch)
    # episodes of 6 iterations and a snapshot after each: most of them wait
    play(tmp_path, f"{DUAL}.self_play.snapshot_interval=1", episode=48, iterations=24)
    episodes = list(recorder.episodes())
    assert len(episodes) > 8 * 4
    assert all(len(set(episode)) <= 1 for episode in episodes)
    assert len({episode[0] for episode in episodes if episode}) >= 5
    assert len(recorder.begins_zeroed) > 100
    assert all(recorder.begins_zeroed)
    roster, tensors = state_of(tmp_path / "run")
    assert roster["waiting"]
    names = [slot["name"] for slot in roster["slots"]]
    assert len(set(names)) == len(names)
    retired = [k for k, slot in enumerate(roster["slots"]) if slot["state"] == "retired"]
    assert (tensors["pool.npc_of_env"] == retired[0]).any()


@pytest.mark.parametrize("source", ["one NPC", pytest.param("no NPC", marks=pytest.mark.slow)])
def test_a_continued_run_is_the_run_that_never_stopped(tmp_path: Path, source: str) -> None:
    npc = [] if source == "no NPC" else [f"{DUAL}.checkpoint_npc.uri=builtin://arena/random"]
    settings = [
        f"{DUAL}.self_play.snapshot_interval=1", f"{DUAL}.matchmaking=pfsp", f"{DUAL}.matchmaking_args.min_games=1",
        "trainer.keep_checkpoints=20", f"{DUAL}.self_play.gate=0.9", *npc,
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    play(whole, *settings, iterations=11, episode=20)
    play(parts, *settings, iterations=6, episode=20)
    roster, tensors = state_of(parts / "run")
    retired = [k for k, slot in enumerate(roster["slots"]) if slot["state"] == "retired"]
    assert (tensors["pool.npc_of_env"] == retired[0]).any()
    assert roster["waiting"]
    play(parts, *settings, iterations=11, episode=20)
    assert lines(whole / "run") == lines(parts / "run")
    (roster, tensors), (other, others) = state_of(whole / "run"), state_of(parts / "run")
    assert roster == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    files = [path / "run/checkpoints/model_0011.safetensors" for path in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(snapshots_of(files[0])) == 3


def test_a_snapshot_that_is_gone_or_changed_stops_the_resume(tmp_path: Path) -> None:
    play(tmp_path)
    roster, _ = state_of(tmp_path / "run")
    name = next(slot["name"] for slot in roster["slots"] if slot["state"] == "playing")
    path = tmp_path / f"run/checkpoints/model_{int(name[9:]):04d}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DigestError, match=rf"{path}, the NPC {name} of this run, has sha256 .*; restore the file"):
        play(tmp_path, iterations=12)
    path.unlink()
    with pytest.raises(RunError, match=rf"{path}, the NPC {name} of this run, cannot be read \(No such file"):
        play(tmp_path, iterations=12)
    path.write_bytes(whole)
    play(tmp_path, iterations=12)
    assert lines(tmp_path / "run")[-1]["iteration"] == 12


def test_a_held_out_policy_may_be_no_snapshot_of_the_run(tmp_path: Path) -> None:
    play(tmp_path)
    snapshot = tmp_path / "run/checkpoints/model_0006.safetensors"
    held = [f"evals.held_out=[{snapshot}]", "evals.episodes=4"]
    with pytest.raises(ConfigError, match=rf"evals.held_out={snapshot} is the NPC snapshot-6 of this run"):
        play(tmp_path, *held, iterations=12)
    with pytest.raises(ConfigError, match=r"evals.held_out=.* is the NPC run.model_0006 of this run"):
        play(tmp_path, *held, f"trainer.initial_policy.uri={snapshot}", run="begins-as-it")
    npc = f"{DUAL}.checkpoint_npc.uri=builtin://arena/random"  # then the learner as it begins is no NPC
    result = play(tmp_path, *held, npc, f"trainer.initial_policy.uri={snapshot}", run="other", iterations=1)
    assert [one["opponent"] for one in result["evals"]] == ["random", "run.model_0006"]


def test_held_out_policies_alone_give_no_objective(tmp_path: Path) -> None:
    held = ["evals.held_out=[builtin://arena/forager]", "evals.episodes=4", "env.num_agents=8"]
    result = play(tmp_path, *held)
    assert result["evals"][0]["learner_return"] != result["evals"][0]["win_rate"]
    returns = [
        line["dual_policy/policy_a_reward"] for line in lines(tmp_path / "run") if "dual_policy/win_rate" in line
    ]
    assert result["objective"] == returns[-1] != result["evals"][0]["win_rate"]


def test_evaluations_against_nobody_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.evaluate_interval=2 has nobody to evaluate against.*evals.oppon"):
        play(tmp_path, "trainer.evaluate_interval=2", "evals.episodes=4")
    play(tmp_path, "trainer.evaluate_interval=2", "evals.episodes=0", iterations=1)


def test_snapshots_wait_for_nobody_while_all_agents_learn(tmp_path: Path) -> None:
    """A run that is stopped then goes on as the run that never stopped: no env plays the NPC it played before."""
    schedule = [
        f"{DUAL}.pct_schedule.type=steps", f"{DUAL}.pct_schedule.at=[1500,5000]",
        f"{DUAL}.pct_schedule.values=[1.0,0.5]", f"{DUAL}.self_play.snapshot_interval=1", "trainer.keep_checkpoints=30",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    play(whole, *schedule, iterations=26, episode=48)
    play(parts, *schedule, iterations=13, episode=48)
    assert lines(parts / "run")[-1]["dual_policy/policy_a_agent_count"] == 8.0
    names = [slot["name"] for slot in state_of(parts / "run")[0]["slots"]]
    assert not {"snapshot-0", "snapshot-1"} & set(names)  # retired, and not held up by the envs that played them
    play(parts, *schedule, iterations=26, episode=48)
    assert lines(whole / "run")[-1]["dual_policy/policy_a_agent_count"] == 4.0
    assert lines(whole / "run") == lines(parts / "run")
    assert state_of(whole / "run")[0] == state_of(parts / "run")[0]


def test_the_gate_makes_a_snapshot_too(tmp_path: Path) -> None:
    config = f"{DUAL}.self_play.snapshot_interval=null"
    play(tmp_path, config, f"{DUAL}.self_play.gate=0.05", episode=4, run="low")
    play(tmp_path, config, f"{DUAL}.self_play.gate=0.99", episode=4, run="high")
    names = [slot["name"] for slot in state_of(tmp_path / "low")[0]["slots"]]
    assert len([name for name in names if name]) >= 2
    assert [slot["name"] for slot in state_of(tmp_path / "high")[0]["slots"]] == ["snapshot-0", "", ""]


def test_pfsp_gives_the_stronger_npc_more_episodes(tmp_path: Path) -> None:
    pool = f"{DUAL}.pool=[{{uri:builtin://arena/medium,name:strong}},{{uri:builtin://arena/random,name:feeble}}]"
    fixed = [
        f"{DUAL}.self_play=null", pool, "env.num_envs=16", "trainer.learning_rate=1e-6", f"{DUAL}.matchmaking=pfsp",
    ]  # fmt: skip
    play(tmp_path, *fixed, iterations=2 * 50, episode=24)
    seen = lines(tmp_path / "run")
    episodes = {
        name: [line.get(f"dual_policy/npc/{name}/episodes", 0.0) for line in seen] for name in ("strong", "feeble")
    }
    wins = {
        name: sum(line.get(f"dual_policy/npc/{name}/win_rate", 0.0) * n for line, n in zip(seen, counts, strict=True))
        for name, counts in episodes.items()
    }
    early, late = slice(0, 3), slice(20, None)
    assert sum(episodes["strong"][early]) == sum(episodes["feeble"][early])  # spread evenly at the beginning
    rates = {name: wins[name] / sum(episodes[name]) for name in wins}
    assert rates["strong"] < rates["feeble"] - 0.1
    expected = (1 - rates["strong"]) ** 2 / sum((1 - rate) ** 2 for rate in rates.values())
    share = sum(episodes["strong"][late]) / sum(sum(counts[late]) for counts in episodes.values())
    assert share > 0.55
    assert share == pytest.approx(0.95 * expected + 0.025, abs=0.12)


def test_the_pool_goes_with_the_run_when_the_share_of_learners_changes(tmp_path: Path) -> None:
    schedule = [
        f"{DUAL}.pct_schedule.type=steps",
        f"{DUAL}.pct_schedule.at=[1000]",
        f"{DUAL}.pct_schedule.values=[0.25]",
    ]
    play(tmp_path, *schedule, iterations=10)
    seen = lines(tmp_path / "run")
    counts = [line["dual_policy/npc_agent_count"] for line in seen]
    assert (counts[0], counts[-1]) == (4.0, 6.0)
    after = {name for line in seen[counts.index(6.0) :] for name, share in shares(line).items() if share > 0}
    assert len(after) >= 2
    assert "snapshot-0" not in after


class Recorded:
    """An arena that keeps the actions of every step and where episodes ended."""

    def __init__(self, arena: Arena) -> None:
        self.actions: list[Tensor] = []
        self.ends: list[Tensor] = []
        self._step = arena.step
        arena.step = self.step  # type: ignore[method-assign]

    def step(self, actions: Tensor) -> StepResult:
        self.actions.append(actions.clone())
        result = self._step(actions)
        self.ends.append(result.episode_ends.clone())
        return result


def decided(arena: Arena, action: int) -> Npc:
    """A net that takes one action nearly always, whatever it sees."""
    torch.manual_seed(action)
    net = build_policy("fast", {"hidden_size": 16}, arena.spec.observation_space, arena.spec.actions)
    net.heads.bias.data[action] = 1000.0
    net.eval().requires_grad_(False).pack()
    return Npc(name=str(action), policy=net)


def test_the_log_of_a_rollout_shows_one_npc_per_episode() -> None:
    num_envs, horizon = 12, 40
    arena = Arena(ArenaConfig(num_agents=4, height=8, width=8, mines=2, altars=1, walls=2, episode_steps=7), num_envs)
    split = assign(4, 0.5)
    pool = NpcPool([decided(arena, k) for k in range(3)], num_envs=num_envs, num_npc=2, device=CPU)
    learner = build_policy("fast", {"hidden_size": 16}, arena.spec.observation_space, arena.spec.actions)
    mixed = MixedPolicy(learner, pool, split, arena.spec, CPU)
    metrics = EpisodeMetrics(arena.spec, split, pool, CPU, count_first=True, count_later=True)
    experience = allocate_experience(arena.spec, horizon=horizon, num_rows=24, state_size=32, device=CPU)
    recorded = Recorded(arena)
    arena.reset(3, stagger=True)
    start_rollouts(arena, mixed, experience)
    collect_rollout(arena, mixed, experience, metrics, mixed.random_numbers(1, 0, horizon))
    episodes = check_log(recorded, list(split.npc_seats))
    counted = torch.bincount(torch.tensor([npc for npc, has_ended in episodes if has_ended]), minlength=3)
    assert metrics.sums[:, 0].tolist() == counted.tolist()  # each episode stands at the NPC that played it
    assert counted.min() > 5


def check_log(recorded: Recorded, npc_seats: list[int]) -> list[tuple[int, bool]]:
    """Asserts that NPC seats never act by more than one NPC in an episode; gives (NPC, whether it ended) of each."""
    actions, ends = torch.stack(recorded.actions)[:, :, npc_seats], torch.stack(recorded.ends)
    episodes = []
    for env in range(ends.shape[1]):
        start = 0
        for last in [*ends[:, env].nonzero().squeeze(1).tolist(), len(ends) - 1]:
            played = set(actions[start : last + 1, env].flatten().tolist())
            if start <= last:
                assert len(played) == 1, f"env {env}, steps {start} to {last}: NPCs {played}"
                episodes.append((played.pop(), bool(ends[last, env])))
            start = last + 1
    return episodes


RANK = """
import json, sys
from pathlib import Path
from dual_policy_plugin import snapshots, train
from tests.rl.test_self_play import compose
note = []
advance = snapshots.advance_pool
def noting(roster, pool, run, ranks):
    advance(roster, pool, run, ranks)
    sums = [float(pool.weights(k)["weight_ih"].double().sum()) for k in range(len(pool.npcs))]
    note.append([roster.as_dict(), [npc.name for npc in pool.npcs], sums, pool.probabilities.tolist()])
    Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(note))
snapshots.advance_pool = noting
config, text = compose(Path(sys.argv[1]), iterations=2 * int(sys.argv[2]))
train.train(config, resolved_yaml=text)
"""


@pytest.mark.slow
def test_all_ranks_have_one_roster_and_one_pool(tmp_path: Path) -> None:
    for iterations in ("6", "10"):  # the second time a resume
        done = run_ranks(RANK, str(tmp_path), iterations)
        assert [process.returncode for process in done] == [0, 0], done
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        assert first == second
        assert len(first) == (1 + 6 if iterations == "6" else 4)  # one before the first iteration
    names, sums = first[-1][1:3]
    assert len([name for name in names if name]) >= 2
    assert len(set(sums)) > 1
