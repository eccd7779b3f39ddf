"""The policy file: bit-exact round trips, and every malformed file refused with its reason in one line."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dual_policy_plugin.checkpoint import (
    DESCRIPTION_KEY,
    MAX_HEADER_BYTES,
    PolicyFile,
    check_space,
    decode_policy,
    encode_policy,
    read_safetensors,
)
from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.types import ObservationSpace

SPACES = {
    "window": ObservationSpace(
        kind="window",
        shape=(12,),
        features=("empty", "wall", "foe"),
        window=(3, 3),
        own=("ore", "time"),
        scales=(3, 255),
    ),
    "tokens": ObservationSpace(
        kind="tokens", shape=(20, 3), features=("type", "ore"), window=(11, 11), scales=(1.0, 100.0)
    ),
    "vector": ObservationSpace(kind="vector", shape=(2,), features=("x", "y")),
}


def make_file(kind: str = "window", **changes: Any) -> PolicyFile:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "table": torch.randn(9, 4, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    metadata = {
        "step": 1000,
        "epoch": 3,
        "metrics": {"win_rate": 0.1 + 0.2},
        "npcs": [{"name": "weak", "sha256": "ab"}],
    }
    file = PolicyFile(
        architecture="fast",
        args={"hidden_size": 4},
        observation_space=SPACES[kind],
        actions=("noop", "north"),
        tensors=tensors,
        metadata=metadata,
    )
    return replace(file, **changes)


def join(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def forge(change: Any = None, *, body: bytes | None = None) -> bytes:
    """A valid file whose header went through `change` (in place)."""
    data = encode_policy(make_file())
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if change is not None:
        change(header)
    return join(header, data[8 + size :] if body is None else body)


def forge_description(**changes: Any) -> bytes:
    def change(header: dict[str, Any]) -> None:
        description = json.loads(header["__metadata__"][DESCRIPTION_KEY])
        description.update(changes)
        header["__metadata__"][DESCRIPTION_KEY] = json.dumps(description)

    return forge(change)


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        decode_policy(data, "some.safetensors")
    message = str(caught.value)
    assert message.startswith("some.safetensors: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("kind", SPACES)
def test_a_policy_comes_back_bit_for_bit(kind: str) -> None:
    file = make_file(kind)
    again = decode_policy(encode_policy(file), "x")
    assert (again.architecture, again.args, again.actions) == ("fast", {"hidden_size": 4}, ("noop", "north"))
    assert again.observation_space == file.observation_space
    assert again.metadata == file.metadata
    assert again.metadata["metrics"]["win_rate"] == 0.30000000000000004
    assert set(again.tensors) == set(file.tensors)
    for name, tensor in file.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert again.tensors[name].shape == tensor.shape
        assert torch.equal(again.tensors[name].view(torch.uint8 if tensor.dim() else tensor.dtype),
                           tensor.view(torch.uint8 if tensor.dim() else tensor.dtype))  # fmt: skip


def test_the_same_content_gives_the_same_bytes() -> None:
    file = make_file()
    shuffled = replace(
        file,
        tensors=dict(reversed(file.tensors.items())),
        metadata=dict(reversed(file.metadata.items())),
    )
    assert encode_policy(file) == encode_policy(shuffled) == encode_policy(decode_policy(encode_policy(file), "x"))


def test_safetensors_reads_our_file_and_we_read_its() -> None:
    theirs = safetensors.torch.load(encode_policy(make_file()))
    assert torch.equal(theirs["table"], make_file().tensors["table"])
    data = safetensors.torch.save({"w": torch.arange(6.0).reshape(2, 3)}, metadata={"format": "pt"})
    metadata, tensors = read_safetensors(data, "x")
    assert metadata == {"format": "pt"}
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tensors_that_share_memory_or_are_transposed_are_written_whole() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base.t(), "b": base, "c": base[:, 1], "d": torch.nn.Parameter(base)}
    again = decode_policy(encode_policy(make_file(tensors=tensors)), "x").tensors
    assert again["a"].tolist() == base.t().tolist()
    assert again["c"].tolist() == [1.0, 5.0, 9.0]
    assert again["d"].tolist() == base.tolist()


def test_decoded_tensors_can_be_written_without_touching_the_file() -> None:
    data = encode_policy(make_file())
    before = bytes(data)
    decode_policy(data, "x").tensors["table"].zero_()
    assert data == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metadata": {"score": math.nan}}, "metadata.score=nan is not a finite number"),
        ({"metadata": {"a": [1, {"b": math.inf}]}}, "metadata.a[1].b=inf"),
        ({"metadata": {"a": torch.zeros(1)}}, "metadata.a is a Tensor"),
        ({"args": {1: 2}}, "args has a key that is no str"),
        ({"actions": ()}, "actions must be a list of names"),
        ({"actions": ("a", "a")}, "actions names a twice"),
        ({"tensors": {}}, "holds no tensor"),
        ({"tensors": {"w": torch.tensor([1.0, math.nan])}}, "tensor w holds values that are not finite"),
        ({"tensors": {"w": torch.zeros(2, dtype=torch.complex64)}}, "dtype torch.complex64"),
        ({"metadata": {"note": "x" * MAX_HEADER_BYTES}}, "shorten its metadata"),
    ],
)
def test_nothing_is_written_that_would_not_load(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode_policy(make_file(**changes))
    assert reason in str(caught.value)


def test_a_file_cut_at_any_byte_is_refused() -> None:
    data = encode_policy(make_file())
    for size in range(len(data)):
        message = refusal(data[:size])
        assert any(word in message for word in ("cut short", "too few", "no .safetensors")), (size, message)


def test_a_longer_file_is_refused() -> None:
    assert "1 bytes follow its last tensor" in refusal(encode_policy(make_file()) + b"\0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(dtype: torch.dtype, value: float) -> None:
    weights = torch.zeros(100, dtype=dtype)
    weights[57] = value
    data = safetensors.torch.save({"w": weights})
    with pytest.raises(CheckpointError, match=r"x: tensor w holds values that are not finite"):
        read_safetensors(data, "x")


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"w": entry(shape=[3])}, "shape [3] takes 12 bytes, it has 8"),
        ({"w": entry(shape=[-2])}, "shape [-2] is not"),
        ({"w": entry(shape=[True, 2])}, "shape [True, 2] is not"),
        ({"w": entry(shape=[2.0])}, "shape [2.0] is not"),
        ({"w": entry(shape=[2**39, 2**39, 0], offsets=[0, 0])}, "cannot be"),
        ({"w": entry(shape=[2**38], offsets=[0, 2**40 - 1])}, "takes 1099511627776 bytes"),
        ({"w": entry(shape=[1] * 9)}, "is not a short list"),
        ({"w": entry(shape="2")}, "shape 2 is not"),
        ({"w": entry(dtype="F33")}, "dtype F33"),
        ({"w": entry(dtype=["F32"])}, "dtype ['F32']"),
        ({"w": entry(offsets=[8, 16])}, "starts at byte 8 of the data, expected 0"),
        ({"w": entry(offsets=[0, 8, 8])}, "cannot be"),
        ({"w": entry(offsets=[8, 0])}, "takes 8 bytes, it has -8"),
        ({"w": entry(), "v": entry()}, "starts at byte 0 of the data, expected 8"),
        ({"w": entry(), "v": entry(offsets=[4, 12])}, "starts at byte 4 of the data, expected 8"),
        ({"w": entry(), "v": entry(offsets=[8, 16])}, "cut short: tensor v"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "must have the fields"),
        ({"w": [1]}, "must have the fields"),
        ({"w": {**entry(), "code": "os.system"}}, "must have the fields"),
        ({"": entry()}, "cannot be the name"),
        ({"a\nb": entry()}, "a\\nb cannot be the name"),
        ({"w": entry(), "__metadata__": {"a": 1}}, "must map names to strings"),
        ({"w": entry(), "__metadata__": []}, "must map names to strings"),
        (b"{]", "not valid JSON"),
        (b'{"w": NaN}', "not valid JSON"),
        (b'{"w": 1e999}', "not a finite number"),
        (b'{"w": 1, "w": 2}', "w stands there twice"),
        (b'{"w":' + b"[" * 100_000, "not valid JSON"),
        (b'{"w":' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        ({}, "its last tensor"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, reason: str) -> None:
    assert reason in refusal(join(header, b"\0" * 8))


def test_a_header_that_claims_too_much_is_refused_unread() -> None:
    for size in (MAX_HEADER_BYTES + 1, 2**31, 2**63, 2**64 - 1):
        assert "the bound is" in refusal(struct.pack("<Q", size) + b"{}" + b" " * 100)


def test_a_bool_that_is_neither_is_refused() -> None:
    assert "not finite" in refusal(join({"w": entry(dtype="BOOL", shape=[8])}, b"\0\1\0\1\2\0\0\0"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format version is 2, this package reads 1"),
        ({"format": True}, "format version is True"),
        ({"format": "1"}, "format version is 1"),
        ({"architecture": ["fast"]}, "architecture must be a str, not list"),
        ({"args": []}, "args must be a dict"),
        ({"metadata": None}, "metadata must be a dict"),
        ({"actions": "noop"}, "actions must be a list"),
        ({"actions": [1]}, "actions holds 1"),
        ({"actions": ["a", "a"]}, "actions names a twice"),
        ({"import": "os.system"}, "must have the fields"),
        ({"observation_space": None}, "observation_space must have the fields"),
    ],
)
def test_a_description_of_wrong_types_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(forge_description(**changes))


def space_json(**changes: Any) -> dict[str, Any]:
    space = {"kind": "window", "shape": [12], "features": ["empty", "wall"], "window": [3, 3], "own": [], "scales": []}
    return {**space, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "image"}, "kind is image, known are window, tokens, vector"),
        ({"kind": 3}, "observation_space.kind a str"),
        ({"shape": [8]}, "cannot have shape (8,)"),
        ({"shape": []}, "cannot have"),
        ({"shape": [2**39]}, "cannot have"),
        ({"shape": ["12"]}, "is not a list of numbers"),
        ({"window": [3]}, "must be two numbers"),
        ({"window": [-3, -3]}, "cannot have"),
        ({"features": []}, "features must be a list"),
        ({"features": ["a", "a"]}, "names a twice"),
        ({"features": [f"f{i}" for i in range(257)]}, "257 features"),
        ({"own": ["a", "b", "c", "d"]}, "4 own"),
        ({"own": ["a"], "scales": [0]}, "1 finite numbers above 0"),
        ({"own": ["a"], "scales": [1, 1]}, "1 finite numbers above 0"),
        ({"kind": "tokens"}, "kind tokens cannot have"),
        ({"kind": "tokens", "shape": [2**38, 3]}, "cannot have"),
        ({"kind": "vector"}, "kind vector cannot have"),
    ],
)
def test_a_space_that_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(forge_description(observation_space=space_json(**changes)))


def test_the_space_that_the_bad_ones_differ_from_is_good() -> None:
    assert decode_policy(forge_description(observation_space=space_json()), "x").observation_space.window == (3, 3)
    for space in SPACES.values():
        check_space(space, "x")


def test_weights_without_a_description_are_pointed_to_the_import() -> None:
    assert "dual-policy import" in refusal(safetensors.torch.save({"w": torch.zeros(2)}))


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02c__main__\nNet\n", b"PK\x03\x04" + b"\0" * 40, b"version https://git-lfs"]
)
def test_other_files_are_refused(data: bytes) -> None:
    message = refusal(data)
    assert "too few" in message or "no .safetensors file" in message


def test_a_broken_name_stays_on_one_line() -> None:
    assert "evil\\n\\x1b[31m" in refusal(forge_description(actions=["evil\n\x1b[31m"]))


def tensors_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_thousand_mutations_never_crash_and_never_pass_with_a_broken_header() -> None:
    """Bit flips, cuts, inserted and overwritten bytes: a CheckpointError of one line, or a whole and finite policy."""
    rng = random.Random(11)
    data = encode_policy(make_file())
    num_refused = 0
    for _ in range(1000):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(mutated))
            kind = rng.randrange(4)
            if kind == 0:
                mutated[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del mutated[place : place + rng.randint(1, 64)]
            elif kind == 2:
                mutated[place:place] = rng.randbytes(rng.randint(1, 16))
            else:
                mutated[place] = rng.choice(b'{}[]",:-019eE\0\xff')
            if len(mutated) == 0:
                break
        try:
            file = decode_policy(bytes(mutated), "x")
        except CheckpointError as error:
            num_refused += 1
            assert "\n" not in str(error)  # noqa: PT017 - the loop needs both outcomes
        else:
            assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in file.tensors.values())
            assert tensors_equal(decode_policy(encode_policy(file), "x").tensors, file.tensors)
    assert num_refused > 700
