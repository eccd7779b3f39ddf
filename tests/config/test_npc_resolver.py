"""`${npc:<uri>}` in the configs of foreign apps and of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dual_policy_plugin
from dual_policy_plugin.cli import main
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.hydra_app.interpolation import config_text, hide_variables, keep_requested, register_resolver
from dual_policy_plugin.hydra_app.loading import load_config

ROOT = Path(dual_policy_plugin.__file__).parent.parent
BUILTINS = ROOT / "dual_policy_plugin" / "builtin" / "arena"
URI = "trainer.dual_policy.checkpoint_npc.uri"
APP = """
import os
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    print(os.path.basename(os.getcwd()), cfg.opponent, cfg.again, cfg.opponent)

main()
"""
SMALL = [
    "env.num_envs=4", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "agent.hidden_size=16", "evals.episodes=0", "device=cpu", "+dual_policy=checkpoint",
    "report=false",
]  # fmt: skip


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checkpoints in the working directory; the newest is model_0007."""
    folder = tmp_path / "policies"
    folder.mkdir()
    shutil.copy(BUILTINS / "weak.safetensors", folder / "model_0003.safetensors")
    shutil.copy(BUILTINS / "medium.safetensors", folder / "model_0007.safetensors")
    monkeypatch.chdir(tmp_path)
    return folder


