"""Reads the state dict out of a foreign `.pt` file, and nothing else: a file can name code, none of it is ever run.

Stands beside `checkpoint.py`, for policies that other trainers saved. A `.pt` file is a pickle, so torch's restricted
reader is the only one that touches it, after checks of our own: a sound zip that does not unpack to much more than
itself. What comes out must be plain tensors that the file really holds. There is no second way in.
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
MAX_UNPACKED_RATIO = 8
MAX_UNPACKED_BYTES = 16 * 1024**3
MAX_ENTRIES = 65536
STATE_DICT_KEYS = ("model", "policy", "state_dict")
WRAPPERS = ("module", "_orig_mod", "policy", "model")
"""First parts of parameter names that a wrapper around the net put there (data parallel, compiled, a trainer)."""

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
        limit = len(data)
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
            if len(entries) > MAX_ENTRIES or size > min(MAX_UNPACKED_RATIO * len(data), MAX_UNPACKED_BYTES):
                _refuse(where, f"its {len(entries)} parts unpack to {size} bytes, the file has {len(data)}")
            if len({entry.filename for entry in entries}) != len(entries):
                _refuse(where, "two parts of the zip have one name")
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                _refuse(where, "it is a TorchScript archive, which holds code")
            if (broken := archive.testzip()) is not None:
                _refuse(where, f"part {short(broken)} of the zip is damaged (checksum)")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on malformed input
        _refuse(where, f"it is damaged or cut short: {one_line(error)}")
    return size


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
    found = [key for key in STATE_DICT_KEYS if isinstance(value.get(key), dict)]
    if len(found) > 1:
        _refuse(where, f"it holds several state dicts ({', '.join(found)}); keep one of them")
    state_dict = value[found[0]] if found else value
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
    if sum(storages.values()) > limit or claimed > MAX_UNPACKED_RATIO * limit:
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
