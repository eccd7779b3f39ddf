"""The recipes: positions become overrides, and what follows is handed on once, as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dual_policy_plugin.hydra_app.composition import compose_config
from tests.launch.node import ROOT

RECIPES = ROOT / "recipes"
MEDIUM, WEAK = "builtin://arena/medium", "builtin://arena/weak"
URI = "trainer.dual_policy.checkpoint_npc.uri"
NASTY = [
    "run=a b", "x='", 'y="', "z=*", "t=?[a-z]", "u={1,2}", "v=$HOME", "w=`id`", "--k=$(id)", "l=\\", "~m", "n=\n",
    "+o=p", "", "q r",
]  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A `dual-policy` that writes down what it is given."""
    path = tmp_path / "bin/dual-policy"
    path.parent.mkdir()
    path.write_text("""#!/bin/bash\nprintf '%s\\0' "$@" > "$RECORD"\n""")
    path.chmod(0o755)
    return path


def given(program: Path, recipe: str, *words: str, npc: str | None = None) -> list[str]:
    """What the program is given by a recipe."""
    record = program.with_name("record")
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "RECORD": str(record)}
    if npc is not None:
        env["DUAL_POLICY_NPC_URI"] = npc
    done = subprocess.run(
        [str(RECIPES / recipe), *words], env=env, capture_output=True, text=True, check=False, cwd=program.parent
    )
    assert done.returncode == 0, done.stderr
    return record.read_bytes().decode().split("\0")[:-1]


def train(uri: str, *more: str) -> list[str]:
    return ["train", "+dual_policy=checkpoint", f'{URI}="{uri}"', *more]


STEPS, WORKERS = "trainer.total_timesteps=5000", "trainer.num_workers=3"


def test_positions(program: Path) -> None:
    recipe = "dual_policy_checkpoint.sh"
    assert given(program, recipe) == train(MEDIUM)
    assert given(program, recipe, npc=WEAK) == train(WEAK)
    assert given(program, recipe, "s3://b/k=1/x.pt", npc=WEAK) == train("s3://b/k=1/x.pt")
    assert given(program, recipe, "", "5_000", npc=WEAK) == train(WEAK, STEPS)
    assert given(program, recipe, WEAK, "5000", "3") == train(WEAK, STEPS, WORKERS)
    assert given(program, recipe, WEAK, "5000", "run=x", "3") == train(WEAK, STEPS, "run=x", "3")
    assert given(program, recipe, "run=x") == train(MEDIUM, "run=x")
    assert given(program, recipe, "--cfg", "job") == train(MEDIUM, "--cfg", "job")
    assert given(program, recipe, "a/my policy.pt", "-m") == train("a/my policy.pt", "-m")


def test_the_cloud_has_a_name_first(program: Path) -> None:
    recipe = "dual_policy_sky.sh"
    words = given(program, recipe, "my run", WEAK, "5000", "3", "--gpus=1", "seed=3")
    assert words == ["launch", "sky", *train(WEAK, STEPS, WORKERS), 'run="my run"', "--gpus=1", "seed=3"]
    assert given(program, recipe, "x", "--dry-run") == ["launch", "sky", *train(MEDIUM), 'run="x"', "--dry-run"]


@pytest.mark.parametrize("recipe", ["dual_policy_checkpoint.sh", "dual_policy_sky.sh"])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_how_it_is_called_and_what_comes_then(recipe: str, word: str, program: Path) -> None:
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "RECORD": str(program.with_name("record"))}
    done = subprocess.run([str(RECIPES / recipe), word], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"  recipes/{recipe} ") for line in lines)
    assert any("dual-policy report train_dir/" in line for line in lines)
    assert any("dual-policy replay train_dir/" in line for line in lines)
    assert not [line for line in lines if line.startswith(("#", "set "))]
    assert not program.with_name("record").exists(), "nothing is started"


@pytest.mark.parametrize(("recipe", "first"), [("dual_policy_checkpoint.sh", []), ("dual_policy_sky.sh", ["name"])])
def test_what_follows_is_handed_on_once(recipe: str, first: list[str], program: Path) -> None:
    words = given(program, recipe, *first, WEAK, "5000", "3", *NASTY)
    assert words[-len(NASTY) :] == NASTY
    assert given(program, recipe, *first, *NASTY)[-len(NASTY) :] == NASTY


@pytest.mark.parametrize("uri", ["a b.pt", "it's.pt", 'say "x".pt', "*.pt", "k=1,2/[x].pt", "~x.pt", "é#!&.pt"])
def test_any_uri_is_read_as_it_is(uri: str, program: Path) -> None:
    (_, *words) = given(program, "dual_policy_checkpoint.sh", f"./{uri}", "run=x")
    config, _ = compose_config(words)
    assert config.trainer.dual_policy.npc is not None
    assert config.trainer.dual_policy.npc.uri == f"./{uri}"


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("dual_policy_checkpoint.sh", [WEAK, "many"], "many stands where trainer.total_timesteps belongs, a whole"),
        ("dual_policy_checkpoint.sh", [WEAK, "1", "few"], "few stands where trainer.num_workers belongs, a whole"),
        ("dual_policy_sky.sh", [], "the name of the run is missing"),
        ("dual_policy_sky.sh", ["--dry-run"], "the name of the run is missing"),
    ],
)
def test_one_line(recipe: str, words: list[str], says: str, program: Path) -> None:
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "RECORD": str(program.with_name("record"))}
    done = subprocess.run([str(RECIPES / recipe), *words], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1
    assert not program.with_name("record").exists()


def test_without_the_program(tmp_path: Path) -> None:
    for path in RECIPES.iterdir():
        (tmp_path / "recipes").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "recipes")
    recipe = tmp_path / "recipes/dual_policy_checkpoint.sh"
    done = subprocess.run([str(recipe)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: dual-policy is not installed; run `make setup` in the checkout\n",
    )  # fmt: skip
