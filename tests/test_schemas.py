"""The schemas that we ship: real runs of every kind keep to them, and a broken file does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dual_policy_plugin.cli import main
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.train import train
from tests.curriculum.sweeps import FORAGER, RANDOM, sweep_words

DUAL = "trainer.dual_policy"
SMALL = [
    "device=cpu", "agent.hidden_size=16", "trainer.horizon=8", "trainer.threads=1", "trainer.num_minibatches=2",
    "trainer.checkpoint_interval=2", "evals.episodes=8", "report=false",
]  # fmt: skip
ARENA = [*SMALL, "env.num_envs=4", "env.episode_steps=8"]
AGAINST = ["+dual_policy=checkpoint", f"{DUAL}.checkpoint_npc.uri=builtin://arena/forager"]
KINDS = {
    "single": [*ARENA, *AGAINST, "trainer.total_timesteps=512"],
    "between": [*ARENA, *AGAINST, "trainer.total_timesteps=512", "trainer.evaluate_interval=1"],
    "pool": [*ARENA, *AGAINST, "trainer.total_timesteps=512", f"{DUAL}.pool=[builtin://arena/random]"],
    "self_play": [
        *(*ARENA, "+dual_policy=self_play", f"{DUAL}.self_play.snapshot_interval=1", "trainer.total_timesteps=768"),
        "evals.episodes=0",
    ],
    "alone": [*ARENA, *AGAINST, "trainer.total_timesteps=512", f"{DUAL}.training_agents_pct=1"],
    "without_episodes": [*ARENA, "env.episode_steps=500", "trainer.total_timesteps=256", "evals.episodes=0"],
    "held_out": [*ARENA, *AGAINST, "trainer.total_timesteps=256", "evals.held_out=[builtin://arena/random]"],
    "pettingzoo": [
        *(*SMALL, "env=pettingzoo", "env.id=simple_spread_v3", "env.num_envs=2", "trainer.num_workers=1"),
        *("agent=mlp", "agent.hidden_size=16", "trainer.total_timesteps=240", "evals.episodes=0"),
    ],
}


def schema(name: str) -> dict[str, Any]:
    return dict(json.loads((files("dual_policy_plugin") / f"schemas/{name}.schema.json").read_text()))


def errors(name: str, value: Any) -> list[str]:
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message}" for one in VALIDATORS[name].iter_errors(value)]


NAMES = ("result", "metrics", "timing", "npc.lock", "curriculum")
VALIDATORS = {name: Draft202012Validator(schema(name)) for name in NAMES}


def play(folder: Path, kind: str, *words: str) -> Path:
    config, text = compose_config([*KINDS[kind], f"train_dir={folder}", f"run={kind}", *words])
    train(config, resolved_yaml=text)
    return folder / kind


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def check_run(run: Path) -> None:
    """Every file of a run keeps to its schema."""
    assert errors("result", json.loads((run / "result.json").read_text())) == []
    for name in ("metrics", "timing"):
        found = lines(run, name)
        assert found
        assert [error for line in found for error in errors(name, line)] == []
    if (run / "npc.lock.json").exists():
        assert errors("npc.lock", json.loads((run / "npc.lock.json").read_text())) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_describes_every_field(name: str) -> None:
    found = schema(name)
    Draft202012Validator.check_schema(found)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert found["$id"] == f"urn:dual-policy:{name}"

    def fields(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, list):
            for one in node:
                yield from fields(one)
        elif isinstance(node, dict):
            for key in ("properties", "patternProperties"):
                yield from node.get(key, {}).items()
            for key, one in node.items():
                yield from fields(list(one.values()) if key in ("properties", "patternProperties") else one)

    for field, what in fields(found):
        assert what["description"].endswith("."), field


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_to_the_schemas(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "held_out":
        monkeypatch.setenv("METTA_HOURLY_COST", "2.5")
    run = play(tmp_path, kind)
    check_run(run)
    names = {name for line in lines(run, "metrics") for name in line}
    assert ("dual_policy/npc/random/win_rate" in names) == (kind == "pool")
    assert any(name.startswith("dual_policy/npc/") for name in names) == (kind in ("pool", "self_play"))
    assert ("evals/forager/low" in names) == (kind == "between")
    assert ("dual_policy/npc_agent_count" in names) == (kind not in ("alone", "without_episodes", "pettingzoo"))
    assert ("dual_policy/episodes" in names) == (kind != "without_episodes")
    assert (run / "npc.lock.json").exists() == (kind in ("single", "between", "pool", "held_out"))


def test_a_continued_run_keeps_to_them(tmp_path: Path) -> None:
    play(tmp_path, "single")
    run = play(tmp_path, "single", "trainer.total_timesteps=768")
    assert len(lines(run, "metrics")) == 6
    check_run(run)


@pytest.mark.slow
def test_a_curriculum_keeps_to_them(tmp_path: Path) -> None:
    assert main(sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]", "hydra.sweeper.max_attempts=1", "report=false")) in (
        0,
        1,
    )
    state = json.loads((tmp_path / "s/curriculum.json").read_text())
    assert state["gates"]
    assert errors("curriculum", state) == []
    for job in state["jobs"]:
        check_run(tmp_path / "s" / str(job["num"]))


def changed(change: Callable[[dict[str, Any]], object], value: dict[str, Any]) -> dict[str, Any]:
    broken = copy.deepcopy(value)
    change(broken)
    return broken


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("pool"), "pool")


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("result", lambda value: value.pop("objective"), "'objective' is a required property"),
    ("result", lambda value: value.update(extra=1), "'extra' was unexpected"),
    ("result", lambda value: value["evals"][0].update(win_rate=1.5), "evals/0/win_rate: 1.5 is greater than"),
    ("result", lambda value: value["npcs"][0].update(sha256="x"), "npcs/0/sha256: 'x' does not match"),
    ("result", lambda value: value.update(agent_step=1.5), "agent_step: 1.5 is not of type 'integer'"),
    ("metrics", lambda value: value.pop("losses/entropy"), "'losses/entropy' is a required property"),
    ("metrics", lambda value: value.update({"losses/policy_los": 1.0}), "'losses/policy_los' "),
    ("metrics", lambda value: value.update({"dual_policy/npc/random/loss": 1.0}), "'dual_policy/npc/random/loss' "),
    ("metrics", lambda value: value.update({"env/learner/hearts": 1.0}), "'env/learner/hearts' "),
    ("metrics", lambda value: value.update({"dual_policy/win_rate": "0.5"}), "'0.5' is not of type 'number'"),
    ("metrics", lambda value: value.update({"dual_policy/npc/random/share": 2}), "2 is greater than"),
    ("metrics", lambda value: value.pop("dual_policy/episodes"), "'dual_policy/episodes' is a dependency of"),
    ("timing", lambda value: value.pop("timing/starts"), "'timing/starts' is a required property"),
    ("timing", lambda value: value.update({"cost/hourly_total": 1.0}), "'cost/accrued_total' is a dependency of"),
    ("timing", lambda value: value.update({"charts/sps": 1.0}), "'charts/sps' was unexpected"),
    ("npc.lock", lambda value: value["npcs"][0].update(role="enemy"), "npcs/0/role: 'enemy' is not one of"),
    ("npc.lock", lambda value: value.update(version=2), "version: 1 was expected"),
]


@pytest.mark.parametrize(("name", "change", "error"), BROKEN)
def test_a_broken_file_is_refused(
    name: str, change: Callable[[dict[str, Any]], object], error: str, pool: Path
) -> None:
    value = lines(pool, name)[-2] if name in ("metrics", "timing") else json.loads((pool / f"{name}.json").read_text())
    assert errors(name, value) == []
    found = errors(name, changed(change, value))
    assert any(error in one for one in found), found
