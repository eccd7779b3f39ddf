"""Which code a launch sends, and what it refuses to send."""

from __future__ import annotations

from pathlib import Path

import pytest

from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.launch.checkout import changed_files, read_checkout, without_login
from tests.launch.launching import git, make_checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "code")


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(LaunchError) as caught:
        read_checkout(folder, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_clean_checkout_is_sent_from_its_top(checkout: Path) -> None:
    found = read_checkout(checkout / "sky")
    head = git(checkout, "rev-parse", "HEAD")
    assert (found.folder, found.commit, found.is_clean, found.git_ref) == (checkout, head, True, None)
    assert found.text == head


def test_uncommitted_files_are_named(checkout: Path) -> None:
    (checkout / "sky/setup.sh").write_text("changed")
    git(checkout, "mv", "constraints.txt", "pins.txt")
    (checkout / "new one.py").write_text("")
    assert changed_files(checkout) == ["pins.txt", "sky/setup.sh", "new one.py"]
    line = refused(checkout)
    assert line == (
        "uncommitted: pins.txt, sky/setup.sh, new one.py; commit and push first, or send the folder as it is with "
        "--skip-git-check"
    )
    (checkout / "zz").write_text("")
    assert "new one.py and 1 more;" in refused(checkout)


def test_what_git_ignores_is_no_change(checkout: Path) -> None:
    (checkout / "train_dir").mkdir()
    (checkout / "train_dir/x").write_text("")
    assert read_checkout(checkout).is_clean


def test_unpushed_commits_are_named(checkout: Path) -> None:
    (checkout / "new.py").write_text("")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "a second one")
    short = git(checkout, "rev-parse", "--short", "HEAD")
    assert refused(checkout).startswith(f"not pushed: {short} a second one; `git push` first, or ")
    git(checkout, "push", "--quiet", "origin", "main:other")
    assert read_checkout(checkout).is_clean  # another branch of the remote will do


def test_a_checkout_without_a_remote_is_refused(checkout: Path) -> None:
    git(checkout, "remote", "remove", "origin")
    assert "has no remote; push it to one" in refused(checkout)


def test_skip_sends_it_all_and_says_so(checkout: Path) -> None:
    (checkout / "new.py").write_text("")
    found = read_checkout(checkout, skip_check=True)
    assert found.text == f"{git(checkout, 'rev-parse', 'HEAD')} with changes"


def test_a_plain_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "is no git checkout; cd into your checkout, or" in refused(tmp_path)
    found = read_checkout(tmp_path, skip_check=True)
    assert (found.commit, found.text) == (None, "unknown with changes")
    git(tmp_path, "init", "--quiet")
    assert "without a commit" in refused(tmp_path)


def test_a_ref_is_what_the_remote_says(checkout: Path) -> None:
    first = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "-a", "v1", "-m", "v1")
    git(checkout, "push", "--quiet", "origin", "v1", "main:topic/a")
    (checkout / "new.py").write_text("")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "second")
    (checkout / "dirty.py").write_text("")  # is not sent, so it is no fault
    for ref in ("main", "v1", "topic/a", first, first[:10]):
        found = read_checkout(checkout, git_ref=ref)
        assert (found.git_ref, found.commit, found.is_clean) == (first, first, True)
        assert found.git_url == str(checkout.with_name("code-remote.git"))
    head = git(checkout, "rev-parse", "HEAD")
    for ref in ("nothing", head, head[:10], "-x", " ", "HEAD"):
        assert refused(checkout, git_ref=ref).startswith(f"--git-ref={ref} is not on the remote; push it, or ")


def test_a_remote_that_is_gone(checkout: Path) -> None:
    git(checkout, "remote", "set-url", "origin", "https://me:hunter2@127.0.0.1:1/x.git")
    line = refused(checkout, git_ref="main")
    assert line.startswith("git ls-remote failed in ")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:hunter2@host.example/a/b.git", "https://host.example/a/b.git"),
        ("https://token@host.example/a/b.git", "https://host.example/a/b.git"),
        ("git@host.example:a/b.git", "git@host.example:a/b.git"),
        ("ssh://git@host.example/a/b@c.git", "ssh://git@host.example/a/b@c.git"),
        ("https://host.example/a/b@c.git", "https://host.example/a/b@c.git"),
    ],
)
def test_no_login_travels_in_a_url(url: str, shown: str) -> None:
    assert without_login(url) == shown


def test_no_login_is_in_an_error_of_gits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git_here = tmp_path / "bin/git"
    git_here.parent.mkdir()
    git_here.write_text("#!/bin/bash\necho \"fatal: 'https://me:hunter2@host/x.git' is not there\" >&2; exit 1\n")
    git_here.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git_here.parent}:/usr/bin:/bin")
    with pytest.raises(LaunchError) as caught:
        changed_files(tmp_path)
    assert str(caught.value) == f"git status failed in {tmp_path}: fatal: 'https://host/x.git' is not there"


def test_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert refused(checkout).startswith("git is not installed")
