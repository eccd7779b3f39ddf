"""Hostile policy files: ways to make a pickle call something x protocols x containers that a loader might open.

Every way leaves a file in the canary folder where it runs; `test_nothing_executes.py` shows first that it does, by
reading each pickle in a child that allows it. Nothing here is random: the same list comes out every time.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

PROTOCOLS = tuple(range(6))
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


@dataclass(slots=True, frozen=True)
class Name:
    """Pickles as a reference to `module.name`, by just that name."""

    path: str


class Call:
    """Pickles as a call of `function`: a name, or a call that gives a function."""

    def __init__(self, function: str | Call, *args: Any) -> None:
        self.function: Name | Call = Name(function) if isinstance(function, str) else function
        self.args = args


def ways(canary: Path, scratch: Path) -> dict[str, Call]:
    """Name -> a call that leaves something in the folder of `canary`; `write_scratch` made what they refer to."""
    at, script, folder = str(canary), str(scratch / "script.py"), str(scratch / "folder")
    touch, text = ["touch", at], f"open({at!r}, 'w').close()"
    compiled = Call("builtins.compile", text, "x", "exec")
    simple: list[tuple[Any, ...]] = [
        ("os.system", f"touch {at}"),
        ("posix.system", f"touch {at}"),
        ("os.popen", f"touch {at}"),
        ("os.mkdir", at),
        ("posix.mkdir", at),
        ("os.makedirs", at),
        ("os.mkfifo", at),
        ("os.symlink", script, at),
        ("os.link", script, at),
        ("os.open", at, 0o101),
        ("os.spawnvp", 0, "touch", touch),
        ("os.spawnlp", 0, "touch", "touch", at),
        ("os.posix_spawnp", "touch", touch, {}),
        ("subprocess.Popen", touch),
        ("subprocess.run", touch),
        ("subprocess.call", touch),
        ("subprocess.check_call", touch),
        ("subprocess.check_output", touch),
        ("subprocess.getoutput", f"touch {at}"),
        ("subprocess.getstatusoutput", f"touch {at}"),
        ("builtins.eval", text),
        ("builtins.exec", text),
        ("builtins.open", at, "w"),
        ("builtins.__import__", "canary_module"),
        ("builtins.list", Call("builtins.map", Name("os.mkdir"), [at])),
        ("io.open", at, "w"),
        ("io.FileIO", at, "w"),
        ("codecs.open", at, "w"),
        ("gzip.open", at, "wb"),
        ("bz2.open", at, "wb"),
        ("lzma.open", at, "wb"),
        ("zipfile.ZipFile", at, "w"),
        ("tarfile.open", at, "w"),
        ("dbm.dumb.open", at, "n"),
        ("shutil.copyfile", script, at),
        ("shutil.copy2", script, at),
        ("shutil.copytree", folder, at),
        ("shutil.make_archive", at, "tar", folder),
        ("tempfile.mkdtemp", "", canary.name, str(canary.parent)),
        ("tempfile.mkstemp", "", canary.name, str(canary.parent)),
        ("runpy.run_path", script),
        ("runpy.run_module", "canary_module"),
        ("importlib.import_module", "canary_module"),
        ("timeit.timeit", text, "pass", Name("time.perf_counter"), 1),
        ("cProfile.run", text),
        ("functools.reduce", Name("os.symlink"), [script, at]),
        ("logging.FileHandler", at),
        ("numpy.memmap", at, "uint8", "w+", 0, Call("builtins.tuple", [1])),
        ("numpy.savetxt", at, [1.0]),
        ("torch.save", 1, at),
        ("pickle.loads", encode(Call("os.mkdir", at), 2)),
        ("_pickle.loads", encode(Call("os.mkdir", at), 2)),
        ("hydra.utils.instantiate", {"_target_": "os.mkdir", "path": at}),
        ("torch._tensor._rebuild_from_type_v2", Name("os.mkdir"), Name("builtins.int"), [at], {}),
    ]  # fmt: skip
    calls = {f"{way[0]} {number}": Call(*way) for number, way in enumerate(simple)}
    return calls | {
        "a method of an object": Call(Call("operator.methodcaller", "touch"), Call("pathlib.Path", at)),
        "a method of a class": Call(Call("builtins.getattr", Name("pathlib.Path"), "touch"), Call("pathlib.Path", at)),
        "an attribute by getattr": Call(Call("builtins.getattr", Call("pathlib.Path", at), "touch")),
        "a function of code": Call(Call("types.FunctionType", compiled, {})),
        "a partial": Call(Call("functools.partial", Name("os.mkdir"), at)),
        "compiled code": Call("builtins.exec", compiled),
    }


def write_scratch(scratch: Path, canary: Path) -> None:
    """What the ways refer to: a script, a module and a folder."""
    text = f"open({str(canary)!r}, 'w').close()\n"
    (scratch / "folder").mkdir(parents=True)
    (scratch / "script.py").write_text(text)
    (scratch / "canary_module.py").write_text(text)


def encode(value: Any, protocol: int, operation: str = "reduce") -> bytes:
    """A whole pickle of `value` in the operations of `protocol`; calls by REDUCE, OBJ or INST."""
    start = b"" if protocol < 2 else bytes([0x80, protocol])
    return start + _encode(value, protocol, operation) + b"."


def _encode(value: Any, protocol: int, operation: str) -> bytes:
    """The operations that leave `value` on the stack."""
    match value:
        case None | bool() | float():
            return pickle.dumps(value, 0)[:-1]
        case int():
            return b"I%d\n" % value if protocol == 0 else b"J" + struct.pack("<i", value)
        case str() if protocol == 0:
            return b"V" + value.encode("raw-unicode-escape").replace(b"\n", b"\\u000a") + b"\n"
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes() if protocol < 3:
            return _encode(Call("_codecs.encode", value.decode("latin-1"), "latin-1"), protocol, "reduce")
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case Name(path):
            module, name = path.rsplit(".", 1)
            if protocol >= 4:
                return _encode(module, protocol, operation) + _encode(name, protocol, operation) + b"\x93"
            return f"c{module}\n{name}\n".encode()
        case Call():
            args = [_encode(arg, protocol, operation) for arg in value.args]
            if operation == "obj" and args:
                return b"(" + _encode(value.function, protocol, operation) + b"".join(args) + b"o"
            if operation == "inst" and args and isinstance(value.function, Name):
                module, name = value.function.path.rsplit(".", 1)
                return b"(" + b"".join(args) + f"i{module}\n{name}\n".encode()
            return _encode(value.function, protocol, operation) + b"(" + b"".join(args) + b"tR"
        case list():
            return b"(" + b"".join(_encode(entry, protocol, operation) for entry in value) + b"l"
        case dict():
            entries = (_encode(part, protocol, operation) for pair in value.items() for part in pair)
            return b"(" + b"".join(entries) + b"d"
    raise TypeError(value)


def containers(payload: bytes, safe: bytes) -> dict[str, tuple[str, bytes]]:
    """What stands around a pickle -> (file name, bytes).

    Args:
        payload: a whole pickle.
        safe: a policy file that loads, for the polyglots.
    """
    packed = zip_of(payload)
    header = int.from_bytes(safe[:8], "little")
    return {
        "bare": ("model.pt", payload),
        "bare, as a policy file": ("model.safetensors", payload),
        "zip": ("model.pt", packed),
        "zip, as a policy file": ("model_0001.safetensors", packed),
        "zip with storages": (
            "model.pt",
            zip_of(payload, {"archive/data/0": bytes(64), "archive/byteorder": b"little"}),
        ),
        "compressed zip": ("model.pt", zip_of(payload, compression=zipfile.ZIP_DEFLATED)),
        "nested zip": ("model.pt", zip_of(packed)),
        "zip in the storages of a zip": ("model.pt", zip_of(payload, {"archive/data/0": packed})),
        "second pickle beside the first": ("model.pt", zip_of(encode({}, 2), {"archive/code.pkl": payload})),
        "zip with a bad checksum": ("model.pt", with_bad_crc(packed)),
        "zip behind a policy file": ("model.safetensors", safe + packed),
        "zip inside the header of a policy file": ("model.safetensors", joined(packed, safe[8 : 8 + header])),
        "pickle before a zip": ("model.pt", payload + packed),
        "TorchScript": ("model.pt", zip_of(payload, {"archive/constants.pkl": payload, "archive/code/net.py": b"x"})),
        "older .pt, as the weights": ("model.pt", legacy(payload)),
        "older .pt, as the magic number": ("model.pt", payload + legacy(payload)),
        "older .pt, as the keys": ("model.pt", legacy(encode({}, 2), payload)),
        "tar": ("model.pt", tar_of(payload)),
        "tar as the first torch wrote it": ("model.tar", tar_of(payload, "\x80pickle")),
        "pickle behind the start of a header": ("model.safetensors", bytes(8) + b"{" + payload),
        "policy file as a string of a pickle": ("model.safetensors", struct.pack("<Q", len(payload)) + payload),
        "gzip": ("model.pt.gz", gzip.compress(payload, mtime=0)),
        "bzip2": ("model.pkl", bz2.compress(payload)),
        "xz": ("model.pkl", lzma.compress(payload)),
        "npy": ("model.npy", npy_of(payload)),
        "pickle as the description": ("model.safetensors", described(payload)),
    }


def all_files(canary: Path, scratch: Path, safe: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Every (label, file name, bytes): ways x protocols x containers, calls by REDUCE, OBJ and INST in turn."""
    operations = ("reduce", "obj", "inst")
    for number, (way, call) in enumerate(ways(canary, scratch).items()):
        for protocol in PROTOCOLS:
            payload = encode(call, protocol, operations[(number + protocol) % 3])
            for container, (name, data) in containers(payload, safe).items():
                yield f"{way}, protocol {protocol}, {container}", name, data


