"""The `dual-policy` command: every trap of a command line ends with one line on stderr, its mend, and exit code 2."""

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import dual_policy_plugin
from dual_policy_plugin.cli import main
from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.hydra_app.composition import compose_config
from tests.harness import logging_as_it_was

ROOT = Path(dual_policy_plugin.__file__).parent.parent
URI = "trainer.dual_policy.checkpoint_npc.uri"
LOCAL = (
    "+user=dual_policy_checkpoint_local_example run=local_test trainer.dual_policy.checkpoint_npc.checkpoint_path="
    '"./train_dir/previous_run/checkpoints/model_0000.pt" trainer.total_timesteps=1000000 trainer.num_workers=2 '
    "wandb=off"
)
GROUP = (
    "+dual_policy=checkpoint trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak "
    "trainer.dual_policy.training_agents_pct=0.6 run=my_experiment"
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own as cwd; log handlers and level as they were."""
    for name in ("HYDRA_FULL_ERROR", "LOG_LEVEL", "METTA_HOURLY_COST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with logging_as_it_was():
        yield


def run_program(*command: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=60
    )


def error_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of `dual-policy train <words>`, which must end with exit code 2 and leave no folder."""
    assert main(["train", *words]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line)]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert not Path("train_dir/default").exists()
    return lines[0]


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")


def user_file(defaults: str, header: str = "# @package _global_\n") -> list[str]:
    write("mine/user/foo.yaml", f"{header}defaults:\n{defaults}seed: 3\n")
    return ["--config-dir", "mine", "+user=foo"]


# The users' own command lines


def test_the_users_own_lines_compose_word_for_word() -> None:
    config, _ = compose_config(shlex.split(LOCAL))
    assert config.run == "local_test"
    assert config.trainer.dual_policy.npc == PolicySource(uri="./train_dir/previous_run/checkpoints/model_0000.pt")
    assert (config.trainer.total_timesteps, config.trainer.num_workers, config.wandb.mode) == (1_000_000, 2, "off")
    config, _ = compose_config(shlex.split(GROUP))
    assert config.trainer.dual_policy.npc == PolicySource(uri="builtin://arena/weak")
    assert (config.trainer.dual_policy.training_agents_pct, config.run) == (0.6, "my_experiment")


def test_the_script_and_the_command_are_one_program_from_any_folder(tmp_path: Path) -> None:
    flags = ["--cfg", "job"]
    script = run_program(str(ROOT / "tools" / "train.py"), *shlex.split(LOCAL), *flags, cwd=tmp_path, PYTHONPATH="")
    module = run_program("-m", "dual_policy_plugin", "train", *shlex.split(LOCAL), *flags, cwd=tmp_path)
    assert (script.returncode, script.stderr) == (0, "")
    assert script.stdout == module.stdout
    assert OmegaConf.create(script.stdout).trainer.total_timesteps == 1_000_000
    assert list(tmp_path.iterdir()) == []


