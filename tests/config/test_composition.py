"""Our app's groups compose in every form that a user's file takes; quoting survives a shell and Hydra's grammar."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR, quote_override

URI = "wandb://team/project/model/run:v7"
GROUPS = CONFIG_DIR.parent / "dual_policy_plugin" / "conf" / "dual_policy"
BODY = f"""
run: my_experiment
cmd: train
trainer:
  dual_policy: {{enabled: true, training_agents_pct: 0.25, checkpoint_npc: {{uri: "{URI}"}}}}
"""


@pytest.mark.parametrize(
    ("entries", "agent"),
    [
        (["/agent/fast@agent", "/trainer/trainer", "/sim/all@evals", "/wandb/off"], "fast"),
        (["/common", "/agent/mlp", "/trainer/trainer", "/sim/all@evals", "/wandb/off", "_self_"], "mlp"),
        (["_self_", "override /agent: mlp", "override /wandb: 'off'"], "mlp"),
        (["override /trainer: trainer", "override /sim@evals: all", "override /env: arena"], "fast"),
        ([], "fast"),
    ],
)
def test_the_forms_of_a_users_file_compose(tmp_path: Path, entries: list[str], agent: str) -> None:
    (tmp_path / "user").mkdir()
    defaults = "defaults:\n" + "".join(f"  - {entry}\n" for entry in entries) if entries else ""
    (tmp_path / "user" / "mine.yaml").write_text(f"# @package _global_\n{defaults}{BODY}", "utf-8")
    config, _ = compose_config([f"hydra.searchpath=[file://{tmp_path}]", "+user=mine"])
    assert config.run == "my_experiment"
    assert config.trainer.dual_policy.npc is not None
    assert config.trainer.dual_policy.npc.uri == URI
    assert config.trainer.dual_policy.training_agents_pct == 0.25
    assert (config.agent.name, config.env.name, config.wandb.mode) == (agent, "arena", "off")
    assert config.evals.episodes == 1024


@pytest.mark.parametrize("sim", ["sim: all@evals", "sim@evals: all", "/sim/all@evals"])
def test_a_primary_config_of_the_users_own_composes(tmp_path: Path, sim: str) -> None:
    groups = ["common", "agent: fast", "env: arena", "trainer: trainer", sim, 'wandb: "off"', "optional user: null"]
    lines = "".join(f"  - {entry}\n" for entry in [*groups, "_self_"])
    (tmp_path / "job.yaml").write_text(f"defaults:\n{lines}run: own\nevals: {{episodes: 6}}\n", "utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = load_config(compose("job", [f"hydra.searchpath=[file://{CONFIG_DIR}]"]))
    assert (config.run, config.evals.episodes, config.trainer.horizon) == ("own", 6, 32)
    assert config.trainer.dual_policy.enabled is False


def test_every_option_of_every_group_composes_and_loads() -> None:
    seen = []
    for group in ("agent", "env", "wandb", "user"):
        for file in sorted((CONFIG_DIR / group).glob("*.yaml")):
            config, text = compose_config([f"{'+' if group == 'user' else ''}{group}={file.stem}"])
            seen.append(f"{group}/{file.stem}")
            if group in ("agent", "env"):
                assert getattr(config, group).name == file.stem
            if group == "wandb":
                assert config.wandb.mode == file.stem
            if group == "user":
                assert config.trainer.dual_policy.npc is not None
                assert config.trainer.dual_policy.npc.uri in text
    assert set(seen) >= {
        "agent/fast", "agent/mlp", "env/arena", "env/mettagrid", "env/pettingzoo", "wandb/off", "wandb/offline",
        "wandb/online", "user/dual_policy_checkpoint_example", "user/dual_policy_checkpoint_local_example",
        "user/my_dual_policy_checkpoint",
    }  # fmt: skip


def test_the_node_has_the_same_keys_wherever_it_stands() -> None:
    base = OmegaConf.load(CONFIG_DIR / "trainer" / "trainer.yaml").dual_policy
    checkpoint, off, self_play = (
        OmegaConf.load(GROUPS / f"{name}.yaml") for name in ("checkpoint", "off", "self_play")
    )
    for one, said in (
        (base, {}),
        (checkpoint, {"enabled": True}),
        (off, {"enabled": False}),
        (self_play, {"enabled": True, "self_play.snapshot_interval": 50}),
    ):
        assert list(one) == list(checkpoint)
        # Every default is null, so that "the user said so" can be told from "nobody did".
        values = {name: value for name, value in flat(one).items() if value is not None}
        assert values == said
        assert list(flat(one)) == list(flat(checkpoint))


def flat(node: Any) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        nested = {f"{name}.{key}": one for key, one in flat(value).items()} if isinstance(value, DictConfig) else {}
        leaves |= nested or {name: value}
    return leaves


def test_hydra_writes_into_the_run_directory_alone() -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", ["run=a", "train_dir=t"], return_hydra_config=True)
    assert cfg.hydra.run.dir == "t/a"
    assert cfg.hydra.sweep.dir == "t/a"
    assert OmegaConf.to_container(cfg.hydra.sweep)["subdir"] == "${hydra:job.num}"  # type: ignore[index, call-overload]
    assert cfg.hydra.output_subdir is None
    assert cfg.hydra.job.chdir is False
    assert cfg.hydra.job_logging.root is None


VALUES = [
    "s3://bucket/k=1/x.pt", "a#b", "a&b!c", "a[1](2){3}.pt", "modèle/é.pt", "it's", 'say "hi"', "back\\slash",
    'end\\"', "trail\\", "two words", "a,b", "semi;colon", "dollar$x", "tilde~x", "back`tick",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_quoted_override_survives_the_shell_and_hydra(value: str) -> None:
    (word,) = shlex.split(quote_override("trainer.x", value))
    (override,) = OverridesParser.create().parse_overrides([word])
    parsed = override.value()
    assert getattr(parsed, "text", parsed) == value
