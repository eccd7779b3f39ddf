"""Parses the text that names a policy. The first step of resolving: text -> NpcUri -> `sources/`.

    a plain path, file:///absolute/path, file://relative/path     a file or a folder of checkpoints
    builtin://<env>/<name>                                        comes with the package
    wandb://entity/project[/artifact_type]/name[:version]         a W&B artifact; no version means latest
    wandb://run/<name>[:version]                                  the model of a run (<run>, or <sweep>/<job>) in the
                                                                  default project
    wandb://entity/project                                        the runs of a project, for selectors
    s3://bucket/key[?versionId=...]    s3://bucket/prefix/        an object, or the objects under a prefix

Everything is taken as it is written: nothing is percent-decoded.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from dataclasses import dataclass

from dual_policy_plugin.errors import NpcError

SCHEMES = ("file", "builtin", "wandb", "s3")
LATER_SCHEMES = ("gs", "http", "https")
"""Schemes that users may expect and this version does not read."""
MAX_LENGTH = 4096
_EXAMPLES = {
    "file": "file:///absolute/path or file://relative/path",
    "builtin": "builtin://arena/medium",
    "wandb": "wandb://entity/project/artifact_type/name:version",
    "s3": "s3://bucket/key",
}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
_ONE_SLASH = re.compile(rf"({'|'.join(SCHEMES + LATER_SCHEMES)}):(?!//)", re.IGNORECASE)
_CREDENTIALS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*:/*)?[^/@]*@")
_LATER_CREDENTIALS = re.compile(r"[A-Za-z0-9+.-]+://.*[^/:@]:[^/:@]+@")
_BUILTIN = re.compile(r"[a-z0-9_]{1,64}/[a-z0-9_]{1,64}")
_WANDB_WORD = re.compile(r"(?!\.+$)[A-Za-z0-9_.-]{1,128}")
_WANDB_PROJECT = re.compile(r"(?![. ]+$)(?! )[A-Za-z0-9_. -]{1,128}(?<! )")
_BUCKET = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_VERSION_ID = re.compile(r"[A-Za-z0-9_.-]{1,1024}")
_VERSION_QUERY = "?versionId="
_SIGNED = re.compile(
    r"[?&][A-Za-z_-]*(x-amz-|accesskey|signature|token|key|secret|password|credential|sig=)", re.IGNORECASE
)


@dataclass(kw_only=True, slots=True, frozen=True)
class NpcUri:
    """A parsed URI: `scheme` picks the functions of `sources.SOURCES`, `path` is what those look for."""

    text: str
    """As the user wrote it."""
    scheme: str
    """file (also for a plain path) | builtin | wandb | s3."""
    path: str
    """file: absolute, or relative to where the run was started. builtin: <env>/<name>. wandb and s3: all behind
    the two slashes; `wandb_name` and `s3_name` take it apart."""


@dataclass(kw_only=True, slots=True, frozen=True)
class WandbName:
    """The parts of a wandb:// URI."""

    entity: str | None
    """None: the default entity (wandb://run/...)."""
    project: str | None
    """None: the default project (wandb://run/...)."""
    type: str | None
    """Type of the artifact; None: not said (model is meant)."""
    name: str | None
    """Name of the artifact; None: the runs of the project."""
    version: str = "latest"
    """v7, or an alias."""


@dataclass(kw_only=True, slots=True, frozen=True)
class S3Name:
    """The parts of an s3:// URI."""

    bucket: str
    key: str
    """The object's key, or a prefix: empty, or with a slash at its end."""
    version_id: str | None = None

    @property
    def is_prefix(self) -> bool:
        """Whether several objects are meant."""
        return not self.key or self.key.endswith("/")