def zip_of(payload: bytes, extra: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as torch.save writes it, around a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in ({"archive/data.pkl": payload, "archive/version": b"3\n"} | (extra or {})).items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def with_bad_crc(data: bytes) -> bytes:
    """A zip whose first part has another checksum than it claims, in the part's header and in the directory."""
    changed = bytearray(data)
    changed[14] ^= 1
    changed[data.index(b"PK\x01\x02") + 16] ^= 1
    return bytes(changed)


def joined(body: bytes, header: bytes) -> bytes:
    """A safetensors file of that header and body."""
    return struct.pack("<Q", len(header)) + header + body


def legacy(payload: bytes, keys: bytes | None = None) -> bytes:
    """A .pt file of the older format: magic number, version, system, the payload, keys of the storages."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
    return magic + pickle.dumps(SYSTEM, protocol=2) + payload + (pickle.dumps([], protocol=2) if keys is None else keys)


def tar_of(payload: bytes, name: str = "pickle") -> bytes:
    """A tar that holds the payload, as the first versions of torch.save wrote it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", encoding="latin-1") as archive:
        for part in ("sys_info", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name if part == "pickle" else part)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def npy_of(payload: bytes) -> bytes:
    """A numpy file that holds an object, which numpy stores as a pickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


def described(payload: bytes) -> bytes:
    """A policy file whose description is the pickle."""
    text = payload.decode("latin-1")
    return bytes(safetensors.torch.save({"w": torch.zeros(1)}, metadata={"dual_policy": text}))
