"""What the tests of `dual-policy launch` share: a checkout with a remote, and the program run in this process."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from tests.launch.node import ROOT

MEDIUM = "+user=dual_policy_checkpoint_example"
URI = "trainer.dual_policy.checkpoint_npc.uri"
AGAINST = ["+dual_policy=checkpoint", f"{URI}=builtin://arena/medium"]
LOGINS = (
    "WANDB_API_KEY", "WANDB_BASE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
    "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "METTA_HOURLY_COST", "NETRC", "HYDRA_FULL_ERROR",
    "LOG_LEVEL", "DUAL_POLICY_NPC_URI",
)  # fmt: skip


def git(folder: Path, *words: str) -> str:
    """What git says; it reads no settings of the machine's."""
    settings = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    names = {f"GIT_{who}_{what}": f"x@{who}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        env=os.environ | settings | names,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def make_checkout(folder: Path) -> Path:
    """A checkout of what a node's scripts read, committed and pushed to a remote beside it."""
    remote = folder.with_name(f"{folder.name}-remote.git")
    for source, target in zip(_first_checkout(), (folder, remote), strict=True):
        shutil.copytree(source, target)
    git(folder, "remote", "set-url", "origin", str(remote))
    return folder


@functools.cache
def _first_checkout() -> tuple[Path, Path]:
    """A checkout and its remote, made once."""
    place = tempfile.TemporaryDirectory()
    atexit.register(place.cleanup)
    folder, remote = Path(place.name) / "code", Path(place.name) / "remote.git"
    folder.mkdir()
    shutil.copytree(ROOT / "sky", folder / "sky")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".gitignore").write_text("train_dir/\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(remote))
    git(folder, "remote", "add", "origin", str(remote))
    git(folder, "push", "--quiet", "-u", "origin", "main")
    return folder, remote


def only_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a cache of its own, and no login."""
    for name in LOGINS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "home/.aws"))


def launched(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Standard output of `dual-policy launch <words>`, which must succeed."""
    capsys.readouterr()
    code = main(["launch", *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def error_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which `dual-policy launch <words>` must end."""
    capsys.readouterr()
    assert main(["launch", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err
