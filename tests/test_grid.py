"""A plain sweep is looked at before its first job: what would end its last one is one line, and nothing has begun."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from dual_policy_plugin.cli import main
from dual_policy_plugin.commands import grid
from dual_policy_plugin.commands.grid import check_grid
from dual_policy_plugin.errors import ConfigError, NpcError
from dual_policy_plugin.npc.lock import read_lock
from tests.curriculum.sweeps import SMALL
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were

NPC = "trainer.dual_policy.checkpoint_npc.uri"
PCT = "trainer.dual_policy.training_agents_pct"
DUAL = "trainer.dual_policy.enabled=true"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=1,x"], "job 1 (seed=x): seed='x' is not possible; use a whole number"),
        (["seed=range(1,4)", "trainer.gamma=0.9,2"], "job 1 (seed=1,trainer.gamma=2): trainer.gamma=2.0 is not poss"),
        (["agent=fast,mlp", "agent.hidden_size=16,0"], "job 2 (agent.hidden_size=0,agent=fast): agent.hidden_size=0"),
        (["agent=mlp,lstm"], "there is no agent/lstm"),
        (["device=cpu,gpu"], "job 1 (device=gpu): device=gpu is not known"),
        (["env.num_agents=8,1"], "job 1 (env.num_agents=1): "),
        ([DUAL, f"{NPC}=builtin://arena/weak", f"{PCT}=0.5,0.01"], f"job 1 ({PCT}=0.01): {PCT}=0.01 leaves no"),
        (
            ["trainer.dual_policy.enabled=false,true", f"{NPC}=builtin://arena/weak", f"{PCT}=0.01"],
            f"job 1 (trainer.dual_policy.enabled=True): {PCT}=0.01 leaves no",
        ),
        (["+dual_policy=off,checkpoint"], "job 1 (+dual_policy=checkpoint): trainer.dual_policy.checkpoint_npc.uri"),
        ([f"{NPC}=builtin://arena/weak,builtin://arena/gone", DUAL], "arena/gone): builtin://arena/gone: no such"),
        ([f"{NPC}='${{npc:gone}}','${{npc:old}}'", DUAL], f"job 0 ({NPC}='${{npc:gone}}'): gone: no such file"),
        (["evals.opponents=[builtin://arena/weak],[gone]"], "job 1 (evals.opponents=[gone]): gone: no such file"),
    ],
)
def test_what_would_end_a_later_job_is_said_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert main(["train", "-m", *SMALL, f"train_dir={tmp_path}", *words]) == 2
    (said,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert line in said
    assert not list(tmp_path.iterdir())


def test_values_in_a_file_are_looked_at_too(tmp_path: Path) -> None:
    folder = tmp_path / "configs/grids"
    folder.mkdir(parents=True)
    (folder / "seeds.yaml").write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,x\n")
    with pytest.raises(ConfigError, match=r"^job 1 \(seed=x\): seed='x' is not possible"):
        check_grid([f"hydra.searchpath=[file://{tmp_path}/configs]", "+grids=seeds"])
    check_grid([f"hydra.searchpath=[file://{tmp_path}/configs]", "+grids=seeds", "seed=5", "trainer.gamma=0.9,0.8"])


def test_a_job_that_has_begun_keeps_its_policy_whatever_its_name_means_by_now(tmp_path: Path) -> None:
    """Its lock names it; a policy that is gone ends the job that has not begun, and no other."""
    words = [*SMALL, f"train_dir={tmp_path}"]
    for name in ("one", "two"):
        assert main(["train", *words, f"run={name}"]) == 0
    words.append(DUAL)
    files = [tmp_path / f"{name}/checkpoints/latest.safetensors" for name in ("one", "two")]
    sweep = [*words, "run=s", f"{NPC}={files[0]},{files[1]}"]
    assert main(["train", "-m", *sweep]) == 0
    assert len(read_lock(tmp_path / "s/0/npc.lock.json")) == 1
    files[1].unlink()
    check_grid(sweep)
    with pytest.raises(
        NpcError, match=r"^job 1 \(trainer\.dual_policy.*two/checkpoints/latest.safetensors\): .*no such"
    ):
        check_grid([word.replace("run=s", "run=new") for word in sweep])


def test_secrets_of_the_environment_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "hunter2hunter2")
    with pytest.raises(ConfigError) as caught:
        check_grid([f"train_dir={tmp_path}", "trainer.gamma=0.9,0.8", "seed='${oc.env:CANARY}'"])
    assert "hunter2" not in str(caught.value)
    assert "${oc.env:CANARY}" in str(caught.value)
    with pytest.raises(NpcError, match=r"\$\{oc.env:CANARY\}: no such file"):
        check_grid([f"train_dir={tmp_path}", "seed=1,2", DUAL, f"{NPC}='${{oc.env:CANARY}}'"])


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.gamma=0.9,0.8", "seed=x,y", "seed=5"],  # the last word of a key counts
        ["seed=1,x", "++seed=5"],
        ["trainer.gamma=0.9,0.8", "seed='${hydra:job.num}'"],
        ["seed=1,2", "train_dir='${oc.env:THEIRS}'", "+hydra.job.env_set.THEIRS=x"],
        ["seed=1,2", "hydra.job.chdir=true", DUAL, f"{NPC}=../../seen/from/the/job"],
        ["run=s,t", DUAL, f"{NPC}=builtin://arena/weak,train_dir/s/0/checkpoints/latest.safetensors"],
        ["trainer.initial_policy.uri=null,train_dir/default/0"],
    ],
)
def test_a_sweep_that_would_work_is_let_through(words: list[str]) -> None:
    check_grid([*SMALL, *words])


def test_a_policy_of_a_job_that_comes_later_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NpcError, match=r"^job 0 .* does not exist"):
        check_grid([*SMALL, f"train_dir={tmp_path}", f"trainer.initial_policy.uri={tmp_path}/default/1,null"])


def test_random_numbers_of_the_jobs_stay_what_they_were() -> None:
    before = torch.get_rng_state()
    check_grid([*SMALL, "seed=7,8"])
    assert torch.equal(torch.get_rng_state(), before)


def test_help_and_the_config_do_not_wait_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dual_policy_plugin.commands.grid", None)  # which takes it
    assert main(["train", "--cfg", "job"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["seed=1"],
        ["seed=x"],
        ["seed=interval(1,3)"],
        ["seed=1,2,"],
        ["agent=glob(*)", "seed=1,x"],
        ["hydra/sweeper=dual_policy_curriculum", "hydra.sweeper.ladder=[builtin://arena/weak]", "seed=1,x"],
    ],
)
def test_what_others_look_at_is_left_to_them(
    words: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One job begins at once; Hydra or another sweeper says what is wrong with the rest."""
    monkeypatch.setattr(grid, "_with_words", None)
    check_grid(words)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_machines_policies_are_not_looked_for_here(tmp_path: Path) -> None:
    """A launcher's nodes may see other storage; the values are looked at all the same."""
    words = [f"train_dir={tmp_path}", DUAL, f"{NPC}=/node/a.safetensors,/node/b.safetensors"]
    with pytest.raises(NpcError):
        check_grid(words)
    pytest.importorskip("submitit")
    check_grid([*words, "hydra/launcher=submitit_slurm"])
    check_grid([*words, "hydra/launcher=submitit_slurm", "wandb.project='${oc.env:SET_BY_ITS_SETUP}'"])
    with pytest.raises(ConfigError, match=r"trainer\.gamma=2"):
        check_grid([*words, "hydra/launcher=submitit_slurm", "trainer.gamma=0.9,2"])
