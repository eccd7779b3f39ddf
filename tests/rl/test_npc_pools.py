"""Runs whose NPCs come from selectors: a pool, pinned, locked, recorded, and held to after a restart."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dual_policy_plugin.checkpoint import decode_policy
from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
)
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.hydra_app.dual_policy_node import load_dual_policy
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.policies.npcs import load_npc
from dual_policy_plugin.pool_config import MatchmakingConfig
from dual_policy_plugin.train import train
from tests.ranks.scripts import run_ranks
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer


def config(path: Path, run: str, dual: DualPolicyConfig, *, opponents: tuple[str, ...] = (), **trainer: Any) -> Config:
    settings = {"total_timesteps": 512, "horizon": 8, "num_minibatches": 2, "threads": 1, "checkpoint_interval": 2}
    return Config(
        run=run,
        train_dir=path,
        device="cpu",
        agent=AgentConfig(args={"hidden_size": 16}),
        env=EnvConfig(num_envs=8, args={"episode_steps": 8}),
        evals=EvalsConfig(episodes=8, opponents=list(opponents)),
        trainer=TrainerConfig(**(settings | trainer), dual_policy=dual),
    )


def against(**source: Any) -> DualPolicyConfig:
    return DualPolicyConfig(enabled=True, training_agents_pct=0.5, npc=PolicySource(**source))


def lock_of(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "npc.lock.json").read_text())["npcs"]


def record_of(path: Path) -> list[dict[str, Any]]:
    """The NPCs as a checkpoint records them."""
    return decode_policy(path.read_bytes(), str(path)).metadata["npcs"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 0, 2 and 4."""
    path = tmp_path_factory.mktemp("trained")
    train(config(path, "first", DualPolicyConfig(), keep_checkpoints=9, total_timesteps=2048))
    return path / "first"


@pytest.fixture
def first(tmp_path: Path, trained: Path) -> Path:
    """A copy of that run, to be changed."""
    return shutil.copytree(trained, tmp_path / "first")


def test_a_selector_makes_a_pool_that_is_locked_recorded_and_kept(tmp_path: Path, first: Path) -> None:
    dual = against(uri=str(first), type="latest", range=2)
    second = tmp_path / "second"
    result = train(config(tmp_path, "second", dual), resolved_yaml="seed: 1\n")
    names = ["first.model_0004", "first.model_0002"]
    assert [npc["name"] for npc in result["npcs"]] == names
    assert [match["opponent"] for match in result["evals"]] == names
    lock = lock_of(second)
    assert [(entry["role"], entry["name"], entry["metadata"]["epoch"]) for entry in lock] == [
        ("npc", names[0], 4),
        ("npc", names[1], 2),
    ]
    assert {entry["requested"] for entry in lock} == {f"{first} type=latest range=2"}
    timeless = [{key: value for key, value in entry.items() if key != "when"} for entry in lock]
    for name in ("model_0000", "model_0002", "latest"):
        assert record_of(second / f"checkpoints/{name}.safetensors") == timeless
    written = OmegaConf.to_container(OmegaConf.load(second / "config.yaml"))
    assert written == {"seed": 1, "trainer": {"dual_policy": {"lock": {"version": 1, "npcs": lock}}}}

    (first / "checkpoints/model_0009.safetensors").write_bytes(
        (first / "checkpoints/model_0004.safetensors").read_bytes()
    )
    before = (second / "npc.lock.json").read_bytes()
    result = train(config(tmp_path, "second", dual, total_timesteps=1024), resolved_yaml="seed: 1\n")
    assert [npc["name"] for npc in result["npcs"]] == names  # not model_0009
    assert (second / "npc.lock.json").read_bytes() == before
    assert OmegaConf.to_container(OmegaConf.load(second / "config.yaml")) == written
    assert train(config(tmp_path, "third", dual))["npcs"][0]["name"] == "first.model_0009"

    gone = first / "checkpoints/model_0002.safetensors"
    gone.write_bytes((first / "checkpoints/model_0000.safetensors").read_bytes())
    with pytest.raises(DigestError, match=r"npc.lock.json pins first.model_0002 as sha256"):
        train(config(tmp_path, "second", dual, total_timesteps=2048), resolved_yaml="seed: 1\n")
    gone.unlink()
    with pytest.raises(NpcNotFoundError, match=r"model_0002.safetensors: no such file"):
        train(config(tmp_path, "second", dual, total_timesteps=2048), resolved_yaml="seed: 1\n")
    (second / "npc.lock.json").unlink()
    with pytest.raises(NpcNotFoundError, match=r"npc.lock.json is gone"):
        train(config(tmp_path, "second", dual, total_timesteps=2048), resolved_yaml="seed: 1\n")