def parse_uri(text: str) -> NpcUri:
    """The parts of `text`.

    Raises:
        NpcError: it is empty, names an unknown scheme, holds credentials or letters that cannot be seen, or is not as
            its scheme wants it.
    """
    if not text.strip():
        raise NpcError("an NPC's URI is empty; name a file, a run directory or a builtin such as builtin://arena/weak")
    if len(text) > MAX_LENGTH:
        raise NpcError(
            f"the URI {ascii(text[:40])[1:-1]}... has {len(text)} characters; at most {MAX_LENGTH} are possible"
        )
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            raise NpcError(f"the URI {text!a} holds the character U+{ord(letter):04X}, which cannot be seen")
    if "${" in text:
        raise NpcError(f"the URI {text} holds ${{, which configs take for an interpolation; rename what it names")
    match = _SCHEME.fullmatch(text)
    if match is not None and match[1].lower() != "file" and _SIGNED.search(text) is not None:
        raise NpcError("a URI holds a signature or token behind its ?; leave it out and use the client's own login")
    if holds_credentials(text):
        raise NpcError("a URI holds a user name or password (...@...); leave it out and use the client's own login")
    if match is None:
        if (one := _ONE_SLASH.match(text)) is not None:
            raise NpcError(f"{text}: a scheme ends in two slashes, {one[1].lower()}://; for a file of this name use ./")
        return NpcUri(text=text, scheme="file", path=text)
    scheme, path, shown = match[1].lower(), match[2], text.partition("?")[0]  # what follows a ? may be a secret
    if scheme in LATER_SCHEMES:
        raise NpcError(
            f"{shown}: {scheme}:// is not read; use a file, wandb:// or s3://, or download it and give its path"
        )
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1)
        mend = f"did you mean {near[0]}://" if near else "use a path, file://, builtin://, wandb:// or s3://"
        raise NpcError(f"{shown}: unknown scheme {scheme}://; {mend}")
    if not path.strip("/"):
        raise NpcError(f"{shown}: nothing follows {scheme}://; write {_EXAMPLES[scheme]}")
    if scheme == "builtin" and _BUILTIN.fullmatch(path) is None:
        raise NpcError(f"{shown}: a builtin is named builtin://<env>/<name>, for example builtin://arena/medium")
    uri = NpcUri(text=text, scheme=scheme, path=path)
    if scheme == "wandb":
        wandb_name(uri)
    elif scheme == "s3":
        s3_name(uri)
    return uri


def wandb_name(uri: NpcUri) -> WandbName:
    """The parts of a wandb:// URI.

    Raises:
        NpcError: it has too few or too many parts, or one that W&B cannot have.
    """
    shown = uri.text.partition("?")[0]
    body, colon, version = uri.path.removesuffix("/").partition(":")
    parts = body.split("/")
    if not all(
        _WANDB_WORD.fullmatch(part) or (i == 1 and _WANDB_PROJECT.fullmatch(part)) for i, part in enumerate(parts)
    ):
        raise NpcError(f"{shown}: a W&B name has letters, digits, _ . - only; copy it from `dual-policy runs`")
    if colon and _WANDB_WORD.fullmatch(version) is None:
        raise NpcError(f"{shown}: a version is v0, v1, ... or an alias such as latest or best")
    version = version or "latest"
    if len(parts) in (2, 3) and parts[0] == "run":  # a sweep's job is named <sweep>/<job>
        return WandbName(entity=None, project=None, type="model", name="/".join(parts[1:]), version=version)
    if len(parts) == 2 and not colon:
        return WandbName(entity=parts[0], project=parts[1], type=None, name=None)
    if len(parts) in (3, 4):
        kind = parts[2] if len(parts) == 4 else None
        return WandbName(entity=parts[0], project=parts[1], type=kind, name=parts[-1], version=version)
    raise NpcError(
        f"{shown}: a W&B artifact is named wandb://entity/project/artifact_type/name:version or wandb://run/<name>"
    )


def s3_name(uri: NpcUri) -> S3Name:
    """The parts of an s3:// URI.

    Raises:
        NpcError: no bucket can have this name, or the key has a `.` or `..` part.
    """
    bucket, _, key = uri.path.partition("/")
    shown = uri.text.partition("?")[0]
    if _BUCKET.fullmatch(bucket) is None:
        raise NpcError(f"{shown}: this bucket's name is not possible; an object is named s3://bucket/key")
    key, question, version_id = key.partition(_VERSION_QUERY)
    if question and _VERSION_ID.fullmatch(version_id) is None:
        raise NpcError(f"{shown}: nothing but the object's version can follow {_VERSION_QUERY}")
    if question and (not key or key.endswith("/")):
        raise NpcError(f"{shown}: {_VERSION_QUERY} goes with one object, this is a prefix; leave it out, or name a key")
    if any(part in (".", "..") for part in key.split("/")) or len(key.encode()) > 1024:
        raise NpcError(f"{shown}: a key has up to 1024 bytes and no part that is . or ..")
    return S3Name(bucket=bucket, key=key, version_id=version_id or None)


def holds_credentials(text: str) -> bool:
    """Whether the part before the first slash looks like user@host, or any part of a URI like user:password@host."""
    match = _CREDENTIALS.match(text)
    if _LATER_CREDENTIALS.match(text) is not None:
        return True
    # a plain file name may hold an @ (policy@3.pt); with a colon before it, it reads as user:password@host
    return match is not None and (match[1] is not None or ":" in match[0])
