"""Parses the text that names a policy. The first step of resolving: text -> NpcUri -> `sources.py`.

Known here: a plain path, `file:///absolute/path`, `file://relative/path` and `builtin://<env>/<name>`. A path is taken
as it is written: nothing in it is percent-decoded.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from dataclasses import dataclass

from dual_policy_plugin.errors import NpcError

SCHEMES = ("file", "builtin")
LATER_SCHEMES = ("wandb", "s3", "gs", "http", "https")
"""Schemes that users may expect and this version does not read."""
MAX_LENGTH = 4096

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
_ONE_SLASH = re.compile(rf"({'|'.join(SCHEMES + LATER_SCHEMES)}):(?!//)", re.IGNORECASE)
_CREDENTIALS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*:/*)?[^/@]*@")
_BUILTIN = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")


@dataclass(kw_only=True, slots=True, frozen=True)
class NpcUri:
    """A parsed URI: `scheme` picks the function of `sources.SOURCES`, `path` is what that function looks for."""

    text: str
    """As the user wrote it."""
    scheme: str
    """file (also for a plain path) | builtin."""
    path: str
    """file: absolute, or relative to where the run was started. builtin: <env>/<name>."""


def parse_uri(text: str) -> NpcUri:
    """The parts of `text`.

    Raises:
        NpcError: it is empty, names an unknown scheme, holds credentials or letters that cannot be seen.
    """
    if not text.strip():
        raise NpcError("an NPC's URI is empty; name a file, a run directory or a builtin such as builtin://arena/weak")
    if len(text) > MAX_LENGTH:
        raise NpcError(f"the URI {text[:40]}... has {len(text)} characters; at most {MAX_LENGTH} are possible")
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            raise NpcError(f"the URI {text!a} holds the character U+{ord(letter):04X}, which cannot be seen")
    match = _SCHEME.fullmatch(text)
    if holds_credentials(text):
        raise NpcError("a URI holds a user name or password (...@...); leave it out and use the client's own login")
    if match is None:
        if (one := _ONE_SLASH.match(text)) is not None:
            raise NpcError(f"{text}: a scheme ends in two slashes, {one[1].lower()}://; for a file of this name use ./")
        return NpcUri(text=text, scheme="file", path=text)
    scheme, path = match[1].lower(), match[2]
    if scheme in LATER_SCHEMES:
        raise NpcError(f"{text}: this version reads files and builtin:// only; download the file and give its path")
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1)
        mend = f"did you mean {near[0]}://" if near else "use a path, file:// or builtin://"
        raise NpcError(f"{text}: unknown scheme {scheme}://; {mend}")
    if not path.strip("/"):
        raise NpcError(f"{text}: nothing follows {scheme}://")
    if scheme == "builtin" and _BUILTIN.fullmatch(path) is None:
        raise NpcError(f"{text}: a builtin is named builtin://<env>/<name>, for example builtin://arena/medium")
    return NpcUri(text=text, scheme=scheme, path=path)


def holds_credentials(text: str) -> bool:
    """Whether the part before the first slash looks like user@host or user:password@host."""
    match = _CREDENTIALS.match(text)
    # a plain file name may hold an @ (policy@3.pt); with a colon before it, it reads as user:password@host
    return match is not None and (match[1] is not None or ":" in match[0])
