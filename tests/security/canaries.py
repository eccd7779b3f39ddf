"""Canaries: secrets of a user that nothing may give away, where a user has them, and the search for them.

A canary is searched for in all bytes, as it stands and as base64, hex, a URL, JSON, YAML or a shell has it, also inside
gzip and zip. What a process was started with is read from /proc while it runs.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, quote_plus

LOOK_S = 0.03


def _canary(name: str, length: int = 40) -> str:
    """A text that nobody else has, the same in every run."""
    return hashlib.sha256(f"canary {name}".encode()).hexdigest()[:length]


ENVIRONMENT = {
    name: _canary(name)
    for name in (
        "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GITHUB_TOKEN",
        "GIT_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "MY_SECRET", "CHAINED_SECRET", "USER_FILE_SECRET",
        "LISTED_SECRET", "DB_PASSWORD",
    )
} | {"ODD_SECRET": f"{_canary('odd', 20)}/+&= %'\"{_canary('odder', 20)}"}  # fmt: skip
"""Variable -> canary; the last six are named in configs."""
IN_URLS = {name: _canary(f"in {name}") for name in ("HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY")}
"""Variable that holds a URL -> the password in it."""
IN_FILES = {
    name: _canary(name)
    for name in (
        "netrc wandb login", "netrc wandb password", "netrc other login", "netrc other password", "aws id",
        "aws secret", "aws token", "gh token", "git credentials", "huggingface", "wandb settings", "git remote",
    )
}  # fmt: skip
"""What stands in files of the user's home, and the last in a checkout's .git/config."""
CANARIES = ENVIRONMENT | IN_URLS | IN_FILES


def plant(home: Path) -> dict[str, str]:
    """Writes the files of a user's home; gives the variables of the user's shell."""
    kept = IN_FILES
    files = {
        ".netrc": f"machine api.wandb.ai login {kept['netrc wandb login']} password {kept['netrc wandb password']}\n"
        f"machine example.org login {kept['netrc other login']} password {kept['netrc other password']}\n",
        ".aws/credentials": f"[default]\naws_access_key_id={kept['aws id']}\naws_secret_access_key={kept['aws secret']}"
        f"\naws_session_token={kept['aws token']}\n",
        ".config/gh/hosts.yml": f"github.com:\n  oauth_token: {kept['gh token']}\n",
        ".config/wandb/settings": f"[default]\napi_key = {kept['wandb settings']}\n",
        ".git-credentials": f"https://me:{kept['git credentials']}@example.org\n",
        ".cache/huggingface/token": kept["huggingface"],
    }
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(text)
    proxies = {name: f"http://me:{value}@127.0.0.1:9" for name, value in IN_URLS.items()}
    proxies |= {name.lower(): value for name, value in proxies.items()}
    local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    return {**ENVIRONMENT, **proxies, **local, "HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true"}


def forms(secret: str) -> set[bytes]:
    """The secret as it may stand in bytes: itself, as texts are quoted, in hex, in base64 at any place of a text."""
    texts = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}
    texts |= {
        secret.replace('"', '\\"'),
        secret.replace("&", "\\u0026").replace('"', '\\"'),
        secret.replace("'", "''"),
        secret.replace("'", "'\"'\"'"),
    }
    found = {text.encode() for text in texts} | {secret.encode().hex().encode()}
    for shift in range(3):  # the letters at both ends depend on what is beside
        letters = base64.b64encode(b"\0" * shift + secret.encode())[4 if shift else 0 : -4]
        found |= {letters, letters.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


_FORMS = {name: forms(secret) for name, secret in CANARIES.items()}


def found_in(data: bytes) -> list[str]:
    """Names of the canaries in `data`, and in what it holds compressed."""
    parts = [data, *_unpacked(data)]
    return [name for name, ways in _FORMS.items() if any(way in part for part in parts for way in ways)]


def _unpacked(data: bytes) -> Iterator[bytes]:
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def found_under(folder: Path, *, besides: Iterable[Path] = ()) -> list[str]:
    """`file: canary` for every canary in the bytes or the name of a file under `folder`, besides some."""
    left_out, found = list(besides), []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(path.is_relative_to(one) for one in left_out):
            name = path.relative_to(folder)
            found += [f"{name}: {one}" for one in found_in(path.read_bytes() + b"\n" + str(name).encode())]
    return found


class Watch:
    """What the processes of this machine were started with, as everybody on it can read that."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        """The command lines, with NUL between their words."""
        self._is_over = threading.Event()

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            for name in os.listdir("/proc"):
                if name.isdecimal():
                    try:
                        self.seen.add(Path(f"/proc/{name}/cmdline").read_bytes())
                    except OSError:  # it has ended
                        continue

    @contextmanager
    def on(self) -> Iterator[Watch]:
        """Looks for as long as the context is."""
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()

    def found(self) -> list[str]:
        """`command line: canary` for every canary in one."""
        return [f"{line[:200]!r}: {name}" for line in sorted(self.seen) for name in found_in(line)]
