"""Ten thousand malformed policy files, each by a number: mutations of one valid file that no loader may accept.

Every kind breaks something that the format promises, so a file that loads is a defect of ours; the mutation says
which words the refusal must hold. Bytes of the weights themselves are another matter: any finite number is a weight,
and the digest of the pinned file is what tells such a change.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dual_policy_plugin.checkpoint import DESCRIPTION_KEY, PolicyFile, encode_policy
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.types import ObservationSpace

ACTIONS = ("noop", "north", "south", "attack")
ARGS = {"hidden_size": 256}
SPACE = ObservationSpace(
    kind="window",
    shape=(128,),
    features=("empty", "wall", "mine", "altar", "ally", "foe"),
    window=(11, 11),
    own=("ore", "hearts"),
    scales=(1.0, 8.0),
)
KIB = 1024
HUGE_HEADER = 200 * KIB**2

Header = dict[str, Any]
Mutation = tuple[str, Callable[[], bytes], str]
"""(kind, the file's bytes, a regular expression for its refusal)."""


@functools.cache
def make_policy_file() -> PolicyFile:
    """A policy of an architecture of ours, with its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = build_policy("mlp", ARGS, SPACE, ACTIONS)
    return PolicyFile(
        architecture="mlp",
        args=ARGS,
        observation_space=SPACE,
        actions=ACTIONS,
        tensors=net.state_dict(),
        metadata={"step": 1000, "epoch": 3, "metrics": {"dual_policy/win_rate": 0.5}},
    )


@functools.cache
def valid() -> bytes:
    """The file that all others differ from."""
    return encode_policy(make_policy_file())


def header_size() -> int:
    return int.from_bytes(valid()[:8], "little")


def with_header(change: Callable[[Header], None]) -> bytes:
    """The valid file after `change` of its header; the tensors' bytes as they were."""
    header = json.loads(valid()[8 : 8 + header_size()])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + valid()[8 + header_size() :]


def with_description(change: Callable[[Header], None]) -> bytes:
    def inside(header: Header) -> None:
        description = json.loads(header["__metadata__"][DESCRIPTION_KEY])
        change(description)
        header["__metadata__"][DESCRIPTION_KEY] = json.dumps(description)

    return with_header(inside)


def tensor_entries() -> dict[str, Header]:
    header = json.loads(valid()[8 : 8 + header_size()])
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def mutations(seed: int) -> Iterator[Mutation]:
    """An endless stream: the kinds in turn, each with other numbers every time."""
    kinds = [kind(random.Random(f"{seed} {kind.__name__}")) for kind in KINDS]
    for kind in itertools.cycle(range(len(kinds))):
        yield (KINDS[kind].__name__.replace("_", " "), *next(kinds[kind]))


def truncations(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """At every 4 KiB first, then anywhere."""
    data = valid()
    sizes = itertools.chain(range(0, len(data), 4 * KIB), iter(lambda: rng.randrange(len(data)), None))
    for size in sizes:
        yield lambda size=size: data[:size], r"cut short|too few"


def header_length_lies(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    true = header_size()
    edges = [0, 1, true - 1, true + 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, HUGE_HEADER]
    for length in itertools.chain(
        edges, iter(lambda: rng.choice((rng.getrandbits(64), rng.randrange(4 * true))), None)
    ):
        if length != true:
            yield (
                lambda length=length: struct.pack("<Q", length) + valid()[8:],
                r"not valid JSON|cut short|the bound is|no \.safetensors|starts at byte|bytes follow",
            )


def wrong_offsets(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """Overlapping, swapped, beyond the end, backwards, negative, no integers."""
    names = list(tensor_entries())
    while True:
        name, shift = rng.choice(names), rng.choice((-(2**62), -4096, -4, -1, 1, 3, 4, 4096, 2**31, 2**63, 2**80))
        which = rng.randrange(6)

        def change(header: Header, name: str = name, shift: int = shift, which: int = which) -> None:
            begin, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = [
                [begin + shift, end + shift],
                [begin + shift, end],
                [begin, end + shift],
                [end, begin],
                [float(begin), end],
                [begin, end, end],
            ][which]

        yield (
            functools.partial(with_header, change),
            r"starts at byte|cut short|takes \d+ bytes|not a short list|cannot be",
        )


def missing_tensors(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """A tensor that is gone with its bytes, so that the file is sound, and one whose bytes stayed."""
    names = list(make_policy_file().tensors)
    while True:
        gone = rng.sample(names, rng.randint(1, len(names) - 1))

        def rewritten(gone: list[str] = gone) -> bytes:
            file = make_policy_file()
            tensors = {name: tensor for name, tensor in file.tensors.items() if name not in gone}
            return reencoded(tensors)

        yield rewritten, r"lacks \w"

        def orphaned(header: Header, gone: list[str] = gone) -> None:
            for name in gone:
                del header[name]

        yield functools.partial(with_header, orphaned), r"starts at byte|bytes follow"


def duplicate_and_unknown_tensors(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """A name that stands twice in the header, two tensors on the same bytes, and a tensor too many."""
    entries = tensor_entries()
    while True:
        name = rng.choice(list(entries))
        text = valid()[8 : 8 + header_size()].rstrip(b" ")
        twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}}}".encode()
        yield (
            lambda twice=twice: struct.pack("<Q", len(twice)) + twice + valid()[8 + header_size() :],
            r"stands there twice",
        )

        other = f"{name}.{rng.randrange(10**6)}"

        def doubled(header: Header, name: str = name, other: str = other) -> None:
            header[other] = header[name]

        yield functools.partial(with_header, doubled), r"starts at byte"
        extra = {other: torch.zeros(rng.randint(1, 9))}
        yield lambda extra=extra: reencoded(make_policy_file().tensors | extra), r"has unexpected"
        renamed = {other if key == name else key: tensor for key, tensor in make_policy_file().tensors.items()}
        yield lambda renamed=renamed: reencoded(renamed), r"lacks \w"


def wrong_dtypes(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """Another or an unknown dtype in the header, and a sound file whose tensor is of whole numbers."""
    names = list(tensor_entries())
    while True:
        name = rng.choice(names)
        dtype = rng.choice(
            ("F64", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "f32", "", "os.system", None, 32, ["F32"])
        )

        def change(header: Header, name: str = name, dtype: Any = dtype) -> None:
            header[name]["dtype"] = dtype

        yield functools.partial(with_header, change), r"has dtype|takes \d+ bytes"
        kind = rng.choice((torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool))
        whole = make_policy_file().tensors | {name: torch.zeros(tuple(tensor_entries()[name]["shape"]), dtype=kind)}
        yield lambda whole=whole: reencoded(whole), r"other shapes than its architecture"


def wrong_shapes(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """Shapes that do not fit the bytes, and a sound file whose tensor does not fit the architecture."""
    names = list(tensor_entries())
    while True:
        name = rng.choice(names)
        size = rng.choice((-1, -(2**40), 2**31, 2**62, 2**70, 10**30, 1.5, True, None, "4", 10**4000))

        def change(header: Header, name: str = name, size: Any = size) -> None:
            header[name]["shape"] = [*header[name]["shape"], size]

        yield functools.partial(with_header, change), r"not a short list|cannot be|takes \d+ bytes|not valid JSON"

        def deep(header: Header, name: str = name, times: int = rng.randint(9, 999)) -> None:
            header[name]["shape"] = [1] * times

        yield functools.partial(with_header, deep), r"not a short list"
        shape = (*tensor_entries()[name]["shape"], rng.randint(2, 3))
        other = make_policy_file().tensors | {name: torch.zeros(shape)}
        yield lambda other=other: reencoded(other), r"other shapes than its architecture"


def not_finite(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """One weight of the file is a NaN of some payload, or an infinity."""
    begin, length = 8 + header_size(), len(valid()) - 8 - header_size()
    while True:
        place = begin + 4 * rng.randrange(length // 4)
        bits = 0x7F800000 | rng.choice((0, 1, 0x400000, rng.getrandbits(23))) | rng.choice((0, 1 << 31))
        yield lambda place=place, bits=bits: replaced(place, struct.pack("<I", bits)), r"not finite"


def broken_headers(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """Bytes that are put into the header or taken out of it, so that all that follows is displaced; broken UTF-8."""
    parts = r"not valid JSON|cut short|bytes follow|starts at byte|takes \d+ bytes|must |has dtype|no \.safetensors"
    reason = parts + "|lacks|holds|cannot"
    while True:
        place, size = 8 + rng.randrange(header_size()), rng.randint(1, 32)
        yield lambda place=place, size=size: valid()[:place] + valid()[place + size :], reason
        more = rng.choice((rng.randbytes(size), b" " * size, b"{" * size, b"[" * size, b'"' * size, b"\\u0000"))
        yield lambda place=place, more=more: valid()[:place] + more + valid()[place:], reason
        yield lambda place=place: replaced(place, b"\xff"), r"not valid JSON|no \.safetensors"


def wrong_descriptions(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """A field of the description that is gone, added, or of another type; a text that is no description."""
    fields = ("format", "architecture", "args", "observation_space", "actions", "metadata")
    wrong = (None, [], "", 0, -1, 2**70, 1.5, True, [[]], [None], {"os.system": 1}, "os.system", ["a\n"], {"": {}})
    while True:
        field, value = rng.choice(fields), rng.choice(wrong)

        def gone(description: Header, field: str = field) -> None:
            del description[field]

        def added(description: Header, name: str = f"import_{rng.randrange(10**6)}") -> None:
            description[name] = "os.system"

        yield functools.partial(with_description, gone), r"must have the fields"
        yield functools.partial(with_description, added), r"must have the fields"
        if not (field == "metadata" and isinstance(value, dict)):

            def other(description: Header, field: str = field, value: Any = value) -> None:
                description[field] = value

            yield (
                functools.partial(with_description, other),
                r"must |format version|is no setting|not known|holds|cannot|lacks",
            )
        key = rng.choice(("kind", "shape", "features", "window", "own", "scales"))

        def space(description: Header, key: str = key, value: Any = value) -> None:
            description["observation_space"][key] = value

        if value != [] or key not in ("own", "scales"):  # these may be empty
            yield functools.partial(with_description, space), r"observation_space"
        text = rng.choice(("", "null", "[]", "NaN", '{"a":1,"a":2}', "[" * rng.randint(1, 99999), "1" * 5000, "\ud800"))
        yield (
            lambda text=text: with_header(lambda header: header["__metadata__"].update({DESCRIPTION_KEY: text})),
            r"not valid JSON|must be a JSON object",
        )


def promises_of_a_larger_net(rng: random.Random) -> Iterator[tuple[Callable[[], bytes], str]]:
    """Arguments for which the architecture would take gigabytes, in a file of the weights of a small one."""
    while True:
        size = rng.choice((10**5, 10**6, 10**9, 2**62, 2**80, -1, 0, rng.randint(10**4, 10**6)))

        def change(description: Header, size: int = size) -> None:
            description["args"]["hidden_size"] = size

        yield functools.partial(with_description, change), r"other shapes|cannot be built"


KINDS: tuple[Callable[[random.Random], Iterator[tuple[Callable[[], bytes], str]]], ...] = (
    truncations,
    header_length_lies,
    wrong_offsets,
    missing_tensors,
    duplicate_and_unknown_tensors,
    wrong_dtypes,
    wrong_shapes,
    not_finite,
    broken_headers,
    wrong_descriptions,
    promises_of_a_larger_net,
)


def replaced(place: int, data: bytes) -> bytes:
    """The valid file with other bytes at one place."""
    return valid()[:place] + data + valid()[place + len(data) :]


def reencoded(tensors: dict[str, torch.Tensor]) -> bytes:
    """A sound file with the valid file's description and these tensors."""
    return encode_policy(replace(make_policy_file(), tensors=tensors))


def huge_header() -> bytes:
    """A file that really has a header of 200 MB."""
    return struct.pack("<Q", HUGE_HEADER) + b"{" + b" " * (HUGE_HEADER - 2) + b"}" + bytes(64)
