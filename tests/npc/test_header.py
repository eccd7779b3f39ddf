"""What a policy file says about itself, by ranged reads; and headers that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin import checkpoint
from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.npc.header import DESCRIPTION_KEY, FIRST_READ, MAX_HEADER_BYTES, read_description
from dual_policy_plugin.npc.sources import builtin

MEDIUM = (builtin.ROOT / "arena/medium.safetensors").read_bytes()


def ranged(data: bytes, reads: list[tuple[int, int]] | None = None) -> Callable[[int, int], bytes]:
    def read_range(start: int, stop: int) -> bytes:
        if reads is not None:
            reads.append((start, stop))
        return data[start:stop]

    return read_range


def file_of(description: Any, *, size: int | None = None, tensors: dict[str, Any] | None = None) -> bytes:
    """A file with a header alone."""
    text = description if isinstance(description, str) else json.dumps(description)
    header = json.dumps({"__metadata__": {DESCRIPTION_KEY: text}, **(tensors or {})}).encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header


def test_a_builtin_is_described_by_one_short_read() -> None:
    reads: list[tuple[int, int]] = []
    description = read_description(ranged(MEDIUM, reads), len(MEDIUM))
    assert reads == [(0, FIRST_READ)]
    assert description["architecture"] == "fast"
    assert description["actions"] == ["noop", "north", "south", "west", "east", "attack"]
    file = checkpoint.decode_policy(MEDIUM, "medium")
    assert description["parameters"] == sum(tensor.numel() for tensor in file.tensors.values())
    assert description["observation_space"]["features"] == list(file.observation_space.features)
    flat = description["flat"]
    assert (flat["epoch"], flat["step"]) == (file.metadata["epoch"], file.metadata["step"])
    assert (flat["architecture"], flat["observations"], flat["actions"]) == ("fast", "window 128", 6)


def test_a_long_header_takes_one_read_more() -> None:
    data = file_of({"metadata": {"metrics": {f"m{i}": i for i in range(200)}, "note": "x" * 9000}})
    reads: list[tuple[int, int]] = []
    flat = read_description(ranged(data, reads), len(data))["flat"]
    assert reads == [(0, FIRST_READ), (FIRST_READ, len(data))]
    assert flat["m199"] == 199
    assert "note" not in flat


def test_what_a_file_says_cannot_hide_what_it_is() -> None:
    tensors = {"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}
    data = file_of({"architecture": "mlp", "metadata": {"architecture": "fast", "parameters": 7}}, tensors=tensors)
    flat = read_description(ranged(data), len(data))["flat"]
    assert flat == {"architecture": "mlp", "parameters": 15}


def test_a_foreign_file_has_its_size_alone() -> None:
    header = b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    assert read_description(ranged(data), len(data)) == {"parameters": 4, "flat": {"parameters": 4}}


def test_the_bounds_are_those_of_the_reader_of_whole_files() -> None:
    assert (MAX_HEADER_BYTES, DESCRIPTION_KEY) == (checkpoint.MAX_HEADER_BYTES, checkpoint.DESCRIPTION_KEY)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes are too few"),
        (b"\x80\x02pickled.......", "no header stands at its beginning"),
        (file_of({}, size=MAX_HEADER_BYTES + 1), f"claims {MAX_HEADER_BYTES + 1} bytes, the bound is"),
        (file_of({}, size=2**63), "the bound is"),
        (file_of({}, size=10_000), "it is cut short: its header claims 10000 bytes"),
        (file_of("{"), "the description of the policy is not valid JSON"),
        (file_of("[1]"), "must be a JSON object, not list"),
        (file_of('{"a":1,"a":2}'), "a key stands there twice"),
        (file_of('{"a":NaN}'), "a number is not finite"),
        (file_of('{"a":1e999}'), "a number is not finite"),
        (file_of("[" * 100_000), "is not valid JSON"),
        (file_of('{"a":' + "9" * 10_000 + "}"), "is not valid JSON"),
        (file_of({}, tensors={"w": 3}), "a tensor without a possible shape"),
        (file_of({}, tensors={"w": {"shape": [-1]}}), "a tensor without a possible shape"),
        (file_of({}, tensors={"w": {"shape": [True]}}), "a tensor without a possible shape"),
        ((10).to_bytes(8, "little") + b'{"a":"\xff\xfe"}', "its header is not valid JSON"),
        ((34).to_bytes(8, "little") + b'{"__metadata__":{"dual_policy":3}}', "must map names to strings"),
    ],
    ids=range(17),
)
def test_a_header_that_cannot_be_is_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_description(ranged(data), len(data), where="x.safetensors")
    assert str(caught.value).startswith("x.safetensors: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_every_cut_and_every_flipped_byte_is_read_or_refused() -> None:
    data = MEDIUM[:1200]
    for cut in range(len(data)):
        with pytest.raises(CheckpointError):
            read_description(ranged(data[:cut]), min(cut, 1135))
    for place in range(1136):
        flipped = bytearray(data)
        flipped[place] ^= 0x55
        try:
            flat = read_description(ranged(bytes(flipped)), len(MEDIUM))["flat"]
        except CheckpointError:
            continue
        assert isinstance(flat["parameters"], int)


def test_a_short_answer_is_an_error_and_no_loop(tmp_path: Path) -> None:
    data = file_of({"metadata": {"note": "x" * 9000}})
    with pytest.raises(CheckpointError, match=f"only {FIRST_READ} bytes of its"):
        read_description(lambda start, stop: data[start:stop] if start == 0 else b"", len(data))