def test_the_real_program_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_program(str(ROOT / "tools" / "train.py"), "trainer.horizon=abc", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: trainer.horizon='abc' is not possible; use a whole number\n"
    assert list((tmp_path / "train_dir").iterdir()) == []
    full = run_program("-m", "dual_policy_plugin", "train", "seed=x", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert "Traceback (most recent call last)" in full.stderr
    assert full.stderr.endswith("error: seed='x' is not possible; use a whole number\n")
    debug = run_program("-m", "dual_policy_plugin", "train", "seed=x", cwd=tmp_path, LOG_LEVEL="debug")
    assert "Traceback (most recent call last)" in debug.stderr


# Traps of the command line


@pytest.mark.parametrize("value", ["s3://b/k=1/x.pt", "a#b", "a&b", "a!b", "a[1].pt", "a(1).pt", "modèle.pt", "it's"])
def test_a_special_character_in_a_uri(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "+dual_policy=checkpoint", f"{URI}={value}")
    assert line.startswith(f"error: {URI}={value} cannot be read")
    (mended,) = shlex.split(line.rpartition("; write ")[2])
    config, _ = compose_config(["+dual_policy=checkpoint", mended])
    assert config.trainer.dual_policy.npc == PolicySource(uri=value)


def test_a_tilde_is_written_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert f"write '{URI}=\"/home/someone/x.pt\"'" in error_line(capsys, f"{URI}=~/x.pt")


def test_a_comma_that_is_no_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, f"{URI}=a,b")
    assert "add -m" in line
    assert f"'{URI}=\"a,b\"'" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["foo"], ["'foo' cannot be read", "key=value"]),
        (["horizon"], ["'horizon' cannot be read", "trainer.horizon=..."]),
        (["--foo=1"], ["--foo=1", "without dashes"]),
        (["--cfg", "foo"], ["--cfg", "'foo'", "'job', 'hydra', 'all'"]),
        (["--config-name", "nope"], ["nope"]),
        (["--config-dir", "nope"], ["nope", "not found"]),
        (["--experimental-rerun", "x"], ["--experimental-rerun", "run the command again"]),
        (["trainer.horizn=3"], ["trainer.horizn is not a known key", "did you mean trainer.horizon?"]),
        (["env.nm_agents=3"], ["env.nm_agents", "did you mean env.num_agents?", "+env.nm_agents="]),
        ([f"{URI}x=3"], [f"{URI}x is not a known key", f"did you mean {URI}?"]),
        (["+trainer.horizn=3"], ["trainer.horizn is not a known key", "did you mean trainer.horizon?"]),
        (["agent=fst"], ["there is no agent/fst", "did you mean agent=fast?", "there are fast, mlp"]),
        (["+dual_policy=chekpoint"], ["dual_policy/chekpoint", "did you mean +dual_policy=checkpoint?"]),
        (["dual_policy=chekpoint"], ["there is no dual_policy/chekpoint", "did you mean +dual_policy=checkpoint?"]),
        (["+dual_polcy=checkpoint"], ["dual_polcy is not a known key", "did you mean the group, +dual_policy=...?"]),
        (["+usr=demo"], ["usr is not a known key", "did you mean the group, +user=...?"]),
        (["sim=all"], ["sim=all is not how the app lists this group", "write sim@evals=all"]),
        (["trainer.dual_polcy.checkpoint_npc.uri=x"], ["did you mean trainer.dual_policy.checkpoint_npc.uri?"]),
        (["trainer.dual_policy.chekpoint_npc.ur=x"], ["did you mean trainer.dual_policy.checkpoint_npc.uri?"]),
        (["hydra.rn.dir=x"], ["hydra.rn.dir is not a known key", "did you mean hydra.run.dir?"]),
        (["--dry-rn"], ["--dry-rn", "did you mean --dry-run?"]),
        (["dual_policy=checkpoint"], ["dual_policy=checkpoint overrides a group", "write +dual_policy=checkpoint"]),
        (["+agent=mlp"], ["+agent=mlp adds a group", "write agent=mlp, without the plus"]),
        (["trainer=null"], ["trainer=null is not possible"]),
        (["trainer.dual_policy=checkpoint"], ["trainer.dual_policy='checkpoint'"]),
        (["+dual_policy=checkpoint"], [f"{URI} is not set", "builtin://arena/medium"]),
        (["cmd=play"], ["cmd='play'", "cmd: train"]),
        (["hydra.nope=1"], ["hydra.nope is not a known key"]),
    ],
)  # fmt: skip
def test_a_mistyped_word(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, *words)
    for part in parts:
        assert part in line


def test_import_asks_for_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "old.pt"]) == 2
    line = "error: the following arguments are required: NEW.safetensors; see `dual-policy import --help`\n"
    assert capsys.readouterr().err == line
    assert main(["import", "old.pt", "new.safetensors", "--agent", "fst"]) == 2
    assert "did you mean agent=fast?" in capsys.readouterr().err


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words, near in ((["tran"], "dual-policy train"), (["run=x"], "dual-policy train"), (["imprt"], "import")):
        assert main(words) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert near in line
        assert "there are train, import, demo" in line


# Traps of a user's file


def test_a_user_file_without_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, *user_file("  - _self_\n", header=""))
    assert "# @package _global_" in line


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("wandb: off", ["user/foo.yaml", 'quote it, for example `- wandb: "off"`']),
        ("/wandb: off", ["user/foo.yaml", 'quote it, for example `- wandb: "off"`']),
        ("override /wandb: off", ["user/foo.yaml", 'quote it, for example `- wandb: "off"`']),
        ("common", ["user/foo.yaml", "begin with a slash: `- /common`"]),
        ("agent: fast", ["user/foo.yaml", "begin with a slash: `- /agent/fast`"]),
        ("trainer: trainer", ["begin with a slash: `- /trainer/trainer`"]),
        ("/agent: fast", ["agent is listed twice", "`- override /agent: NAME`"]),
        ("/agent: mlp", ["agent", "`- override /agent: mlp`"]),
        ("/agent/slow", ["there is no agent/slow"]),
    ],
)
def test_a_line_of_a_users_defaults_list(entry: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, *user_file(f"  - {entry}\n"))
    for part in parts:
        assert part in line


def test_a_user_file_that_is_no_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert "user/foo.yaml is no valid YAML" in error_line(capsys, *user_file("  - [\n"))


