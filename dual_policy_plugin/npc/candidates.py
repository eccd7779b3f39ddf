"""A policy that was found but not yet fetched, and the plain facts about it that selectors read.

Sources make Candidates, `selector.py` chooses among them, `resolver.py` pins the chosen ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_METADATA_KEYS = 256
MAX_METADATA_TEXT = 256

_SECRET_NAME = re.compile(
    r"(?:^|[_.\W])(?:pass(?:word|wd|phrase)?|secret|credentials?|authorization|token|signature"
    r"|(?:api|access|private|secret)?_?key)(?:$|[_.\W])",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"://[^/\s]*@|[?&][^=&\s]*(?:signature|credential|token|key|secret|sig)[^=&\s]*=|\b(?:bearer|basic) \S{8}",
    re.IGNORECASE,
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Candidate:
    """One policy that a URI may mean."""

    name: str
    """In logs and metrics: letters, digits, _ . -"""
    uri: str
    """Immutable: wandb://entity/project/type/name:v7, s3://bucket/key[?versionId=...], file:///abs/model_0042.safetensors,
    builtin://arena/medium."""
    version: int | None = None
    """W&B version, epoch of model_<epoch>; None: unknown, or not comparable with the others'."""
    created: str = ""
    """ISO 8601 in UTC; empty: unknown."""
    num_bytes: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Flat (see `flat_metadata`): epoch, step, architecture, run, ..., and metrics by their names; read without
    downloading the policy."""
    path: Path | None = None
    """A local file."""
    script: str | None = None
    """Name of a scripted policy; None where there are weights."""
    etag: str = ""
    """What a fetch insists on: an S3 ETag, a W&B file's md5; empty: nothing."""


def flat_metadata(metadata: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The plain values of `metadata` by name: nested names are joined by dots, those under `metrics` stand alone.

    What is no finite number, short text or truth value is left out, lists too; at most MAX_METADATA_KEYS stay. So is
    text with ${ or of ???, which a config that records the metadata would take for its own, and text that
    looks like a secret (a password, a key, a signed URL): metadata goes into lock files and logs.
    """
    flat: dict[str, str | int | float | bool] = {}

    def walk(node: Mapping[str, Any], prefix: str, depth: int) -> None:
        for key, value in node.items():
            if type(key) is not str or not key or not _is_plain(name := f"{prefix}{key}"):
                continue
            if len(flat) >= MAX_METADATA_KEYS:
                return
            if isinstance(value, Mapping):
                if depth < 4:
                    walk(value, "" if name == "metrics" else f"{name}.", depth + 1)
            elif isinstance(value, str):
                if _is_plain(value) and not _is_secret(name, value):
                    flat.setdefault(name, value)
            elif _is_number(value):
                flat.setdefault(name, value)

    walk(metadata, "", 0)
    return flat


def _is_number(value: object) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (isinstance(value, int) and abs(value) < 2**63)


def _is_plain(text: str) -> bool:
    return text.isprintable() and len(text) <= MAX_METADATA_TEXT and "${" not in text and text != "???"


def _is_secret(name: str, text: str) -> bool:
    return _SECRET_NAME.search(name) is not None or _SECRET_TEXT.search(text) is not None
