"""The policy file: bytes of a `.safetensors` file <-> a PolicyFile.

Stands between `npc/` (which gives verified bytes) and `policies/loading.py` (which builds the net). Nothing here runs
code that a file names: the header is JSON, checked by hand, and the weights are plain numbers. The file is read from
memory, so the bytes that were hashed are the bytes that are parsed. Foreign `.pt` files are read by `torch_file.py`.

Layout: 8 bytes little-endian header length, a JSON header {tensor name: {dtype, shape, data_offsets}}, the tensors'
bytes. Our own description is one JSON string under `__metadata__.dual_policy` (DESCRIPTION_KEY).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.types import SPACE_KINDS, ObservationSpace

FORMAT_VERSION = 1
DESCRIPTION_KEY = "dual_policy"
MAX_HEADER_BYTES = 512 * 1024
"""Bound of the JSON header: parsing JSON takes up to 25 times its size in memory."""
MAX_OBSERVATION_ENTRIES = 2**20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DESCRIPTION_FIELDS = ("format", "architecture", "args", "observation_space", "actions", "metadata")
_SPACE_FIELDS = ("kind", "shape", "features", "window", "own", "scales")


@dataclass(kw_only=True, slots=True, frozen=True)
class PolicyFile:
    """All that a policy file holds."""

    architecture: str
    """Name of the net: fast, mlp, or an installed entry point of the group dual_policy.policies."""
    args: dict[str, Any]
    """Arguments of the architecture; plain JSON."""
    observation_space: ObservationSpace
    """What the policy was made to see (its own space, not the env's)."""
    actions: tuple[str, ...]
    """Names of the logits, in their order."""
    tensors: dict[str, Tensor]
    """The net's state dict, on the CPU; normalisation statistics among them."""
    metadata: dict[str, Any]
    """step, epoch, metrics, run, npcs=[{name, uri, sha256}], ...; plain JSON, finite numbers."""


def encode_policy(file: PolicyFile) -> bytes:
    """The bytes of `file`: the same content gives the same bytes.

    Raises:
        CheckpointError: the content is not plain JSON, holds a number that is not finite, or would not load again.
    """
    where = f"policy {short(file.architecture)}"
    check_tensors(file.tensors, where)
    check_space(file.observation_space, where)
    _names(list(file.actions), "actions", where)
    for key, value in (("args", file.args), ("metadata", file.metadata)):
        _check_plain(value, key, where)
    space = asdict(file.observation_space) | {"scales": [float(scale) for scale in file.observation_space.scales]}
    description = {
        "format": FORMAT_VERSION,
        "architecture": file.architecture,
        "args": file.args,
        "observation_space": space,
        "actions": file.actions,
        "metadata": file.metadata,
    }
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # clone: tensors that share memory are written once each
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in file.tensors.items()}
    data = safetensors.torch.save(tensors, metadata={DESCRIPTION_KEY: text})
    if (size := int.from_bytes(data[:8], "little")) > MAX_HEADER_BYTES:
        _fail(where, f"its description takes {size} bytes, the bound is {MAX_HEADER_BYTES}; shorten its metadata")
    return data


def decode_policy(data: bytes, where: str) -> PolicyFile:
    """The policy in `data`, every byte of its header checked and every weight finite.

    Args:
        data: the whole file.
        where: the file's name, for messages.

    Raises:
        CheckpointError: anything malformed, with the reason in one line.
    """
    metadata, tensors = read_safetensors(data, where)
    text = metadata.get(DESCRIPTION_KEY)
    if text is None:
        _fail(where, "it holds weights but no description of the policy; convert it with `dual-policy import`")
    description = _parse_json(text, "the description of the policy", where)
    _fields(description, _DESCRIPTION_FIELDS, "the description", where)
    version = description["format"]
    if type(version) is not int or version != FORMAT_VERSION:
        _fail(where, f"its format version is {short(version)}, this package reads {FORMAT_VERSION}; upgrade it")
    for key, kind in (("architecture", str), ("args", dict), ("metadata", dict)):
        if type(description[key]) is not kind:
            _fail(where, f"{key} must be a {kind.__name__}, not {type(description[key]).__name__}")
    return PolicyFile(
        architecture=description["architecture"],
        args=description["args"],
        observation_space=_decode_space(description["observation_space"], where),
        actions=_names(description["actions"], "actions", where),
        tensors=tensors,
        metadata=description["metadata"],
    )


