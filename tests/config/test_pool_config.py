"""Pools, matchmaking, self-play and schedules in the config: what is read, and what is refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import dual_policy_plugin
from dual_policy_plugin.config import DualPolicyConfig, PolicySource
from dual_policy_plugin.errors import ConfigError, DualPolicyError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.hydra_app.dual_policy_node import load_dual_policy
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR
from dual_policy_plugin.pool_config import (
    MATCHMAKING,
    MATCHMAKING_READERS,
    SCHEDULE_READERS,
    SCHEDULES,
    MatchmakingConfig,
    SelfPlayConfig,
    ShareSchedule,
)

DP = "trainer.dual_policy"
ARGS = f"{DP}.matchmaking_args"
PCT = f"{DP}.pct_schedule"
WEAK, MEDIUM, STRONG = (f"builtin://arena/{name}" for name in ("weak", "medium", "strong"))
ON = ["+dual_policy=checkpoint", f"{DP}.checkpoint_npc.uri={WEAK}"]
STEPS = [f"{PCT}.type=steps", f"{PCT}.at=[1000,5000]", f"{PCT}.values=[0.25,0.75]"]
CONF = Path(dual_policy_plugin.__file__).parent / "conf" / "dual_policy"


def compose_and_load(*overrides: str) -> DualPolicyConfig:
    """As the command line does."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load_config(compose("train", list(overrides))).trainer.dual_policy


def load(*words: str) -> DualPolicyConfig:
    """Of the node alone, which is quicker; the values are YAML."""
    node = OmegaConf.create({"enabled": True, "checkpoint_npc": {"uri": WEAK}})
    node.merge_with_dotlist([word.removeprefix(f"{DP}.") for word in words])
    return load_dual_policy(node)


def error_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*words)
    line = str(caught.value)
    assert "\n" not in line
    return line


# What is read


def test_a_pool_of_bare_texts_and_of_nodes() -> None:
    assert compose_and_load("+dual_policy=checkpoint", f"{DP}.pool=[{WEAK},{STRONG}]").sources == [
        PolicySource(uri=WEAK),
        PolicySource(uri=STRONG),
    ]
    node = f"{{uri:{MEDIUM},name:m,act:greedy,agent:mlp}}"
    older = "{checkpoint_path:runs/old,type:top,range:2,metric:win,filters:{run:a}}"
    assert compose_and_load(*ON, f"{DP}.pool=[{STRONG},{node},{older}]").sources == [
        PolicySource(uri=WEAK),
        PolicySource(uri=STRONG),
        PolicySource(uri=MEDIUM, name="m", act="greedy", agent="mlp"),
        PolicySource(uri="runs/old", type="top", range=2, metric="win", filters={"run": "a"}),
    ]
    assert load("pool=[]").sources == [PolicySource(uri=WEAK)]


def test_nothing_said_is_the_default() -> None:
    dual = load()
    assert (dual.matchmaking, dual.pool, dual.self_play, dual.pct_schedule) == (MatchmakingConfig(), [], None, None)


def test_weights_choose_their_matchmaking_themselves() -> None:
    pool = f"{DP}.pool=[{{uri: {MEDIUM},weight: 3}},{STRONG}]"
    dual = load(pool)
    assert dual.matchmaking == MatchmakingConfig(type="weights")
    assert [source.weight for source in dual.sources] == [None, 3.0, None]
    assert load(pool, f"{DP}.matchmaking=weights") == dual
    assert load(f"{DP}.checkpoint_npc.weight=2", f"{DP}.pool=[{MEDIUM}]").matchmaking.type == "weights"
    assert load(f"{DP}.checkpoint_npc.weight=0", f"{DP}.pool=[{MEDIUM}]").npc == PolicySource(uri=WEAK, weight=0)
    assert load(f"{DP}.pool=[{MEDIUM}]", f"{DP}.matchmaking=weights").matchmaking.type == "weights"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["matchmaking=uniform"], MatchmakingConfig()),
        (["matchmaking=latest_biased"], MatchmakingConfig(type="latest_biased")),
        (
            ["matchmaking=latest_biased", "matchmaking_args.latest_share=1"],
            MatchmakingConfig(type="latest_biased", latest_share=1.0),
        ),
        (
            ["matchmaking=pfsp", "matchmaking_args.form=variance", "matchmaking_args.min_games=1e2"],
            MatchmakingConfig(type="pfsp", form="variance", min_games=100),
        ),
        (
            ["matchmaking=adaptive", "matchmaking_args={band: [0.3,1],memory: 50,explore: 0}"],
            MatchmakingConfig(type="adaptive", band=[0.3, 1.0], memory=50, explore=0.0),
        ),
    ],
)
def test_matchmaking_and_its_settings(words: list[str], expected: MatchmakingConfig) -> None:
    assert load(*(f"{DP}.{word}" for word in words)).matchmaking == expected