def test_a_user_file_that_masks_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, *user_file("  - /agent/fast\n"), "agent=mlp")
    assert "agent=mlp is masked by `/agent/fast` in the defaults of user/foo.yaml" in line
    assert "write `override /agent: fast` there" in line
    words = user_file("  - /trainer/trainer\n")
    line = error_line(capsys, "+dual_policy=checkpoint", *words)
    assert "+dual_policy=checkpoint is masked by `/trainer/trainer`" in line
    # The other order masks nothing: the next error is reached.
    assert f"{URI} is not set" in error_line(capsys, *words, "+dual_policy=checkpoint")
    # What the file overrides, the command line overrides in turn; and the same choice is no contradiction.
    for entry, word in (("override /agent: fast", "agent=mlp"), ("/agent/fast", "agent=fast")):
        assert "cmd='x'" in error_line(capsys, *user_file(f"  - {entry}\n"), word, "cmd=x")


def test_an_app_that_lists_the_group_itself(capsys: pytest.CaptureFixture[str]) -> None:
    write("mine/job.yaml", 'defaults:\n  - train\n  - dual_policy: "off"\n  - _self_\n')
    words = ["--config-dir", "mine", "--config-name", "job", "+dual_policy=checkpoint"]
    assert "write dual_policy=checkpoint, without the plus" in error_line(capsys, *words)


# Sweeps, folders, environment


def test_flags_may_stand_anywhere_and_a_bad_value_is_said_before_the_first_job(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "run=x", "-m", "trainer.horizon=8,0"]) == 2
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("error")] == [
        "error: job 1 (trainer.horizon=0): trainer.horizon=0 is not possible; use a value from 1 to 4096",
    ]
    assert not Path("train_dir").exists()


def test_every_job_that_fails_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for num in (0, 1):
        write(f"train_dir/x/{num}/checkpoints", "taken")
    assert main(["train", "-m", "run=x", "seed=1,2", "trainer.threads=1"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(lines) == 2
    for num, line in enumerate(lines):
        assert line.startswith(f"error: job {num} (run=x,seed={num + 1},trainer.threads=1): train_dir/x/{num}")
    assert "Error executing job" not in captured.err + captured.out


def test_a_numeric_name_of_a_run_stays_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "run=2025_11_21", "--cfg", "job", "--package", "run"]) == 0
    assert capsys.readouterr().out.strip() == "2025_11_21"


def test_a_train_dir_that_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    write("taken", "")
    line = error_line(capsys, "train_dir=taken")
    assert "taken/default" in line
    assert "choose another run=, train_dir=" in line


def test_what_stands_in_a_run_directory_survives_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    write("train_dir/kept/notes.txt", "mine")
    assert "trainer.horizon=0" in error_line(capsys, "run=kept", "trainer.horizon=0")
    assert Path("train_dir/kept/notes.txt").read_text("utf-8") == "mine"


def test_bad_environment_variables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METTA_HOURLY_COST", "cheap")
    assert "METTA_HOURLY_COST=cheap is not possible" in error_line(capsys)
    monkeypatch.setenv("LOG_LEVEL", "loud")
    assert "LOG_LEVEL=loud is no log level" in error_line(capsys)
    monkeypatch.setenv("LOG_LEVEL", "warning")
    assert "trainer.horizon='x'" in error_line(capsys, "trainer.horizon=x")
    assert logging.getLogger().level == logging.WARNING


def test_the_program_leaves_the_process_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    before = (list(sys.argv), sys.stderr, dict(os.environ))
    error_line(capsys, "trainer.horizon=x")
    assert (list(sys.argv), sys.stderr, dict(os.environ)) == before


# Help, version, start-up


def test_help_and_version_need_no_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = (
        "import sys, time; start = time.perf_counter()\n"
        "from dual_policy_plugin.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "print(time.perf_counter() - start, 'torch' in sys.modules, 'hydra' in sys.modules)\n"
    )
    *text, last = run_program("-c", probe, cwd=tmp_path).stdout.splitlines()
    seconds, has_torch, has_hydra = last.split()
    assert float(seconds) < 0.3
    assert (has_torch, has_hydra) == ("False", "False")
    assert text[0] == "usage: dual-policy COMMAND [...]"
    assert text[-1] == f"dual-policy {dual_policy_plugin.__version__}"
    assert main(["train", "--help"]) == 0
    assert "+dual_policy=checkpoint" in capsys.readouterr().out
    assert main(["train", "--version"]) == 0


def test_the_public_face() -> None:
    assert dual_policy_plugin.load_config is compose_config.__globals__["load_config"]
    assert issubclass(dual_policy_plugin.DigestError, dual_policy_plugin.NpcError)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = dual_policy_plugin.nope  # type: ignore[attr-defined]