def read_safetensors(data: bytes, where: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's metadata and the tensors of a safetensors file, each tensor a copy of its bytes.

    Raises:
        CheckpointError: as `decode_policy`.
    """
    start, header = _read_header(data, where)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        _fail(where, "its header's __metadata__ must map names to strings")
    tensors: dict[str, Tensor] = {}
    position = 0
    entries = [(*_check_entry(name, entry, where), name) for name, entry in header.items()]
    for begin, end, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        if begin != position:
            _fail(where, f"tensor {short(name)} starts at byte {begin} of the data, expected {position}")
        if end > len(data) - start:
            _fail(
                where, f"it is cut short: tensor {short(name)} ends at byte {start + end} of {len(data)}; copy it again"
            )
        tensors[name] = _copy_tensor(data, start + begin, start + end, dtype, shape)
        position = end
    if start + position != len(data):
        _fail(where, f"{len(data) - start - position} bytes follow its last tensor")
    check_tensors(tensors, where)
    return metadata, dict(sorted(tensors.items()))


def _read_header(data: bytes, where: str) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes start, and the parsed header."""
    if len(data) < 10:
        _fail(where, f"{len(data)} bytes are too few for a policy file; copy it again")
    size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":
        _fail(where, "it is no .safetensors file: no header stands at its beginning")
    if size > MAX_HEADER_BYTES:
        _fail(where, f"its header claims {size} bytes, the bound is {MAX_HEADER_BYTES}")
    if 8 + size > len(data):
        _fail(where, f"it is cut short: its header claims {size} bytes, the file has {len(data)} in all; copy it again")
    return 8 + size, _parse_json(data[8 : 8 + size], "its header", where)


def _parse_json(text: str | bytes, what: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`; duplicate keys and numbers that are not finite are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (name := _first_twice(name for name, _ in pairs)) is not None:
            raise ValueError(f"{short(name)} stands there twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{short(text)} is not a finite number")
        return number

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        _fail(where, f"{what} is not valid JSON: {one_line(error)}")
    if type(value) is not dict:
        _fail(where, f"{what} must be a JSON object, not {type(value).__name__}")
    return value


def _check_entry(name: str, entry: Any, where: str) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one tensor of the header, in agreement with each other."""
    _fields(entry, ("dtype", "shape", "data_offsets"), f"tensor {short(name)}", where)
    if type(entry["dtype"]) is not str or entry["dtype"] not in _DTYPES:
        _fail(where, f"tensor {short(name)} has dtype {short(entry['dtype'])}, known are {', '.join(_DTYPES)}")
    for key in ("shape", "data_offsets"):
        value = entry[key]
        if type(value) is not list or len(value) > 8 or any(type(i) is not int or not 0 <= i < 2**40 for i in value):
            _fail(where, f"tensor {short(name)}: {key} {short(value)} is not a short list of sizes")
    if len(entry["data_offsets"]) != 2 or math.prod(max(size, 1) for size in entry["shape"]) >= 2**40:
        _fail(where, f"tensor {short(name)}: shape {short(entry['shape'])} at {short(entry['data_offsets'])} cannot be")
    dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if (size := math.prod(entry["shape"]) * dtype.itemsize) != end - begin:
        _fail(where, f"tensor {short(name)}: shape {entry['shape']} takes {size} bytes, it has {end - begin}")
    return begin, end, dtype, tuple(entry["shape"])


def _copy_tensor(data: bytes, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor with its own copy of data[begin:end]."""
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(memoryview(data)[begin:end]), dtype=dtype).reshape(shape)


def check_tensors(tensors: dict[str, Tensor], where: str) -> None:
    """Raises a CheckpointError unless names are printable, dtypes are known and every number is finite."""
    if not tensors:
        _fail(where, "it holds no tensor")
    for name, tensor in tensors.items():
        if not name.isprintable() or not 0 < len(name) <= 256 or name == "__metadata__":
            _fail(where, f"{short(name)} cannot be the name of a tensor")
        if tensor.dtype not in _DTYPES.values():
            _fail(where, f"tensor {short(name)} has dtype {tensor.dtype}, known are {', '.join(_DTYPES)}")
        if tensor.numel() == 0:
            continue
        if tensor.dtype == torch.bool:
            is_sound = int(tensor.detach().view(torch.uint8).max()) <= 1
        else:  # aminmax hands NaN and infinity on and needs no memory
            is_sound = all(math.isfinite(bound) for bound in tensor.detach().aminmax())
        if not is_sound:
            _fail(
                where,
                f"tensor {short(name)} holds values that are not finite (NaN or infinity); take an earlier checkpoint",
            )


def check_space(space: ObservationSpace, where: str) -> None:
    """Raises a CheckpointError unless the parts of `space` agree with each other (see ObservationSpace)."""
    kind, shape, cells = space.kind, space.shape, space.window[0] * space.window[1]
    if kind not in SPACE_KINDS:
        _fail(where, f"observation_space.kind is {short(kind)}, known are {', '.join(SPACE_KINDS)}")
    _names(list(space.features), "observation_space.features", where)
    if space.own:
        _names(list(space.own), "observation_space.own", where)
    num_scales = {"window": len(space.own), "tokens": len(space.features), "vector": 0}[kind]
    is_sound = {
        "window": len(shape) == 1 and 0 < cells <= shape[0] - len(space.own) and len(space.features) <= 256,
        "tokens": len(shape) == 2 and shape[1] == 3 and cells > 0 and len(space.features) <= 256 and not space.own,
        "vector": len(shape) == 1 and shape[0] == len(space.features) and cells == 0 and not space.own,
    }[kind]
    if not is_sound or min(shape) < 1 or math.prod(shape) > MAX_OBSERVATION_ENTRIES or min(space.window) < 0:
        parts = f"shape {shape}, window {space.window}, {len(space.features)} features, {len(space.own)} own"
        _fail(where, f"observation_space of kind {kind} cannot have {short(parts, 120)}")
    if len(space.scales) not in (0, num_scales) or not all(math.isfinite(s) and s > 0 for s in space.scales):
        _fail(where, f"observation_space.scales must be {num_scales} finite numbers above 0")


def _decode_space(value: Any, where: str) -> ObservationSpace:
    """The space that `asdict` and JSON made `value` of."""
    _fields(value, _SPACE_FIELDS, "observation_space", where)
    for key, kinds in (("shape", (int,)), ("window", (int,)), ("scales", (int, float))):
        if type(value[key]) is not list or any(type(i) not in kinds or abs(i) > 2**40 for i in value[key]):
            _fail(where, f"observation_space.{key} {short(value[key])} is not a list of numbers")
    if len(value["window"]) != 2 or type(value["kind"]) is not str:
        _fail(where, "observation_space.window must be two numbers and observation_space.kind a str")
    space = ObservationSpace(
        kind=value["kind"],
        shape=tuple(value["shape"]),
        features=_names(value["features"], "observation_space.features", where),
        window=(value["window"][0], value["window"][1]),
        own=_names(value["own"], "observation_space.own", where) if value["own"] != [] else (),
        scales=tuple(float(scale) for scale in value["scales"]),
    )
    check_space(space, where)
    return space


def _names(value: Any, key: str, where: str) -> tuple[str, ...]:
    """`value` as a tuple of names: a list, not empty, of different printable strings."""
    if type(value) is not list or not value:
        _fail(where, f"{key} must be a list of names, not {short(value)}")
    for name in value:
        if type(name) is not str or not name.isprintable() or not 0 < len(name) <= 256:
            _fail(where, f"{key} holds {short(name)}, which is no name")
    if (name := _first_twice(value)) is not None:
        _fail(where, f"{key} names {short(name)} twice")
    return tuple(value)


def _first_twice(names: Iterable[str]) -> str | None:
    """The first name that has been there before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _fields(value: Any, names: tuple[str, ...], what: str, where: str) -> None:
    """Raises a CheckpointError unless `value` is an object with just these fields."""
    if type(value) is not dict or set(value) != set(names):
        found = ", ".join(short(name) for name in list(value)[:8]) if type(value) is dict else type(value).__name__
        _fail(where, f"{what} must have the fields {', '.join(names)}; found {found or 'none'}")


def _check_plain(value: Any, key: str, where: str) -> None:
    """Raises a CheckpointError unless `value` survives JSON: str keys, str, int, finite float, bool, None."""
    children: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        if any(type(name) is not str for name in value):
            _fail(where, f"{key} has a key that is no str")
        children = ((f"{key}.{name}", child) for name, child in value.items())
    elif isinstance(value, list | tuple):
        children = ((f"{key}[{i}]", child) for i, child in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        _fail(where, f"{short(key)}={value} is not a finite number; leave it out or use null")
    elif not isinstance(value, str | int | float | bool | None):
        _fail(where, f"{short(key)} is a {type(value).__name__}; use plain numbers, strings, lists and dicts")
    for name, child in children:
        _check_plain(child, name, where)


def short(value: object, length: int = 60) -> str:
    """`value` for a message: on one line, printable, no longer than `length`."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


def one_line(error: BaseException) -> str:
    """The first line of an error's message, shortened, or its type where it has none."""
    return short(next(iter(str(error).strip().splitlines()), type(error).__name__), 160)


def _fail(where: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{where}: {reason}")