def test_self_play_needs_no_npc() -> None:
    dual = compose_and_load("+dual_policy=self_play")
    assert (dual.enabled, dual.sources) == (True, [])
    assert dual.self_play == SelfPlayConfig(snapshot_interval=50)
    both = compose_and_load(*ON, f"{DP}.self_play.gate=0.6", f"{DP}.self_play.window=3")
    assert both.self_play == SelfPlayConfig(gate=0.6, window=3)
    assert both.sources == [PolicySource(uri=WEAK)]
    off = compose_and_load("+dual_policy=self_play", f"{DP}.enabled=false")
    assert off.self_play is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (STEPS, ShareSchedule(type="steps", at=[1000, 5000], values=[0.25, 0.75])),
        ([f"{PCT}.type=steps", f"{PCT}.at=[1e6]", f"{PCT}.values=[1]"],
         ShareSchedule(type="steps", at=[10**6], values=[1.0])),
        ([f"{PCT}.type=linear", f"{PCT}.end=1"], ShareSchedule(type="linear", end=1.0)),
        ([f"{PCT}.type=linear", f"{PCT}.end=0.25", f"{PCT}.until=1e6"],
         ShareSchedule(type="linear", end=0.25, until=10**6)),
        ([f"{PCT}.type=adaptive"], ShareSchedule(type="adaptive")),
        ([f"{PCT}.type=adaptive", f"{PCT}.low=0.5", f"{PCT}.high=0.9", f"{PCT}.band=[0,0.5]", f"{PCT}.min_episodes=1"],
         ShareSchedule(type="adaptive", low=0.5, high=0.9, band=[0.0, 0.5], min_episodes=1)),
    ],
)  # fmt: skip
def test_schedules(words: list[str], expected: ShareSchedule) -> None:
    assert load(*words).pct_schedule == expected
    assert load(*words, f"{DP}.enabled=false").pct_schedule is None


def test_a_schedule_may_begin_with_learners_alone() -> None:
    dual = load(f"{DP}.training_agents_pct=1", f"{PCT}.type=linear", f"{PCT}.end=0.5")
    assert dual.npc == PolicySource(uri=WEAK)


@pytest.mark.parametrize("name", ["off", "self_play"])
def test_the_three_nodes_have_the_same_keys(name: str) -> None:
    def keys(file: str) -> list[str]:
        node = OmegaConf.to_container(OmegaConf.load(CONF / f"{file}.yaml"))
        assert isinstance(node, dict)
        return [f"{key}.{sub}" for key, value in node.items() for sub in (value if isinstance(value, dict) else [""])]

    assert keys(name) == keys("checkpoint")


def test_every_setting_names_the_types_that_read_it() -> None:
    for cls, readers, types in (
        (MatchmakingConfig, MATCHMAKING_READERS, MATCHMAKING),
        (ShareSchedule, SCHEDULE_READERS, SCHEDULES),
    ):
        assert [field.name for field in dataclasses.fields(cls) if field.name != "type"] == list(readers)
        assert all(set(names) < set(types) for names in readers.values())


# What is refused


