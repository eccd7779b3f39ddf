"""load_config: every key and type checked, older spellings mapped, defaults filled in, nothing ignored."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dual_policy_plugin.config import Config, EvalsConfig, PolicySource, TrainerConfig, WandbConfig
from dual_policy_plugin.errors import ConfigError, NpcError
from dual_policy_plugin.hydra_app import dual_policy_node
from dual_policy_plugin.hydra_app.dual_policy_node import load_dual_policy
from dual_policy_plugin.hydra_app.interpolation import register_resolver
from dual_policy_plugin.hydra_app.loading import known_keys, load_config, read_hourly_cost
from dual_policy_plugin.hydra_app.nodes import nearest_key
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR

register_resolver()  # as Hydra does when it finds the plugin, which no test here makes it do

NPC = "builtin://arena/weak"
DP = "trainer.dual_policy"
ON = ["+dual_policy=checkpoint", f"{DP}.checkpoint_npc.uri={NPC}"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METTA_HOURLY_COST", raising=False)
    dual_policy_node._warn_older.cache_clear()


def load(*overrides: str) -> Config:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load_config(compose("train", list(overrides)))


def load_node(node: dict[str, Any]) -> Config:
    return load_config(OmegaConf.create(node))


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_yaml_defaults_are_those_of_the_dataclasses() -> None:
    config = load()
    assert config.trainer == TrainerConfig()
    assert config.evals == EvalsConfig()
    assert dataclasses.replace(config.wandb, project=None) == WandbConfig()
    assert dataclasses.replace(config, wandb=WandbConfig()) == Config()


def test_an_empty_config_is_the_default_run() -> None:
    assert load_config(OmegaConf.create({})) == Config()
    assert load_config({"trainer": None, "agent": None, "env": {"num_agents": None}}) == Config()


def test_trainer_yaml_lists_every_key_of_the_dataclasses() -> None:
    node = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "trainer" / "trainer.yaml"))
    assert isinstance(node, dict)
    assert list(node) == [*(f.name for f in dataclasses.fields(TrainerConfig))]
    older = [old for olds in dual_policy_node.OLDER_SPELLINGS.values() for old in olds]
    assert sorted(set(node["dual_policy"]) - set(older)) == sorted(dual_policy_node.DUAL_POLICY_KEYS)
    assert sorted(set(node["dual_policy"]["checkpoint_npc"]) - set(older)) == sorted(dual_policy_node.SOURCE_KEYS)
    assert sorted(set(node["initial_policy"]) - set(node["dual_policy"]["checkpoint_npc"])) == ["keep_optimizer"]


@pytest.mark.parametrize(("env", "settings"), [("arena", "ArenaConfig"), ("mettagrid", "MettagridConfig")])
def test_env_yaml_lists_every_setting_of_the_env(env: str, settings: str) -> None:
    if env == "arena":
        from dual_policy_plugin.envs.arena_config import ArenaConfig as Settings
    else:
        from dual_policy_plugin.envs.mettagrid import MettagridConfig as Settings  # type: ignore[assignment]
    assert Settings.__name__ == settings
    names = [str(name) for name in OmegaConf.load(CONFIG_DIR / "env" / f"{env}.yaml")]
    assert names == ["name", "num_envs", *(field.name for field in dataclasses.fields(Settings))]


def test_values_reach_their_fields() -> None:
    config = load(
        *ON, f"{DP}.training_agents_pct=0.6", f"{DP}.assignment=[0,3]", f"{DP}.checkpoint_npc.act=greedy", "agent=mlp",
        "agent.hidden_size=32", "env.num_agents=10", "env.num_envs=7", "run=a", "seed=5", "device=cpu", "train_dir=x/y",
        "trainer.total_timesteps=1e6", "trainer.gamma=1", "evals.opponents=[builtin://arena/random]", "wandb=offline",
    )  # fmt: skip
    assert config.trainer.dual_policy.training_agents_pct == 0.6
    assert config.trainer.dual_policy.assignment == [0, 3]
    assert config.trainer.dual_policy.npc == PolicySource(uri=NPC, act="greedy")
    assert (config.agent.name, config.agent.args) == ("mlp", {"hidden_size": 32})
    assert (config.env.num_envs, config.env.args) == (7, {"num_agents": 10})
    assert (config.run, config.seed, config.device, config.train_dir) == ("a", 5, "cpu", Path("x/y"))
    assert config.trainer.total_timesteps == 1_000_000
    assert isinstance(config.trainer.total_timesteps, int)
    assert isinstance(config.trainer.gamma, float)
    assert config.evals.opponents == ["builtin://arena/random"]
    assert config.wandb.mode == "offline"


def test_off_is_off_and_all_learners_need_no_npc() -> None:
    assert load("+dual_policy=off").trainer.dual_policy.enabled is False
    assert load(*ON, f"{DP}.enabled=false").trainer.dual_policy.npc is None
    alone = load(*ON, f"{DP}.training_agents_pct=1").trainer.dual_policy
    assert (alone.enabled, alone.npc, alone.training_agents_pct) == (True, None, 1.0)
    assert load("+dual_policy=checkpoint", f"{DP}.training_agents_pct=1.0").trainer.dual_policy.npc is None


@pytest.mark.parametrize("older", ["checkpoint_path", "policy_uri"])
def test_an_older_name_of_uri_works_and_is_warned_about_once(older: str, caplog: pytest.LogCaptureFixture) -> None:
    words = ["+dual_policy=checkpoint", f"{DP}.checkpoint_npc.{older}=a/b.pt", f"{DP}.policy_a_percentage=0.25"]
    with caplog.at_level(logging.WARNING):
        first, second = load(*words), load(*words)
    assert first.trainer.dual_policy.npc == PolicySource(uri="a/b.pt")
    assert first.trainer.dual_policy.training_agents_pct == 0.25
    assert first == second
    assert [record.getMessage() for record in caplog.records] == [
        f"{DP}.policy_a_percentage is an older name; write {DP}.training_agents_pct",
        f"{DP}.checkpoint_npc.{older} is an older name; write {DP}.checkpoint_npc.uri",
    ]


def test_two_spellings_at_once_are_refused() -> None:
    line = error_of(*ON, f"{DP}.checkpoint_npc.checkpoint_path={NPC}")
    assert f"{DP}.checkpoint_npc.uri='{NPC}' and {DP}.checkpoint_npc.checkpoint_path='{NPC}'" in line
    assert "two spellings of one thing" in line
    line = error_of(*ON, f"{DP}.policy_a_percentage=0.5", f"{DP}.training_agents_pct=0.5")
    assert "training_agents_pct=0.5 and trainer.dual_policy.policy_a_percentage=0.5" in line
    line = error_of("trainer.initial_policy.policy_uri=a", "trainer.initial_policy.checkpoint_path=b")
    assert "trainer.initial_policy.checkpoint_path='b' and trainer.initial_policy.policy_uri='a'" in line


@pytest.mark.parametrize("pct", ["0", "-0.5", "1.01", "nan", "inf", "abc", "true", "[0.5]", "50"])
def test_a_fraction_that_cannot_be_is_refused(pct: str) -> None:
    line = error_of(*ON, f"{DP}.training_agents_pct={pct}")
    assert line.startswith(f"{DP}.training_agents_pct=")
    assert "; " in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([f"{DP}.checkpoint_npc.type=newest"], ["checkpoint_npc.type=newest", "specific, latest, top, rand or all"]),
        ([f"{DP}.checkpoint_npc.range=3"], ["checkpoint_npc.range=3", "use latest, top or rand"]),
        ([f"{DP}.checkpoint_npc.range=0"], ["checkpoint_npc.range=0", "from 1 to 1024"]),
        ([f"{DP}.checkpoint_npc.metric=reward"], ["checkpoint_npc.metric=reward", "use type=top"]),
        ([f"+{DP}.checkpoint_npc.filters.a=[1]"], ["checkpoint_npc.filters.a=[1]", "the value it must have"]),
        ([f"{DP}.checkpoint_npc.name=a/b"], ["checkpoint_npc.name='a/b'", "64 letters, digits"]),
        ([f"{DP}.pool=[{{ur:x}}]"], [f"{DP}.pool[0].ur", "did you mean", "uri"]),
        ([f"{DP}.pool=[{{name:x}}]"], [f"{DP}.pool[0].name='x'", "set trainer.dual_policy.pool[0].uri too"]),
        ([f"{DP}.matchmaking=elo"], [f"{DP}.matchmaking=elo", "uniform, weights, latest_biased, pfsp or adaptive"]),
        ([f"{DP}.lock=[a]"], ["lock=['a']", "a path"]),
        ([f"{DP}.checkpoint_npc.act=best"], ["act='best'", "sample or greedy"]),
        ([f"{DP}.npc_type=robot"], ["npc_type='robot'", "checkpoint or scripted"]),
        ([f"{DP}.npc_type=scripted", f"{DP}.checkpoint_npc.uri=x.pt"], ["npc_type=scripted", "builtin://arena/hunter"]),
        ([f"{DP}.assignment=middle"], ["assignment='middle'", "first, last, interleaved"]),
        ([f"{DP}.assignment=[a]"], ["assignment[0]='a'", "a whole number"]),
        ([f"{DP}.enabled=maybe"], ["enabled='maybe'", "true or false"]),
        ([f"{DP}.checkpoint_npc.uri=[a]"], ["checkpoint_npc.uri=['a']", "text"]),
        ([f"{DP}.checkpoint_npc.uri=null"], ["checkpoint_npc.uri is not set", "builtin://arena/medium"]),
        ([f"{DP}.checkpoint_npc.uri='${{npc:x}}'"], [f"{DP}.checkpoint_npc.uri", "x: no such file"]),
        ([f"{DP}.checkpoint_npc.uri=${{nowhere}}"], [f"{DP}.checkpoint_npc.uri", "nowhere"]),
        ([f"+{DP}.checkpoint_npc.ury=x"], [f"{DP}.checkpoint_npc.ury", f"did you mean {DP}.checkpoint_npc.uri?"]),
        ([f"+{DP}.training_agent_pct=1"], [f"did you mean {DP}.training_agents_pct?"]),
        (["+trainer.horizn=1"], ["trainer.horizn", "did you mean trainer.horizon?"]),
        (["+horizon=1"], ["horizon", "did you mean trainer.horizon?"]),
        (["+evals.zzz=1"], ["evals.zzz", "in evals there are episodes, held_out, opponents"]),
        (["cmd=evaluate"], ["cmd='evaluate'", "cmd: train"]),
        (["cmd=demo"], ["cmd='demo'", "dual-policy demo"]),
        (["trainer.horizon=abc"], ["trainer.horizon='abc'", "a whole number"]),
        (["trainer.horizon=2.5"], ["trainer.horizon=2.5", "a whole number"]),
        (["trainer.horizon=0"], ["trainer.horizon=0", "from 1 to 4096"]),
        (["trainer.anneal_lr=1"], ["trainer.anneal_lr=1", "true or false"]),
        (["trainer.target_kl=x"], ["trainer.target_kl='x'", "a number"]),
        (["seed=-1"], ["seed=-1", "from 0"]),
        (["env.num_envs=0"], ["env.num_envs=0", "from 1 to 65536"]),
        (["trainer.dual_policy=checkpoint"], ["trainer.dual_policy='checkpoint'", "keys of its own"]),
        (["evals.opponents=x"], ["evals.opponents='x'", "a list of texts"]),
        (["run=???"], ["run", "Missing mandatory value"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_key_value_and_mend(words: list[str], parts: list[str]) -> None:
    line = error_of(*ON, *words)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "words", [["type=specific", "range=1", "metric=epoch"], ["filters={}"], ["type=null", "range=null"]]
)
def test_selectors_that_say_what_is_so_anyway_are_accepted(words: list[str]) -> None:
    config = load(*ON, *(f"{DP}.checkpoint_npc.{word}" for word in words))
    assert config.trainer.dual_policy.npc == PolicySource(uri=NPC)


def test_a_setting_of_the_npc_without_the_switch_is_refused() -> None:
    line = error_of(f"{DP}.checkpoint_npc.uri={NPC}")
    assert f"{DP}.checkpoint_npc.uri='{NPC}' is set" in line
    assert f"add {DP}.enabled=true" in line
    assert f"{DP}.training_agents_pct=0.4 is set" in error_of(f"{DP}.training_agents_pct=0.4")
    assert load(f"{DP}.checkpoint_npc.uri={NPC}", f"{DP}.enabled=true").trainer.dual_policy.npc is not None


def test_initial_policy() -> None:
    key = "trainer.initial_policy"
    assert load().trainer.initial_policy is None
    config = load(f"{key}.checkpoint_path=a.safetensors", f"{key}.keep_optimizer=true", f"{key}.agent=mlp")
    assert config.trainer.initial_policy == PolicySource(uri="a.safetensors", agent="mlp", keep_optimizer=True)
    assert f"{key}.keep_optimizer=True is set without a checkpoint" in error_of(f"{key}.keep_optimizer=true")
    assert f"{key}.act='greedy' has no effect" in error_of(f"{key}.uri=a", f"{key}.act=greedy")
    assert load(f"{key}.uri=a", f"{key}.type=latest").trainer.initial_policy == PolicySource(uri="a", type="latest")
    assert "names several; a learner starts from one" in error_of(f"{key}.uri=a", f"{key}.type=top", f"{key}.range=2")
    assert f"{key}.type='top' is set without a policy" in error_of(f"{key}.type=top")


def test_a_selector_is_read() -> None:
    node = f"{DP}.checkpoint_npc"
    config = load(*ON, f"{node}.type=top", f"{node}.range=3", f"{node}.metric=win", f"+{node}.filters.run=a")
    assert config.trainer.dual_policy.npc == PolicySource(
        uri=NPC, type="top", range=3, metric="win", filters={"run": "a"}
    )
    assert load(*ON, f"{DP}.lock=a/npc.lock.json").trainer.dual_policy.lock == Path("a/npc.lock.json")


def test_a_password_in_a_uri_is_refused_before_anything_is_written() -> None:
    with pytest.raises(NpcError, match="holds a user name or password") as caught:
        load(*ON, f"{DP}.checkpoint_npc.uri='s3://x:hunter2@bucket/k'")
    assert "hunter2" not in str(caught.value)


def test_a_user_file_without_its_header_is_refused() -> None:
    for name in ("user", "__global__"):
        with pytest.raises(ConfigError, match="first line") as caught:
            load_node({name: {"run": "x"}})
        assert "# @package _global_" in str(caught.value)


def test_yaml_off_and_numbers_as_names() -> None:
    assert load_node({"wandb": {"mode": False}}).wandb.mode == "off"
    assert load_node({"wandb": False}).wandb.mode == "off"
    assert load_node({"run": 123}).run == "123"
    with pytest.raises(ConfigError, match=r"wandb.mode=True is not possible; use text"):
        load_node({"wandb": True})
    with pytest.raises(ConfigError, match=r"run=1.5 is not possible"):
        load_node({"run": 1.5})


def test_hourly_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_hourly_cost(None) is None
    assert read_hourly_cost(" ") is None
    assert read_hourly_cost("2.5") == 2.5
    for text in ("abc", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"METTA_HOURLY_COST={text} is not possible"):
            read_hourly_cost(text)
    monkeypatch.setenv("METTA_HOURLY_COST", "3")
    hourly_cost = load().hourly_cost
    assert hourly_cost is not None
    assert math.isclose(hourly_cost, 3.0)


def test_the_node_alone_loads_for_a_foreign_app() -> None:
    node = OmegaConf.load(Path(dual_policy_node.__file__).parents[1] / "conf" / "dual_policy" / "checkpoint.yaml")
    node.checkpoint_npc.uri = NPC
    config = load_dual_policy(node)  # type: ignore[arg-type]
    assert (config.enabled, config.npc, config.training_agents_pct) == (True, PolicySource(uri=NPC), 0.5)


def test_nearest_key_prefers_siblings_then_the_same_name_elsewhere() -> None:
    keys = known_keys()
    assert nearest_key("trainer.learning_rat", keys) == "trainer.learning_rate"
    assert nearest_key("trainer.uri", keys) == "trainer.dual_policy.checkpoint_npc.uri"
    assert nearest_key("checkpoint_npc.type", keys) == "trainer.dual_policy.checkpoint_npc.type"
    assert nearest_key("initial_policy.uri", keys) == "trainer.initial_policy.uri"
    assert nearest_key("qqqqqqqq", keys) is None