def run_app(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "conf").mkdir()
    (folder / "conf" / "app.yaml").write_text("opponent: ${npc:policies}\nagain: ${opponent}\n", "utf-8")
    (folder / "app.py").write_text(APP, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "app.py", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


# Any Hydra app


def test_a_foreign_app_gets_the_pinned_uri(policies: Path) -> None:
    done = run_app(policies.parent, "hydra.job.chdir=true", "hydra.run.dir=elsewhere")
    newest = f"file://{policies}/model_0007.safetensors"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"elsewhere {newest} {newest} {newest}\n"  # relative to where the app was started


def test_a_foreign_app_sweeps_over_it(policies: Path) -> None:
    words = ["-m", "hydra.sweep.dir=out", "opponent=${npc:builtin://arena/weak},${npc:policies}"]
    done = run_app(policies.parent, *words)
    assert done.returncode == 0, done.stderr
    played = [line.split()[1] for line in done.stdout.splitlines() if "://" in line and "HYDRA" not in line]
    assert played == ["builtin://arena/weak", f"file://{policies}/model_0007.safetensors"]


def test_a_foreign_app_shows_it_resolved(policies: Path) -> None:
    done = run_app(policies.parent, "--cfg", "job", "--resolve")
    assert OmegaConf.create(done.stdout).again == f"file://{policies}/model_0007.safetensors"


def test_a_foreign_apps_error_names_the_key_and_the_reason(policies: Path) -> None:
    done = run_app(policies.parent, "opponent=${npc:builtin://arena/mediun}")
    assert done.returncode == 1
    assert "did you mean builtin://arena/medium?" in done.stderr
    assert "full_key: opponent" in done.stderr


def test_a_process_that_only_loads_the_plugin_knows_it(policies: Path) -> None:
    probe = (
        "import hydra_plugins.dual_policy.search_path, sys\n"
        "from omegaconf import OmegaConf\n"
        "print(OmegaConf.create({'a': '${npc:builtin://arena/weak}'}).a, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "builtin://arena/weak False\n"


def test_an_apps_own_resolver_of_that_name_stays() -> None:
    probe = (
        "from omegaconf import OmegaConf\n"
        "OmegaConf.register_new_resolver('npc', lambda word: f'own {word}')\n"
        "import hydra_plugins.dual_policy.search_path\n"
        "print(OmegaConf.create({'a': '${npc:x}'}).a)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "own x\n"


def test_a_config_asks_once(policies: Path) -> None:
    register_resolver()
    cfg = OmegaConf.create({"a": "${npc:policies}", "b": "${npc:policies}"})
    first = cfg.a
    assert first == f"file://{policies}/model_0007.safetensors"
    shutil.copy(BUILTINS / "strong.safetensors", policies / "model_0008.safetensors")
    assert [cfg.a, cfg.b, OmegaConf.to_container(cfg.copy(), resolve=True)] == [first, first, {"a": first, "b": first}]
    assert OmegaConf.create({"a": "${npc:policies}"}).a == f"file://{policies}/model_0008.safetensors"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("${npc:a,b}", "${npc:a,b} does not hold one URI; put it into quotes, for example ${npc:'a,b'}"),
        ("${npc:}", "does not hold one URI"),
        ("${npc:null}", "does not hold one URI"),
        ("${npc:true}", "does not hold one URI"),
        ("${npc:[a]}", "does not hold one URI"),
        ("${npc:''}", "is empty"),
        ("${npc:builtin://arena/nobody}", "no such builtin"),
        ("${npc:'https://user:pass@host/x.pt'}", "user name or password"),
        ("${npc:s3://user:pass@host/x,y.pt}", "${npc:...} does not hold one URI"),
    ],
)
def test_texts_that_name_no_policy(text: str, part: str) -> None:
    register_resolver()
    with pytest.raises(OmegaConfBaseException) as caught:
        _ = OmegaConf.create({"a": text}).a
    assert part in str(caught.value)
    assert "pass@" not in str(caught.value)


# Our own app


@pytest.mark.parametrize(
    ("word", "requested"),
    [
        ("${npc:policies}", "policies"),
        ("'${npc:policies}'", "policies"),
        ("\"${npc:'s3://bucket/k=1/x,y.pt'}\"", "s3://bucket/k=1/x,y.pt"),
        ("${npc:wandb://team/arena/model/x.y:latest}", "wandb://team/arena/model/x.y:latest"),
        ('"${npc:${run}/model_0003.safetensors}"', "policies/model_0003.safetensors"),
    ],
)
def test_a_policys_uri_is_left_to_the_lock(word: str, requested: str, policies: Path) -> None:
    for key in (URI, URI.replace("uri", "checkpoint_path"), "trainer.initial_policy.policy_uri"):
        words = ["run=policies", "+dual_policy=checkpoint", f"{key}={word}"]
        if "initial" in key:
            words.append(f"{URI}=builtin://arena/weak")
        config, text = compose_config(words)
        source = config.trainer.initial_policy if "initial" in key else config.trainer.dual_policy.npc
        assert source is not None
        assert source.uri == requested
        assert OmegaConf.select(OmegaConf.create(text), key) == requested


def test_evaluations_opponents_are_left_to_the_lock_too(policies: Path) -> None:
    words = "evals.opponents=['${npc:policies}',builtin://arena/weak,'x-${npc:policies}']"
    config, _ = compose_config([words])
    newest = f"file://{policies}/model_0007.safetensors"
    assert config.evals.opponents == ["policies", "builtin://arena/weak", f"x-{newest}"]


def test_other_keys_of_our_app_get_the_pinned_uri(policies: Path) -> None:
    config, text = compose_config(["wandb.tags=['${npc:policies}']", "wandb.group=x-${npc:policies}"])
    newest = f"file://{policies}/model_0007.safetensors"
    assert config.wandb.tags == [newest]
    assert config.wandb.group == f"x-{newest}"
    assert newest in text
    with pytest.raises(
        ConfigError,
        match=r"^wandb\.group: builtin://arena/strnog: no such builtin; did you mean builtin://arena/strong\?",
    ):
        compose_config(["wandb.group=${npc:builtin://arena/strnog}"])


def test_keeping_the_text_changes_nothing_else() -> None:
    cfg = OmegaConf.create({"trainer": {"dual_policy": {"checkpoint_npc": {"uri": "x-${npc:y}", "act": None}}}})
    assert OmegaConf.to_container(keep_requested(cfg)) == OmegaConf.to_container(cfg)
    cfg = OmegaConf.create({"trainer": {"dual_policy": {"checkpoint_npc": {"uri": "${npc:y}", "act": None}}}})
    kept = keep_requested(cfg)
    assert OmegaConf.to_container(kept, resolve=True)["trainer"]["dual_policy"]["checkpoint_npc"] == {
        "uri": "y",
        "act": None,
    }
    assert OmegaConf.to_container(cfg)["trainer"]["dual_policy"]["checkpoint_npc"]["uri"] == "${npc:y}"
    assert OmegaConf.to_container(keep_requested(OmegaConf.create({"trainer": None}))) == {"trainer": None}


def test_a_restart_plays_the_policy_that_the_run_began_with(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *SMALL, "run=x", f"{URI}='${{npc:policies}}'"]
    assert main([*words, "trainer.total_timesteps=128"]) == 0
    begun = json.loads(Path("train_dir/x/result.json").read_text("utf-8"))["npcs"]
    assert [npc["uri"] for npc in begun] == [f"file://{policies}/model_0007.safetensors"]
    shutil.copy(BUILTINS / "strong.safetensors", policies / "model_0008.safetensors")
    assert main([*words, "trainer.total_timesteps=256"]) == 0, capsys.readouterr().err
    result = json.loads(Path("train_dir/x/result.json").read_text("utf-8"))
    assert result["agent_step"] == 256
    assert result["npcs"] == begun


def test_load_config_of_a_plain_composed_config_gets_the_pin(policies: Path) -> None:
    register_resolver()
    node = {"enabled": True, "checkpoint_npc": {"uri": "${npc:policies}"}}
    config = load_config(OmegaConf.create({"trainer": {"dual_policy": node}}))
    assert config.trainer.dual_policy.npc is not None
    assert config.trainer.dual_policy.npc.uri == f"file://{policies}/model_0007.safetensors"


def test_a_config_as_text_holds_no_value_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts stay as they were written, by whatever way a key came to hold them; numbers and flags are resolved."""
    monkeypatch.setenv("TOKEN", "s3cr3t")
    monkeypatch.setenv("NUMBER", "8")
    cfg = OmegaConf.create(
        {
            "plain": "${oc.env:TOKEN}", "chained": ["x-${plain}"], "default": "${oc.env:NONE,'a b, c'}",
            "number": "${oc.decode:${oc.env:NUMBER}}", "nothing": "${oc.env:NONE,null}", "seed": 1, "copy": "${seed}",
        }
    )  # fmt: skip
    text = config_text(cfg)
    assert "s3cr3t" not in text
    again = OmegaConf.create(text)
    assert OmegaConf.to_container(again, resolve=False) == {
        "plain": "${oc.env:TOKEN}", "chained": ["x-${oc.env:TOKEN}"], "default": "${oc.env:NONE,'a b, c'}",
        "number": 8, "nothing": None, "seed": 1, "copy": 1,
    }  # fmt: skip
    assert OmegaConf.to_container(again, resolve=True) == OmegaConf.to_container(cfg, resolve=True)
    assert config_text(again) == text
    assert cfg.plain == "s3cr3t", "the resolver is itself again"


def test_an_error_shows_a_variables_name_and_not_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the texts of all that led to it; what is too short for a secret stays, and so do variables of others."""
    for name, value in {
        "TOKEN": "s3cr3t's",
        "OTHER": "s3cr3t's, and more",
        "SHORT": "abc",
        "UNNAMED": "s3cr3t",
    }.items():
        monkeypatch.setenv(name, value)
    cfg = OmegaConf.create({"a": "${oc.env:TOKEN}", "b": ["x ${oc.env:'OTHER',null}"], "c": "${oc.env:SHORT}"})
    first = ValueError("bad s3cr3t's, and more", 5)
    first.__context__ = OSError("s3cr3t's")
    error = ConfigError("""a="s3cr3t's" is not possible, nor abc, nor 's3cr3t'""")
    error.__cause__ = first
    hide_variables(error, cfg)
    assert str(error) == """a="${oc.env:TOKEN}" is not possible, nor abc, nor 's3cr3t'"""
    assert first.args == ("bad ${oc.env:OTHER}", 5)
    assert first.__context__.args == ("${oc.env:TOKEN}",)
