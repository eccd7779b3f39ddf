"""The search-path plugin in an app that is not ours, as that app's users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import dual_policy_plugin

ROOT = Path(dual_policy_plugin.__file__).parent.parent
APP = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    print(cfg.trainer.lr)

main()
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text("trainer:\n  lr: 0.1\n", "utf-8")
    (tmp_path / "app.py").write_text(APP, "utf-8")
    return tmp_path


def run(folder: Path, *words: str, path: str = str(ROOT)) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_foreign_app_gets_the_node(app: Path) -> None:
    uri = "trainer.dual_policy.checkpoint_npc.uri=wandb://team/project/model/x.y:latest"
    done = run(app, "app.py", "+dual_policy=checkpoint", uri, "--cfg", "job")
    assert (done.returncode, done.stderr) == (0, "")
    cfg = OmegaConf.create(done.stdout)
    assert cfg.trainer.lr == 0.1
    assert cfg.trainer.dual_policy.enabled is True
    assert cfg.trainer.dual_policy.checkpoint_npc.uri == "wandb://team/project/model/x.y:latest"
    assert cfg.trainer.dual_policy.training_agents_pct is None
    assert set(cfg) == {"trainer"}


def test_a_foreign_app_without_the_group_is_as_before(app: Path) -> None:
    done = run(app, "app.py", "--cfg", "job")
    assert (done.returncode, done.stderr) == (0, "")
    assert OmegaConf.create(done.stdout) == {"trainer": {"lr": 0.1}}
    off = run(app, "app.py", "+dual_policy=off", "--cfg", "job")
    assert OmegaConf.create(off.stdout).trainer.dual_policy.enabled is False


def test_starting_an_app_stays_light(app: Path) -> None:
    probe = """
import sys, time, hydra_plugins
parts = list(hydra_plugins.__path__)
hydra_plugins.__path__ = [part for part in parts if {keep}]
start = time.perf_counter()
from hydra._internal.utils import create_config_search_path
found = "dual_policy" in str(create_config_search_path(None))
print(time.perf_counter() - start, found, "torch" in sys.modules)
"""

    def measure(keep: str) -> tuple[float, str, str]:
        runs = [run(app, "-c", probe.format(keep=keep)).stdout.split() for _ in range(3)]
        return min(float(one[0]) for one in runs), runs[0][1], runs[0][2]

    without, is_found, _ = measure(f"not part.startswith({str(ROOT)!r})")
    assert is_found == "False"
    with_ours, is_found, has_torch = measure("True")
    assert (is_found, has_torch) == ("True", "False")
    assert with_ours - without < 0.15