def test_every_npc_of_a_pool_plays(tmp_path: Path, first: Path) -> None:
    train(config(tmp_path, "second", against(uri=str(first), type="all")))
    lines = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    for epoch in (0, 2, 4):
        assert sum(line.get(f"dual_policy/npc/first.model_{epoch:04d}/episodes", 0) for line in lines) > 0


@pytest.mark.parametrize("type", ["latest", "all"])
def test_the_newest_of_a_selector_is_the_latest(tmp_path: Path, first: Path, type: str) -> None:
    source = {"uri": str(first), "type": type} | ({"range": 3} if type == "latest" else {})
    dual = replace(against(**source), matchmaking=MatchmakingConfig(type="latest_biased", latest_share=1))
    train(config(tmp_path, "second", dual))
    lines = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    played = {key for line in lines for key in line if key.startswith("dual_policy/npc/") and key.endswith("/win_rate")}
    assert played == {"dual_policy/npc/first.model_0004/win_rate"}


def test_training_from_a_lock_takes_its_pins(tmp_path: Path, first: Path) -> None:
    dual = against(uri=str(first), type="top", metric="epoch")
    train(config(tmp_path, "second", dual), resolved_yaml="seed: 1\n")
    (first / "checkpoints/model_0009.safetensors").write_bytes(
        (first / "checkpoints/model_0004.safetensors").read_bytes()
    )
    written = OmegaConf.load(tmp_path / "second/config.yaml").trainer.dual_policy
    node = {"enabled": True, "checkpoint_npc": {"uri": str(first), "type": "top"}}
    locks = (
        {"lock": str(tmp_path / "second/npc.lock.json")},
        {"lock": OmegaConf.to_container(written)["lock"]},  # the config.yaml of a run is a lock too
    )
    for number, lock in enumerate(locks):
        result = train(config(tmp_path, f"again{number}", load_dual_policy(node | lock)))
        assert [npc["name"] for npc in result["npcs"]] == ["first.model_0004"]
        assert lock_of(tmp_path / f"again{number}") == lock_of(tmp_path / "second")  # `when` too
    other = load_dual_policy(node | locks[0] | {"checkpoint_npc": {"uri": "builtin://arena/weak"}})
    with pytest.raises(
        NpcNotFoundError, match=r"builtin://arena/weak: not in npc.lock.json, which has .*first type=top"
    ):
        train(config(tmp_path, "other", other))
    train(config(tmp_path, "later", load_dual_policy(node)))
    other = load_dual_policy(
        node | {"lock": {"version": 1, "npcs": [lock_of(tmp_path / "second")[0] | {"sha256": "0" * 64}]}}
    )
    with pytest.raises(DigestError, match=r"trainer.dual_policy.lock pins .* this run began with .*model_0009"):
        train(config(tmp_path, "later", other))
    with pytest.raises(NpcError, match=r"nowhere.json cannot be read"):
        train(config(tmp_path, "none", load_dual_policy(node | {"lock": "nowhere.json"})))


def test_where_the_learner_starts_and_whom_it_is_evaluated_against_are_locked_too(tmp_path: Path, first: Path) -> None:
    start = PolicySource(uri=str(first), type="latest")
    opponents = (str(first / "checkpoints/model_0000.safetensors"), str(first), "builtin://arena/random")
    wish = config(tmp_path, "second", against(uri="builtin://arena/random"), opponents=opponents, initial_policy=start)
    train(wish, resolved_yaml="")
    lock = lock_of(tmp_path / "second")
    assert [(entry["role"], entry["name"]) for entry in lock] == [
        ("npc", "random"),
        ("initial", "first.model_0004"),
        ("opponent", "first.model_0000"),
        ("opponent", "first.model_0004"),
        ("opponent", "random"),
    ]
    assert [npc["name"] for npc in record_of(tmp_path / "second/checkpoints/latest.safetensors")] == ["random"]
    shutil.copy(first / "checkpoints/model_0002.safetensors", first / "checkpoints/model_0011.safetensors")
    more = config(
        tmp_path, "second", against(uri="builtin://arena/random"), opponents=(*opponents, "builtin://arena/hunter"),
        initial_policy=start, total_timesteps=1024,
    )  # fmt: skip
    result = train(more, resolved_yaml="")
    assert [match["opponent"] for match in result["evals"]] == [
        "first.model_0000",
        "first.model_0004",
        "random",
        "hunter",
    ]
    assert lock_of(tmp_path / "second")[:5] == lock
    assert lock_of(tmp_path / "second")[5]["name"] == "hunter"


