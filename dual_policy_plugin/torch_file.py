"""Reads the state dict out of a foreign `.pt` file, and nothing else: a file can name code, none of it is ever run.

Stands beside `checkpoint.py`, for policies that other trainers saved. A `.pt` file is a pickle, so torch's restricted
reader is the only one that touches it, after checks of our own: a sound zip that unpacks to no more than itself, and
a list of operations that names nothing but the parts of tensors (`_check_pickle`). The reader alone would let a file of
a hundred bytes ask for gigabytes. What comes out must be plain tensors that the file really holds. There is no second
way in.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from dual_policy_plugin.checkpoint import check_tensors, one_line, short
from dual_policy_plugin.errors import CheckpointError

MIN_TORCH = (2, 10)
"""The restricted reader of older versions could be made to run code."""
MAX_ENTRIES = 65536
MAX_VIEWS_RATIO = 2
"""Bytes that views of the same storages may claim together, as a multiple of what the file holds."""
MAX_PICKLE_BYTES = 4 * 1024**2
MAX_OPERATIONS = 200_000
"""Of one pickle; a tensor takes about 35. Some of them make an object of 64 bytes out of one byte."""
MAX_TUPLE_ENTRIES = 4096
"""Of a tuple with those inside it: hashing one that holds itself twice, thirty times over, would take for ever."""
STATE_DICT_KEYS = ("model", "policy", "state_dict")
WRAPPERS = ("module", "_orig_mod", "policy", "model")
"""First parts of parameter names that a wrapper around the net put there (data parallel, compiled, a trainer)."""

_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}
_BESIDE_WEIGHTS = {
    ("_codecs", "encode"): "bytes",
    ("__builtin__", "set"): "a set",
    ("__builtin__", "complex"): "a complex number",
    ("collections", "Counter"): "a Counter (of a MultiStepLR schedule?)",
    ("argparse", "Namespace"): "an argparse.Namespace",
}
"""What ordinary training checkpoints hold that is no part of a state dict: refused, but in plain words."""
_STORAGE = re.compile(r"(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool|ComplexFloat|ComplexDouble)Storage")
_OPERANDS = {
    **dict.fromkeys(b"NKMJG(]}).taesuRbQ\x81\x85\x86\x87\x88\x89", 0),
    **{ord("K"): 1, ord("M"): 2, ord("J"): 4, ord("G"): 8, ord("h"): 1, ord("q"): 1, ord("j"): 4, ord("r"): 4, 0x80: 1},
}
"""Operation -> bytes of its operand, for those whose operand has one length: the ones that torch's reader knows."""
_FRAME = 0x95
"""Begins a pickle of protocol 4 or 5."""
_LENGTHS = {ord("X"): 4, ord("U"): 1, 0x8A: 1}
"""Operation -> bytes of the length that stands before its operand: strings and large integers."""

_ADVICE = (
    "what works: a .safetensors file of this package, or a .pt file with a state dict, bare or under 'model', 'policy'"
    " or 'state_dict' (`torch.save(policy.state_dict(), path)`), which `dual-policy import` converts"
)


