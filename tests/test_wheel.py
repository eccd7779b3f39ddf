"""The wheel, installed outside of the repository: every command and somebody else's app find what they need in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import dual_policy_plugin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]  # it is built as pip builds it, with its build backend fetched

ROOT = Path(dual_policy_plugin.__file__).parent.parent
TINY = (
    "device=cpu", "env.num_envs=4", "env.episode_steps=8", "trainer.horizon=8", "trainer.num_minibatches=1",
    "trainer.threads=1", "trainer.total_timesteps=256", "agent.hidden_size=8", "evals.episodes=8",
)  # fmt: skip
AGAINST = "trainer.dual_policy.checkpoint_npc.uri"
APP = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    dual = cfg.trainer.dual_policy
    print(cfg.trainer.lr, dual.enabled, dual.checkpoint_npc.uri, cfg.opponent)

main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs of an environment are that has the wheel.

    Its other packages are those of this environment, named by a .pth file: such a folder's own .pth files are not read,
    so the checkout's editable installation is not there.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, wheel], check=True)  # first: pip is not to see the checkout's
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, where all commands are given."""
    return tmp_path_factory.mktemp("place")


def run(bin_folder: Path, place: Path, *words: str, codes: tuple[int, ...] = (0,)) -> str:
    """What a program of the environment prints; nothing points it to the checkout."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment = {**kept, "HOME": str(place), "DUAL_POLICY_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    command = [bin_folder / words[0], *words[1:]]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in codes, done.stdout + done.stderr
    assert str(ROOT) not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(bin_folder: Path, place: Path) -> Path:
    """A run against a built-in policy, and one against that run."""
    run(
        bin_folder,
        place,
        "dual-policy",
        "train",
        "+dual_policy=checkpoint",
        "run=first",
        f"{AGAINST}=builtin://arena/weak",
        *TINY,
    )
    said = run(
        bin_folder,
        place,
        "dual-policy",
        "train",
        "+dual_policy=checkpoint",
        "run=second",
        f"{AGAINST}=train_dir/first",
        *TINY,
    )
    assert "win rate against first" in said
    return place / "train_dir"


def test_the_wheel_holds_what_belongs_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = [name.removeprefix("dual_policy_plugin/") for name in names if name.startswith("dual_policy_plugin/")]
    assert {name.partition("/")[0] for name in names} == {
        "dual_policy_plugin",
        "hydra_plugins",
        "dual_policy_plugin-0.1.0.dist-info",
    }

    def shipped(folder: str) -> set[str]:
        return {name.removeprefix(f"{folder}/") for name in package if name.startswith(f"{folder}/")}

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert shipped("sky_tasks") == files(ROOT / "sky")
    assert shipped("app_configs") == files(ROOT / "configs")
    for folder in ("conf", "schemas", "builtin", "report", "replay"):
        assert shipped(folder) == files(ROOT / "dual_policy_plugin" / folder)
    assert "py.typed" in package
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.endswith(".pyc") or "test" in Path(name).name]
    assert wheel.stat().st_size < 3_000_000


def test_it_is_the_wheel_that_runs(bin_folder: Path, place: Path) -> None:
    program = "import dual_policy_plugin as one, hydra_plugins.dual_policy.search_path as other\n"
    program += "print(one.__file__, other.__file__)"
    paths = run(bin_folder, place, "python", "-c", program).split()
    assert all(path.startswith(str(bin_folder.parent)) for path in paths)


def test_training(trained: Path) -> None:
    result = json.loads((trained / "second/result.json").read_text())
    assert result["iterations"] == 2
    assert result["npcs"][0]["uri"].startswith("file://")
    assert result["evals"][0]["episodes"] == 8
    assert (trained / "second/report.html").stat().st_size > 10_000


def test_evaluating(trained: Path, bin_folder: Path, place: Path) -> None:
    words = ("policies=[train_dir/first,builtin://arena/weak]", "episodes=8", "out=cross.json", *TINY[:3])
    said = run(bin_folder, place, "dual-policy", "evaluate", *words)
    assert "first" in said
    assert json.loads((place / "cross.json").read_text())


def test_reporting(trained: Path, bin_folder: Path, place: Path) -> None:
    run(bin_folder, place, "dual-policy", "report", "train_dir/first", "train_dir/second", "--out", "compared.html")
    page = (place / "compared.html").read_text()
    assert "first" in page
    assert "second" in page
    assert "<svg" in page


def test_replaying(trained: Path, bin_folder: Path, place: Path) -> None:
    words = ("train_dir/first", "--npc", "builtin://arena/weak", "--episodes", "1", "--out", "watch.html")
    run(bin_folder, place, "dual-policy", "replay", *words)
    assert "<canvas" in (place / "watch.html").read_text()


def test_the_doctor_and_help(bin_folder: Path, place: Path) -> None:
    assert "torch" in run(bin_folder, place, "dual-policy", "doctor", codes=(0, 1))
    assert "dual-policy" in run(bin_folder, place, "dual-policy", "--help")
    assert "+dual_policy=checkpoint" in run(bin_folder, place, "dual-policy", "train", "--help")


def test_an_app_of_somebody_else(bin_folder: Path, place: Path) -> None:
    (place / "conf").mkdir()
    (place / "conf/app.yaml").write_text("trainer:\n  lr: 0.1\nopponent: ${npc:builtin://arena/weak}\n")
    (place / "app.py").write_text(APP)
    said = run(bin_folder, place, "python", "app.py", "+dual_policy=checkpoint", f"{AGAINST}=builtin://arena/weak")
    assert said == "0.1 True builtin://arena/weak builtin://arena/weak\n"
