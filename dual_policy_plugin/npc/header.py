"""What a `.safetensors` file says about itself, from its first bytes: no torch, no download.

Sources use it to give a Candidate its metadata: a local file is read by seeking, an S3 object by ranged GETs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.npc.candidates import flat_metadata

DESCRIPTION_KEY = "dual_policy"
MAX_HEADER_BYTES = 512 * 1024
"""As in `checkpoint.py`, which reads the whole file."""
FIRST_READ = 4096
"""Bytes of the first read: most headers are shorter, so one request is all."""

ReadRange = Callable[[int, int], bytes]
"""Gives the bytes from start up to, not including, stop."""


def read_description(read_range: ReadRange, size: int, *, where: str = "the file") -> dict[str, Any]:
    """What a policy file says about itself.

    Args:
        read_range: gives the file's bytes [start, stop).
        size: of the whole file, in bytes.
        where: the file's name, for messages.

    Returns:
        The fields of our description (architecture, args, observation_space, actions, metadata; absent in a foreign
        file), `parameters` (how many numbers its tensors have), and `flat`: the plain facts for Candidate.metadata.

    Raises:
        CheckpointError: it is no .safetensors file, or its header is malformed.
    """
    if size < 10:
        raise CheckpointError(f"{where}: {size} bytes are too few for a policy file; copy it again")
    data = read_range(0, min(size, FIRST_READ))
    if len(data) < 10 or data[8:9] != b"{":
        raise CheckpointError(f"{where}: it is no .safetensors file: no header stands at its beginning")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: its header claims {length} bytes, the bound is {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise CheckpointError(
            f"{where}: it is cut short: its header claims {length} bytes, the file has {size} in all; copy it again"
        )
    if 8 + length > len(data):
        data += read_range(len(data), 8 + length)
    if len(data) < 8 + length:
        raise CheckpointError(f"{where}: only {len(data)} bytes of its {8 + length} byte header came; copy it again")
    header = _parse(data[8 : 8 + length], "its header", where)
    metadata = header.pop("__metadata__", {})
    text = metadata.get(DESCRIPTION_KEY) if type(metadata) is dict else None
    if text is not None and type(text) is not str:
        raise CheckpointError(f"{where}: its header's __metadata__ must map names to strings")
    description = {} if text is None else _parse(text, "the description of the policy", where)
    description["parameters"] = sum(_num_numbers(entry, where) for entry in header.values())
    description["flat"] = _flat(description)
    return description


def _flat(description: dict[str, Any]) -> dict[str, Any]:
    """The facts that a table of policies and a selector need, ours before those that the file's author chose."""
    facts: dict[str, Any] = {"parameters": description["parameters"]}
    if type(architecture := description.get("architecture")) is str:
        facts["architecture"] = architecture
    if type(space := description.get("observation_space")) is dict:
        shape = space.get("shape")
        sizes = "x".join(str(size) for size in shape[:4]) if type(shape) is list else ""
        facts["observations"] = f"{space.get('kind')} {sizes}".strip()
    if type(actions := description.get("actions")) is list:
        facts["actions"] = len(actions)
    metadata = description.get("metadata")
    return flat_metadata(facts) | {
        name: value
        for name, value in flat_metadata(metadata if type(metadata) is dict else {}).items()
        if name not in facts
    }


def _num_numbers(entry: Any, where: str) -> int:
    shape = entry.get("shape") if type(entry) is dict else None
    if (
        type(shape) is not list
        or len(shape) > 8
        or any(type(size) is not int or not 0 <= size < 2**40 for size in shape)
    ):
        raise CheckpointError(f"{where}: its header has a tensor without a possible shape")
    return math.prod(shape)


def _parse(text: str | bytes, what: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`; duplicate keys and numbers that are not finite are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError("a number is not finite")
        return number

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:160] if type(error) is ValueError else "malformed"
        raise CheckpointError(f"{where}: {what} is not valid JSON: {reason}") from error
    if type(value) is not dict:
        raise CheckpointError(f"{where}: {what} must be a JSON object, not {type(value).__name__}")
    return value