def decode_state_dict(data: bytes, where: str, *, expected: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict in a `.pt` file: plain CPU tensors with memory of their own or of the file's storages.

    Accepts {'model': sd}, {'policy': sd}, {'state_dict': sd} and a bare state dict, saved on any device.

    Args:
        data: the whole file.
        where: the file's name, for messages.
        expected: the parameter names of the net, where known. A wrapper's prefix that all names share is removed if
            that gives just these names; without them, whatever prefix of WRAPPERS all names share.

    Raises:
        CheckpointError: it begins with `Checkpoint NPC policy must be a PyTorch module` and says why and what to do.
    """
    check_torch(torch.__version__, where)
    if data[:4] == b"PK\x03\x04":
        limit = _check_zip(data, where)
    elif data[:1] == b"\x80" and data[257:262] != b"ustar":
        limit = _check_legacy(data, where)
    else:
        _refuse(where, "it is neither a .safetensors file nor one that torch.save writes")
    try:
        with warnings.catch_warnings(), _no_allowed_globals():
            warnings.simplefilter("ignore")  # about pickle protocols and deprecated storages: not the user's business
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        _refuse(where, _reason(error))
    state_dict = _find_state_dict(value, where)
    tensors = {name: _plain_tensor(name, tensor, where) for name, tensor in state_dict.items()}
    _check_sizes(tensors, limit, where)
    tensors = {name: tensor.resolve_neg().contiguous() for name, tensor in tensors.items()}
    check_tensors(tensors, where)
    return strip_wrappers(tensors, expected)


def check_torch(version: str, where: str) -> None:
    """Raises a CheckpointError where torch is too old to read a `.pt` file safely."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        _refuse(where, f"torch {version} cannot read a .pt file safely, torch {needed} or newer can")


def _check_zip(data: bytes, where: str) -> int:
    """The unpacked size of a sound zip, in bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            if len(entries) > MAX_ENTRIES or size > len(data):
                _refuse(where, f"its {len(entries)} parts unpack to {size} bytes, the file has {len(data)}")
            if len({entry.filename for entry in entries}) != len(entries):
                _refuse(where, "two parts of the zip have one name")
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                _refuse(where, "it is a TorchScript archive, which holds code")
            if (broken := archive.testzip()) is not None:
                _refuse(where, f"part {short(broken)} of the zip is damaged (checksum)")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > MAX_PICKLE_BYTES:
                        _refuse(where, f"its description of the tensors takes {entry.file_size} bytes")
                    _check_pickle(archive.read(entry), 0, where)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on malformed input
        _refuse(where, f"it is damaged or cut short: {one_line(error)}")
    return size


def _check_legacy(data: bytes, where: str) -> int:
    """The size of a file of the older format: five pickles (magic number, version, system, tensors, keys), storages."""
    position = 0
    for _ in range(5):
        position = _check_pickle(data[position : position + MAX_PICKLE_BYTES], 0, where) + position
    return len(data)


def _check_pickle(data: bytes, position: int, where: str) -> int:
    """Where the pickle at `position` ends; refused if it does anything that a state dict does not need.

    Follows the operations without making anything: `stack` holds, for each object that the reader would have there,
    the number of entries of the tuple that it is, those of tuples inside it included, and 1 for all else.
    """
    stack: list[int] = []
    below: list[list[int]] = []  # stacks that wait behind a mark
    memo: dict[int, int] = {}
    try:
        for _ in range(MAX_OPERATIONS):
            code = data[position]
            position += 1
            if code == ord("c"):
                module, name, position = _read_global(data, position)
                _check_global(module, name, where)
                operand = b""
            else:
                size = _OPERANDS.get(code)
                if size is None:
                    width = _LENGTHS.get(code)
                    if code == _FRAME:
                        _refuse(where, "it was saved with pickle_protocol=4 or higher, torch.save's default is 2")
                    if width is None:
                        _refuse(where, f"it is a pickle that does more than a state dict needs (operation {code:#04x})")
                    size = int.from_bytes(data[position : position + width], "little")
                    position += width
                operand = data[position : position + size]
                if len(operand) < size:
                    raise IndexError
                position += size
            if code == ord("."):
                return position
            stack = _follow(code, operand, stack, below, memo)
            if stack and stack[-1] > MAX_TUPLE_ENTRIES:
                _refuse(where, f"it nests tuples to more than {MAX_TUPLE_ENTRIES} entries")
    except (IndexError, ValueError):  # a read behind the end, a pop from an empty stack, text that is none
        _refuse(where, "it is damaged or cut short: its pickle breaks off")
    _refuse(where, f"its pickle takes more than {MAX_OPERATIONS} operations")


def _follow(code: int, operand: bytes, stack: list[int], below: list[list[int]], memo: dict[int, int]) -> list[int]:
    """The stack after one operation, see `_check_pickle`."""
    match chr(code):
        case "(":
            below.append(stack)
            return []
        case "t" | "u" | "e":  # a tuple, or entries of a dict or a list, of all behind the mark
            size = 1 + sum(stack)
            stack = below.pop()
            if code == ord("t"):
                stack.append(size)
        case "\x85" | "\x86" | "\x87":
            count = code - 0x84
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [1 + sum(stack[-count:])]
        case "R" | "\x81":  # a call: what it gives may hold its arguments
            size = stack.pop()
            stack.pop()
            stack.append(size)
        case "a" | "b":
            stack.pop()
        case "s":
            stack.pop()
            stack.pop()
        case "h" | "j":
            stack.append(memo.get(int.from_bytes(operand, "little"), 1))
        case "q" | "r":
            memo[int.from_bytes(operand, "little")] = stack[-1]
        case "Q":
            stack[-1] = 1
        case "\x80":
            pass
        case _:
            stack.append(1)
    return stack


def _read_global(data: bytes, position: int) -> tuple[str, str, int]:
    """(module, name, where the next operation stands): the two lines at `position`."""
    middle = data.index(b"\n", position)
    end = data.index(b"\n", middle + 1)
    return data[position:middle].decode(), data[middle + 1 : end].decode(), end + 1


def _check_global(module: str, name: str, where: str) -> None:
    """Refuses a pickle that names anything but the parts of plain tensors."""
    if (module, name) in _ALLOWED_GLOBALS:
        return
    if module in ("torch", "torch.cuda") and _STORAGE.fullmatch(name):
        return
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return
    if (module, name[:9]) == ("torch._utils", "_rebuild_"):
        _refuse(where, f"it holds tensors that are not plain ({short(f'{module}.{name}')})")
    if (module, name) in _BESIDE_WEIGHTS:
        what = f"{_BESIDE_WEIGHTS[module, name]} ({module}.{name})"
        _refuse(where, f"beside the weights it holds {what}, of which nothing is read; save the state dict alone")
    _refuse(where, f"it is a pickled object that names code ({short(f'{module}.{name}')}), which is never run")


@contextmanager
def _no_allowed_globals() -> Iterator[None]:
    """Withdraws what the application allowed torch to load elsewhere: it was not meant for our files."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(allowed)


def _reason(error: Exception) -> str:
    """Why torch's restricted reader refused, in one line."""
    text = str(error)
    named = re.search(r"GLOBAL\s+([\w.<>]{1,200})", text)
    if named is not None:
        return f"it is a pickled object that names code ({short(named[1])}), which is never run"
    if "weights_only" in text or "WeightsUnpickler" in text:
        detail = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        return f"it is not a plain state dict ({short(detail[1], 120) if detail else 'refused by torch'})"
    return f"it is damaged or no state dict ({one_line(error)})"


def _find_state_dict(value: Any, where: str) -> dict[str, Any]:
    """The one dict of names to tensors in what the file holds."""
    if not isinstance(value, dict):
        _refuse(where, f"it holds a {type(value).__name__}")
    found = [key for key in STATE_DICT_KEYS if isinstance(dict.get(value, key), dict)]
    if len(found) > 1:
        _refuse(where, f"it holds several state dicts ({', '.join(found)}); keep one of them")
    state_dict = dict.__getitem__(value, found[0]) if found else value
    for name, tensor in dict.items(state_dict):
        if type(name) is not str or not isinstance(tensor, Tensor):
            inside = f"'{found[0]}'" if found else "the file"
            _refuse(where, f"{inside} holds a {type(tensor).__name__} under {short(name)}, not only tensors")
    if not state_dict:
        _refuse(where, "it holds no tensor")
    return dict(dict.items(state_dict))


def _plain_tensor(name: str, tensor: Tensor, where: str) -> Tensor:
    """`tensor` without gradients and attributes; anything but a dense CPU tensor is refused."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        _refuse(where, f"tensor {short(name)} is a {type(tensor).__name__}, not a plain tensor")
    tensor = Tensor.detach(tensor)
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    if not is_plain or tensor.is_quantized or tensor.is_complex() or tensor.is_nested:
        _refuse(where, f"tensor {short(name)} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; not a plain one")
    return tensor


def _check_sizes(tensors: dict[str, Tensor], limit: int, where: str) -> None:
    """Refuses tensors that claim more bytes than the file holds: by views of one storage, or by storages that grew."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if sum(storages.values()) > limit or claimed > MAX_VIEWS_RATIO * limit:
        _refuse(where, f"its tensors claim {max(claimed, sum(storages.values()))} bytes, the file holds {limit}")


def strip_wrappers(tensors: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """`tensors` without the prefix that wrappers put before every name, see `decode_state_dict`."""
    candidates = [tensors]
    while all(name.split(".", 1)[0] in WRAPPERS and "." in name for name in candidates[-1]):
        if len({name.split(".", 1)[0] for name in candidates[-1]}) > 1:
            break
        candidates.append({name.split(".", 1)[1]: tensor for name, tensor in candidates[-1].items()})
    if not expected:
        return candidates[-1]
    return next((candidate for candidate in candidates if set(candidate) == set(expected)), candidates[-1])


def _refuse(where: str, reason: str) -> NoReturn:
    raise CheckpointError(f"Checkpoint NPC policy must be a PyTorch module: {where}: {reason}; {_ADVICE}")