def test_an_npc_from_s3_plays_and_a_resume_needs_no_network(
    tmp_path: Path,
    first: Path,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    client = s3_server.client()
    client.create_bucket(Bucket="policies")
    for path in sorted((first / "checkpoints").glob("model_*")):
        client.upload_file(str(path), "policies", f"first/checkpoints/{path.name}")
    dual = against(uri="s3://policies/first/", type="latest", range=2)
    result = train(config(tmp_path, "second", dual))
    assert [npc["uri"] for npc in result["npcs"]] == [
        f"s3://policies/first/checkpoints/model_{epoch:04d}.safetensors" for epoch in (4, 2)
    ]
    s3_server.faults.add("", "status:503", times=None)
    assert train(config(tmp_path, "second", dual, total_timesteps=1024))["npcs"] == result["npcs"]


def test_an_npc_from_wandb_plays_and_the_log_says_which(
    tmp_path: Path,
    first: Path,
    wandb_server: WandbServer,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    with wandb_server.client():
        for epoch in (2, 4):
            data = (first / f"checkpoints/model_{epoch:04d}.safetensors").read_bytes()
            wandb_server.add_artifact("team", "arena", "old", files={"model.safetensors": data})
        result = train(config(tmp_path, "second", against(uri="wandb://team/arena/model/old")))
    assert result["npcs"][0]["uri"] == "wandb://team/arena/model/old:v1"
    assert "Loaded NPC policy from WandB artifact: team/arena/model/old:v1" in [
        one.getMessage() for one in caplog.records
    ]


def test_an_npc_is_placed_where_the_run_is(first: Path) -> None:
    wish = config(first.parent, "x", DualPolicyConfig())
    with closing(make_env(wish.env, device=torch.device("cpu"), num_workers=1)) as env:
        spec = env.spec
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        device = torch.device(name)
        source = PolicySource(uri=str(first))
        npc = load_npc(source, resolve(str(first)), spec, wish.agent, dtype=torch.float32, device=device)
        assert {tensor.device.type for tensor in npc.policy.state_dict().values()} == {name}
        assert not any(parameter.requires_grad for parameter in npc.policy.parameters())


RANK = """
import os, sys
from pathlib import Path
from dual_policy_plugin.config import *
from dual_policy_plugin.train import train
path = Path(sys.argv[1])
os.environ["HOME"] = str(path / f"home{os.environ['RANK']}")
dual = DualPolicyConfig(enabled=True, npc=PolicySource(uri="~/npc.safetensors"))
train(Config(run="two", train_dir=path, device="cpu", agent=AgentConfig(args={"hidden_size": 16}),
             env=EnvConfig(num_envs=8, args={"episode_steps": 8}), evals=EvalsConfig(episodes=0),
             trainer=TrainerConfig(total_timesteps=512, horizon=8, num_minibatches=2, threads=1, dual_policy=dual)))
"""


@pytest.mark.slow
def test_every_rank_takes_what_the_first_one_pinned(tmp_path: Path, first: Path) -> None:
    for rank, epoch in ((0, 4), (1, 2)):  # the same text means another file to each of them
        (tmp_path / f"home{rank}").mkdir()
        shutil.copy(first / f"checkpoints/model_{epoch:04d}.safetensors", tmp_path / f"home{rank}/npc.safetensors")
    done = run_ranks(RANK, str(tmp_path))
    assert [process.returncode for process in done] == [0, 0], done
    (entry,) = lock_of(tmp_path / "two")
    assert entry["uri"] == f"file://{tmp_path}/home0/npc.safetensors"
    assert all(f"file://{tmp_path}/home1" not in process.stderr for process in done)


def test_a_lock_that_was_edited_stops_the_resume(tmp_path: Path, first: Path) -> None:
    dual = against(uri=str(first / "checkpoints/model_0004.safetensors"))
    train(config(tmp_path, "second", dual), resolved_yaml="seed: 1\n")
    path = tmp_path / "second/npc.lock.json"
    other = first / "checkpoints/model_0002.safetensors"
    lock = json.loads(path.read_text())
    lock["npcs"][0] |= {
        "uri": other.resolve().as_uri(),
        "sha256": hashlib.sha256(other.read_bytes()).hexdigest(),
        "bytes": other.stat().st_size,
    }
    whole = path.read_text()
    path.write_text(json.dumps(lock))
    with pytest.raises(DigestError, match=r"npc.lock.json is not what this run began with"):
        train(config(tmp_path, "second", dual, total_timesteps=1024), resolved_yaml="seed: 1\n")
    path.write_text(whole)
    train(config(tmp_path, "second", dual, total_timesteps=1024), resolved_yaml="seed: 1\n")
