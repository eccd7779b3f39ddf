"""What `dual-policy npc` says about one pinned policy: plain facts for JSON, cells and lines for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.npc.header import read_description
from dual_policy_plugin.npc.resolver import PinnedPolicy, read_verified

NOTHING = "-"
_VERSION = re.compile(r"wandb://.*:([^:/]+)|s3://.*\?versionId=(.+)|.*/model_0*(\d+)\.(?:safetensors|pt)")


def describe(pinned: PinnedPolicy) -> tuple[dict[str, Any], str | None]:
    """The facts of a pinned policy from its verified bytes, and what is wrong with its header, if anything.

    Returns:
        name, version, requested, uri, sha256, bytes, script, architecture, parameters, observations, actions (None
        where unknown) and metadata (flat); then a line, or None. A `.pt` file says nothing about itself: no line.
    """
    data, trouble = read_verified(pinned), None
    flat: dict[str, Any] = {}
    if pinned.script is None and not pinned.uri.partition("?")[0].endswith(".pt"):
        try:
            flat = read_description(lambda start, stop: data[start:stop], len(data), where=pinned.uri)["flat"]
        except CheckpointError as error:
            trouble = str(error)
    metadata = {**pinned.metadata, **flat}
    facts: dict[str, Any] = {
        "name": pinned.name,
        "version": version_of(pinned.uri),
        "requested": pinned.requested,
        "uri": pinned.uri,
        "sha256": pinned.sha256,
        "bytes": pinned.num_bytes,
        "script": pinned.script,
        "architecture": pinned.script,
        "parameters": None,
        "observations": None,
        "actions": None,
    }
    facts |= {
        key: metadata.pop(key) for key in ("architecture", "parameters", "observations", "actions") if key in metadata
    }
    return {**facts, "metadata": metadata}, trouble


def contents(pinned: PinnedPolicy) -> dict[str, Any]:
    """What the policy file holds, after every check that loading makes of the file itself.

    Returns:
        kind, args, observation_space, action_names, npcs (those it was trained against) and tensors.

    Raises:
        CheckpointError: the file is malformed.
    """
    empty: dict[str, Any] = {"args": {}, "observation_space": None, "action_names": [], "npcs": [], "tensors": []}
    if pinned.script is not None:
        return {"kind": "script of this package", **empty}

    from dataclasses import asdict

    from dual_policy_plugin.checkpoint import DESCRIPTION_KEY, decode_policy, read_safetensors
    from dual_policy_plugin.torch_file import decode_state_dict

    data = read_verified(pinned)
    if data[8:9] != b"{" and not pinned.uri.endswith(".safetensors"):
        tensors = decode_state_dict(data, pinned.uri)
        return {"kind": "state dict (.pt); checkpoint_npc.agent names its net", **empty, "tensors": _tensors(tensors)}
    metadata, tensors = read_safetensors(data, pinned.uri)
    if DESCRIPTION_KEY not in metadata:
        kind = "weights without a description; convert them with `dual-policy import`"
        return {"kind": kind, **empty, "tensors": _tensors(tensors)}
    file = decode_policy(data, pinned.uri)
    npcs = file.metadata.get("npcs")
    return {
        "kind": "policy file",
        "args": file.args,
        "observation_space": asdict(file.observation_space),
        "action_names": list(file.actions),
        "npcs": [npc for npc in npcs if isinstance(npc, dict)] if isinstance(npcs, list) else [],
        "tensors": _tensors(tensors),
    }


def as_lines(facts: Mapping[str, Any], held: Mapping[str, Any], *, with_tensors: bool) -> list[tuple[str, str]]:
    """Name and value of each fact of one policy, for people."""
    lines = [
        ("uri", facts["uri"]),
        ("kind", held["kind"]),
        ("sha256", facts["sha256"]),
        ("size", NOTHING if facts["script"] else f"{size(facts['bytes'])} ({facts['bytes']} bytes)"),
        ("architecture", cell(facts["architecture"])),
        ("args", json.dumps(held["args"]) if held["args"] else NOTHING),
        ("parameters", cell(facts["parameters"])),
        ("tensors", cell(len(held["tensors"]) or None)),
    ]
    space = held["observation_space"]
    if space is not None:
        names = ", ".join(space["features"])
        lines.append(("observations", f"{facts['observations']}, {len(space['features'])} features: {names}"))
        if space["own"]:
            lines.append(("own state", ", ".join(space["own"])))
        lines.append(("actions", f"{len(held['action_names'])}: {', '.join(held['action_names'])}"))
    lines += [(key, cell(value)) for key, value in facts["metadata"].items()]
    lines += [("trained against", " ".join(f"{key}={value}" for key, value in npc.items())) for npc in held["npcs"]]
    if with_tensors:
        lines += [(tensor["name"], f"{tensor['dtype']} {tuple(tensor['shape'])}") for tensor in held["tensors"]]
    return lines


def row(facts: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    """The cells of one policy in the table of `npc resolve`."""
    known = (facts["observations"], facts["actions"] and f"{facts['actions']} actions")
    return (
        facts["name"],
        cell(facts["version"]),
        cell(facts["metadata"].get("step")),
        cell(facts["metadata"].get(metric, facts.get(metric))),
        cell(facts["parameters"]),
        cell(facts["architecture"]),
        ", ".join(part for part in known if part) or NOTHING,
        facts["sha256"][:12],
        NOTHING if facts["script"] else size(facts["bytes"]),
        facts["uri"],
    )


def header(metric: str) -> Sequence[str]:
    """The names of the columns of `row`."""
    return ("Name", "Version", "Step", metric, "Parameters", "Architecture", "Spaces", "SHA-256", "Size", "URI")


def version_of(uri: str) -> str | None:
    """The version in an immutable URI: v7 of W&B, S3's version id, the epoch of model_<epoch>; None without one."""
    match = _VERSION.fullmatch(uri)
    return None if match is None else next(group for group in match.groups() if group is not None)


def cell(value: object) -> str:
    """A value in a table: `-` for None, six digits of a fraction."""
    return NOTHING if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def size(num_bytes: int) -> str:
    """A size for people, in powers of 1000."""
    amount, units = float(num_bytes), ["B", "kB", "MB", "GB"]
    while amount >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


def _tensors(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    ]