@pytest.mark.parametrize(
    ("words", "line"),
    [
        # the pool
        ([f"{DP}.pool=x"], f"{DP}.pool='x' is not possible; use a list of URIs, or of nodes like checkpoint_npc"),
        ([f"{DP}.pool=[1]"], f"{DP}.pool=[1] is not possible; use a list of URIs, or of nodes like checkpoint_npc"),
        ([f"{DP}.pool=[{{}}]"], f"{DP}.pool[0].uri is not set; name a policy, for example builtin://arena/medium"),
        ([f"{DP}.pool=[{WEAK},{{name: a}}]"],
         f"{DP}.pool[1].name='a' is set without a policy; set {DP}.pool[1].uri too"),
        ([f"{DP}.pool=[{{uri: a,policy_uri: b}}]"],
         f"{DP}.pool[0].uri='a' and {DP}.pool[0].policy_uri='b' are two spellings of one thing; keep uri and set "
         "policy_uri=null"),
        ([f"{DP}.pool=[{{uri: a,range: 2}}]"],
         f"{DP}.pool[0].range=2 is not possible; type=specific takes no range; use latest, top or rand"),
        ([f"{DP}.pool=[{{uri: a,act: best}}]"], f"{DP}.pool[0].act='best' is not possible; use sample or greedy"),
        ([f"{DP}.npc_type=scripted", f"{DP}.pool=[x.pt]"],
         f"{DP}.npc_type=scripted does not go with {DP}.pool[0].uri=x.pt; use builtin://arena/random, "
         "builtin://arena/forager or builtin://arena/hunter"),
        # weights
        ([f"{DP}.pool=[{MEDIUM},{{uri: {STRONG},weight: -1}}]"],
         f"{DP}.pool[1].weight=-1.0 is not possible; use a number of at least 0, or null"),
        ([f"{DP}.checkpoint_npc.weight=.inf"],
         f"{DP}.checkpoint_npc.weight=inf is not possible; use a number of at least 0, or null"),
        ([f"{DP}.pool=[{{uri: {STRONG},weight: .nan}}]"],
         f"{DP}.pool[0].weight=nan is not possible; use a number of at least 0, or null"),
        ([f"{DP}.pool=[{{uri: {STRONG},weight: much}}]"], f"{DP}.pool[0].weight='much' is not possible; use a number"),
        ([f"{DP}.checkpoint_npc.weight=0", f"{DP}.pool=[{{uri: {STRONG},weight: 0}}]"],
         f"{DP}.matchmaking=weights lets no NPC play, every weight is 0; give one a weight above 0"),
        ([f"{DP}.pool=[{{uri: {STRONG},weight: 2}}]", f"{DP}.matchmaking=pfsp"],
         f"{DP}.matchmaking=pfsp does not read the NPCs' weights; use weights, or remove them"),
        ([f"{DP}.checkpoint_npc.weight=2", f"{DP}.matchmaking=uniform"],
         f"{DP}.matchmaking=uniform does not read the NPCs' weights; use weights, or remove them"),
        # matchmaking
        ([f"{DP}.matchmaking=elo"],
         f"{DP}.matchmaking=elo is not possible; use uniform, weights, latest_biased, pfsp or adaptive"),
        ([f"{DP}.matchmaking.type=pfsp"],
         f"{DP}.matchmaking={{'type': 'pfsp'}} is not possible; use a name, and {ARGS}"),
        ([f"{DP}.matchmaking=latest_biased", f"{ARGS}.latest_share=2"],
         f"{ARGS}.latest_share=2.0 is not possible; use a value from 0 to 1"),
        ([f"{DP}.matchmaking=pfsp", f"{ARGS}.form=cubic"],
         f"{ARGS}.form=cubic is not possible; use squared or variance"),
        ([f"{DP}.matchmaking=pfsp", f"{ARGS}.min_games=0"],
         f"{ARGS}.min_games=0 is not possible; use a value from 1 to 1000000"),
        ([f"{DP}.matchmaking=pfsp", f"{ARGS}.memory=10"],
         f"{ARGS}.memory=10 is not possible; use min_games=20 at least"),
        ([f"{DP}.matchmaking=pfsp", f"{ARGS}.explore=.nan"],
         f"{ARGS}.explore=nan is not possible; use a value from 0 to 1"),
        ([f"{DP}.matchmaking=adaptive", f"{ARGS}.band=[0.6,0.4]"],
         f"{ARGS}.band=[0.6, 0.4] is not possible; use two win rates, the lower first, for example [0.4, 0.6]"),
        ([f"{DP}.matchmaking=adaptive", f"{ARGS}.band=[0.4]"],
         f"{ARGS}.band=[0.4] is not possible; use two win rates, the lower first, for example [0.4, 0.6]"),
        ([f"{DP}.matchmaking=adaptive", f"{ARGS}.band=0.4"], f"{ARGS}.band=0.4 is not possible; use a list of numbers"),
        ([f"{DP}.matchmaking=pfsp", f"{ARGS}.min_game=3"],
         f"{ARGS}.min_game is not a known key; did you mean {ARGS}.min_games?"),
        ([f"{DP}.matchmaking=pfsp", f"{ARGS}.latest_share=0.3"],
         f"{ARGS}.latest_share=0.3 is not read by matchmaking=pfsp; remove it, or use matchmaking=latest_biased"),
        ([f"{ARGS}.explore=0.1"],
         f"{ARGS}.explore=0.1 is not read by matchmaking=uniform; remove it, or use matchmaking=pfsp or adaptive"),
        # self-play
        ([f"{DP}.self_play.window=3"],
         f"{DP}.self_play.snapshot_interval=None is not possible; self-play needs snapshot_interval or gate; set one"),
        ([f"{DP}.self_play.gate=1.0"],
         f"{DP}.self_play.gate=1.0 is not possible; no interval of a win rate lies above it; use a win rate below 1"),
        ([f"{DP}.self_play.gate=0"], f"{DP}.self_play.gate=0.0 is not possible; use a value above 0, or null"),
        ([f"{DP}.self_play.snapshot_interval=0"],
         f"{DP}.self_play.snapshot_interval=0 is not possible; use a value above 0, or null"),
        ([f"{DP}.self_play.snapshot_interval=1.5"],
         f"{DP}.self_play.snapshot_interval=1.5 is not possible; use a whole number"),
        ([f"{DP}.self_play.gate=0.5", f"{DP}.self_play.window=0"],
         f"{DP}.self_play.window=0 is not possible; use a value from 1 to 512"),
        ([f"{DP}.self_play.gate=0.5", f"{DP}.training_agents_pct=1"],
         f"{DP}.training_agents_pct=1.0 leaves no agent to the snapshots of {DP}.self_play; use a share below 1, for "
         "example 0.5"),
        # schedules
        ([f"{PCT}.at=[1]"], f"{PCT}.at=[1] is set without a type; set {PCT}.type to steps, linear or adaptive"),
        ([f"{PCT}.type=cosine"], f"{PCT}.type=cosine is not possible; use steps, linear or adaptive"),
        ([f"{PCT}.type=steps"], f"{PCT}.at=[] is not possible; use ascending learner steps above 0"),
        ([f"{PCT}.type=steps", f"{PCT}.at=[0]", f"{PCT}.values=[0.5]"],
         f"{PCT}.at=[0] is not possible; use ascending learner steps above 0"),
        ([f"{PCT}.type=steps", f"{PCT}.at=[5,5]", f"{PCT}.values=[0.5,0.5]"],
         f"{PCT}.at=[5, 5] is not possible; use ascending learner steps above 0"),
        ([*STEPS, f"{PCT}.values=[0.5]"],
         f"{PCT}.values=[0.5] is not possible; use one share for each of the 2 steps in at"),
        ([*STEPS, f"{PCT}.values=[0.5,0]"],
         f"{PCT}.values[1]=0.0 is not possible; a share is above 0 and up to 1, for example 0.5"),
        ([f"{PCT}.type=linear"], f"{PCT}.end=None is not possible; linear needs the last share, for example 0.75"),
        ([f"{PCT}.type=linear", f"{PCT}.end=1.5"],
         f"{PCT}.end=1.5 is not possible; a share is above 0 and up to 1, for example 0.5"),
        ([f"{PCT}.type=linear", f"{PCT}.end=0.5", f"{PCT}.until=0"],
         f"{PCT}.until=0 is not possible; use learner steps above 0, or null"),
        ([f"{PCT}.type=adaptive", f"{PCT}.band=[0.5,0.5]"],
         f"{PCT}.band=[0.5, 0.5] is not possible; use two win rates, the lower first, for example [0.4, 0.6]"),
        ([f"{PCT}.type=adaptive", f"{PCT}.low=0.8", f"{PCT}.high=0.7"],
         f"{PCT}.low=0.8 is not possible; use a share below high=0.7"),
        ([f"{PCT}.type=adaptive", f"{PCT}.min_episodes=0"],
         f"{PCT}.min_episodes=0 is not possible; use a value from 1 to 1000000000"),
        ([f"{PCT}.type=linear", f"{PCT}.end=0.5", f"{PCT}.at=[1]"],
         f"{PCT}.at=[1] is not read by type=linear; remove it, or use type=steps"),
        ([*STEPS, f"{PCT}.high=1"], f"{PCT}.high=1 is not read by type=steps; remove it, or use type=adaptive"),
        ([*STEPS, f"{DP}.assignment=[0,2]"],
         f"{DP}.assignment=[0, 2] is not possible; a schedule changes the number of seats; use first, last or "
         "interleaved"),
        ([f"{PCT}.type=adaptive", f"{DP}.training_agents_pct=1"],
         f"{DP}.training_agents_pct=1.0 is not possible; an adaptive schedule begins between low=0 and high=1, with "
         "NPCs; use such a share"),
        ([f"{PCT}.type=adaptive", f"{PCT}.low=0.6"],
         f"{DP}.training_agents_pct=0.5 is not possible; an adaptive schedule begins between low=0.6 and high=1, with "
         "NPCs; use such a share"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_key_value_and_mend(words: list[str], line: str) -> None:
    assert error_of(*words) == line


@pytest.mark.parametrize(
    "word",
    [
        f"{DP}.pool=[{WEAK}]", f"{DP}.matchmaking=pfsp", f"{DP}.self_play.gate=0.6",
        f"{DP}.pct_schedule.type=adaptive", f"{DP}.checkpoint_npc.weight=1",
    ],
)  # fmt: skip
def test_what_is_set_without_the_switch_is_refused(word: str) -> None:
    line = error_of("enabled=null", "checkpoint_npc.uri=null", word)
    assert line.startswith(word.partition("=")[0])
    assert line.endswith(f"add {DP}.enabled=true (or false, to keep the setting unused)")


def test_a_pool_that_is_no_uri_is_refused() -> None:
    with pytest.raises(DualPolicyError, match=r"holds a user name or password") as caught:
        load("pool=[s3://x:hunter2@bucket/k]")
    assert "hunter2" not in str(caught.value)


# ${npc:...}


def test_a_pools_uris_are_left_to_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    words = [
        "run=old",
        "+dual_policy=checkpoint",
        f"{DP}.pool=['${{npc:old.safetensors}}',{{uri:'${{npc:${{run}}.safetensors}}',name:second}},"
        "{policy_uri:'${npc:old.safetensors}'},builtin://arena/weak,{uri:'${npc:old.safetensors}.1'}]",
        "evals.held_out=['${npc:old.safetensors}',builtin://arena/strong]",
        "evals.opponents=['${npc:old.safetensors}']",
    ]
    config, text = compose_config(words)
    uris = [source.uri for source in config.trainer.dual_policy.pool]
    assert uris == ["old.safetensors"] * 3 + [
        WEAK,
        f"file://{tmp_path}/old.safetensors.1",
    ]  # a part of a text is pinned
    assert config.trainer.dual_policy.pool[1].name == "second"
    assert config.evals.held_out == ["old.safetensors", STRONG]
    assert config.evals.opponents == ["old.safetensors"]
    pool = OmegaConf.select(OmegaConf.create(text), f"{DP}.pool")
    assert [pool[0], pool[1].uri, pool[2].policy_uri] == ["old.safetensors"] * 3
