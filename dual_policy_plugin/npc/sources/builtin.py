"""Policies that come with the package: scripts, and weights under `builtin/<env>/`."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from dual_policy_plugin.errors import NpcNotFoundError
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.sources import local
from dual_policy_plugin.npc.uri import NpcUri

ROOT = Path(__file__).resolve().parents[2] / "builtin"
"""Package data: <env>/<name>.safetensors."""
SCRIPTS = {"arena": ("random", "forager", "hunter")}
"""Builtins that are code, not weights."""


def find(uri: NpcUri, base: Path | None, *, root: Path = ROOT) -> Candidate:
    """The package's own policy <env>/<name>: a script, or a file under `root`."""
    env, name = uri.path.split("/")
    text = f"builtin://{uri.path}"
    if name in SCRIPTS.get(env, ()):
        return Candidate(name=name, uri=text, script=name, metadata={"architecture": name})
    path = root / env / f"{name}.safetensors"
    if path.is_file():
        return replace(local.describe(path), name=name, uri=text, created="")
    known = known_names(root)
    near = difflib.get_close_matches(uri.path, known, n=1)
    mend = f"did you mean builtin://{near[0]}? " if near else ""
    raise NpcNotFoundError(f"{uri.text}: no such builtin; {mend}there are {', '.join(known)}")


def known_names(root: Path = ROOT) -> list[str]:
    """<env>/<name> of each policy that comes with the package; scripts first."""
    scripts = [f"{env}/{script}" for env, scripts in SCRIPTS.items() for script in scripts]
    return scripts + [f"{path.parent.name}/{path.stem}" for path in sorted(root.glob("*/*.safetensors"))]


def collection(uri: NpcUri, base: Path | None) -> list[Candidate]:
    """The one that is named; builtins have no versions."""
    return [find(uri, base)]


def fetch(candidate: Candidate) -> bytes:
    """The file's bytes; empty for a script."""
    return local.fetch(candidate)
