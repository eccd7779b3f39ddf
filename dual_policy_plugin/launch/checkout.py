"""Which code a launch sends: the git checkout of the working directory, or a ref of its remote.

A node runs what stands in a commit that others can get, so that a run can be repeated; `--skip-git-check` sends the
working directory as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.errors import LaunchError

COMMIT_VARIABLE = "DUAL_POLICY_COMMIT"
"""Tells a run its code, for its log."""
TIMEOUT_S = 30
_SHOWN = 3  # names in a message
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkout:
    """The code of a launch."""

    folder: Path
    """The checkout's top, or the working directory where there is no checkout."""
    commit: str | None
    """What the node runs, in full; None: nobody knows, there is no checkout."""
    is_clean: bool
    """Whether that commit is all of it."""
    git_ref: str | None = None
    """The commit to fetch from the remote; None: the folder itself is sent."""
    git_url: str | None = None
    """Where that is, without a login."""

    @property
    def text(self) -> str:
        """The commit for a log line, marked where the folder has changes of its own."""
        return f"{self.commit or 'unknown'}{'' if self.is_clean else ' with changes'}"


def read_checkout(folder: Path, *, git_ref: str | None = None, skip_check: bool = False) -> Checkout:
    """The code that a launch from `folder` sends.

    Args:
        folder: anywhere in a checkout.
        git_ref: branch, tag or commit to launch instead of what is checked out; must be on the remote.
        skip_check: send the folder though something in it is not committed or not pushed.

    Raises:
        LaunchError: no checkout, uncommitted or unpushed code, or no such ref; nothing was changed.
    """
    top = _git_or_none(folder, "rev-parse", "--show-toplevel")
    head = None if top is None else _git_or_none(folder, "rev-parse", "--verify", "HEAD")
    if top is None or head is None:
        if skip_check and git_ref is None:
            return Checkout(folder=folder.resolve(), commit=None, is_clean=False)
        what = "is no git checkout" if top is None else "is a git checkout without a commit"
        mend = "cd into your checkout" if top is None else "commit your code"
        raise LaunchError(f"{folder} {what}; {mend}, or send the folder as it is with --skip-git-check")
    root = Path(top)
    if git_ref is not None:
        commit, url = _on_remote(root, git_ref)
        return Checkout(folder=root, commit=commit, is_clean=True, git_ref=commit, git_url=url)
    changed = changed_files(root)
    if not skip_check:
        _refuse(changed, "uncommitted", "commit and push")
        _check_pushed(root)
    return Checkout(folder=root, commit=head, is_clean=not changed)


def changed_files(root: Path) -> list[str]:
    """Files that differ from the commit, and new ones that git does not ignore."""
    words = _git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all").split("\0")
    names, i = [], 0
    while i < len(words):
        if words[i]:
            names.append(words[i][3:])
            i += words[i][0] in "RC"  # a rename is followed by the older name
        i += 1
    return names


def _check_pushed(root: Path) -> None:
    if not _git(root, "remote").split():
        raise LaunchError(f"{root} has no remote; push it to one, or send the folder as it is with --skip-git-check")
    log = _git(root, "log", "--format=%h %s", "HEAD", "--not", "--remotes")
    _refuse([line[:60] for line in log.splitlines() if line], "not pushed", "`git push`")


def _refuse(what: list[str], state: str, mend: str) -> None:
    if what:
        more = f" and {len(what) - _SHOWN} more" if len(what) > _SHOWN else ""
        raise LaunchError(
            f"{state}: {', '.join(ascii(one)[1:-1] for one in what[:_SHOWN])}{more}; "
            f"{mend} first, or send the folder as it is with --skip-git-check"
        )


def _on_remote(root: Path, ref: str) -> tuple[str, str]:
    """The commit that a branch, a tag or a commit's own name means on the remote, and the remote's URL."""
    shown = ascii(ref)[1:-1]
    missing = LaunchError(f"--git-ref={shown} is not on the remote; push it, or name a branch that is there")
    if ref.startswith("-") or not ref.strip():
        raise missing
    remotes = _git(root, "remote").split()
    if not remotes:
        raise LaunchError(f"--git-ref={shown}: {root} has no remote to get it from; add one with `git remote add`")
    remote = "origin" if "origin" in remotes else remotes[0]
    url = without_login(_git(root, "remote", "get-url", remote).strip())
    listed = _git(root, "ls-remote", remote, f"refs/heads/{ref}", f"refs/tags/{ref}", f"refs/tags/{ref}^{{}}")
    found = {name: commit for commit, _, name in (line.partition("\t") for line in listed.splitlines())}
    for name in (f"refs/heads/{ref}", f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}"):
        if name in found:
            return found[name], url
    commit = _git_or_none(root, "rev-parse", "--verify", f"{ref}^{{commit}}") if _COMMIT.fullmatch(ref) else None
    if commit is None or not _git(root, "branch", "--remotes", "--contains", commit).strip():
        raise missing
    return commit, url


def without_login(url: str) -> str:
    """A remote's URL without user and password; the `git@` of ssh is neither, and stays."""
    return re.sub(r"^(https?://)[^/]*@", r"\1", url)


def _git(root: Path, *words: str) -> str:
    """What git prints.

    Raises:
        LaunchError: it is not installed, fails, or takes too long.
    """
    try:
        done = _run(root, *words)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"git {words[0]} took over {TIMEOUT_S} s; is the remote reachable?") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        reason = re.sub(r"//[^/\s]*@", "//", last)  # a remote's URL may hold a password
        raise LaunchError(f"git {words[0]} failed in {root}: {reason}")
    return done.stdout


def _git_or_none(folder: Path, *words: str) -> str | None:
    done = _run(folder, *words)
    return done.stdout.removesuffix("\n") if done.returncode == 0 else None


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    environment.setdefault("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise LaunchError("git is not installed; install it, for it says which code a run had") from error
