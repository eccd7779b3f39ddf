"""Foreign .pt files: state dicts are read, everything that names code is refused and never runs."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.torch_file import check_torch, decode_state_dict

PREFIX = "Checkpoint NPC policy must be a PyTorch module"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


def save(value: Any, *, is_zip: bool = True, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=is_zip, **options)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        decode_state_dict(data, "old.pt")
    message = str(caught.value)
    assert message.startswith(f"{PREFIX}: old.pt: ")
    assert "dual-policy import" in message
    assert "\n" not in message
    assert len(message) < 700
    return message


def zip_of(payload: bytes, **extra: bytes) -> bytes:
    """A zip as torch.save writes it, around a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"data.pkl": payload, "byteorder": b"little", "version": b"3\n", **extra}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda s: {"model": s}, lambda s: {"policy": s, "epoch": 3},
                                  lambda s: {"state_dict": s, "optimizer": {"lr": 0.1}}])  # fmt: skip
def test_every_layout_of_a_state_dict_is_read(wrap: Callable[[dict[str, Tensor]], Any], is_zip: bool) -> None:
    tensors = decode_state_dict(save(wrap(STATE), is_zip=is_zip), "old.pt")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a.weight": [[0, 1, 2], [3, 4, 5]],
        "a.bias": [1, 2],
    }


def test_parameters_come_back_as_tensors_without_gradient() -> None:
    tensors = decode_state_dict(save(OrderedDict(w=nn.Parameter(torch.ones(2)))), "old.pt")
    assert type(tensors["w"]) is Tensor
    assert not tensors["w"].requires_grad


def test_views_and_tied_weights_are_read() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = decode_state_dict(save({"a": base.t(), "b": base, "c": base[1]}), "old.pt")
    assert tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["a"].is_contiguous()
    assert tensors["c"].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("names", "expected", "stripped"),
    [
        (["module.a", "module.b"], [], ["a", "b"]),
        (["module._orig_mod.a"], [], ["a"]),
        (["module.a", "b"], [], ["b", "module.a"]),
        (["module.a", "policy.b"], [], ["module.a", "policy.b"]),
        (["encoder.a", "encoder.b"], [], ["encoder.a", "encoder.b"]),
        (["policy.a"], ["policy.a"], ["policy.a"]),
        (["module.policy.a"], ["policy.a"], ["policy.a"]),
        (["module.policy.a"], ["a"], ["a"]),
        (["module"], [], ["module"]),
    ],
)
def test_a_wrappers_prefix_goes_only_where_all_names_share_it(
    names: list[str], expected: list[str], stripped: list[str]
) -> None:
    tensors = decode_state_dict(save({name: torch.zeros(1) for name in names}), "old.pt", expected=expected)
    assert sorted(tensors) == stripped


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hostile(canary: Path) -> dict[str, Any]:
    touch = f"touch {canary}"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w').close()"),
        "open": Call(open, str(canary), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "check_output": Call(subprocess.check_output, ["touch", str(canary)]),
        "getattr": Call(getattr, Path, "touch"),
        "import": Call(__import__, "os"),
        "path.touch": Call(Path.touch, canary),
        "torch.load": Call(torch.load, str(canary)),
        "nested": {"model": {"w": torch.zeros(1), "x": [Call(os.system, touch)]}},
        "key": OrderedDict([("w", torch.zeros(1)), ("z", (Call(os.system, touch),))]),
        "module": nn.Linear(2, 2),
        "wrapped module": {"model": nn.Linear(2, 2)},
    }


@pytest.mark.parametrize("name", hostile(Path("canary")))
def test_nothing_that_a_pickle_names_is_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = []
    for protocol in range(6):
        value = hostile(canary)[name]
        payload = pickle.dumps(value, protocol=protocol)
        files += [payload, zip_of(payload), zip_of(payload, **{"data/0": b"\0" * 4}), b"\0" * 8 + b"{" + payload]
        if protocol >= 2:
            files += [save(value, is_zip=is_zip, pickle_protocol=protocol) for is_zip in (True, False)]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo("pickle")
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
        files.append(buffer.getvalue())
    for data in files:
        refusal(data)
    assert not canary.exists()
    # the canary is a live one: the same pickle does run where it is allowed to
    if name in ("os.system", "nested", "check_output"):
        pickle.loads(pickle.dumps(hostile(canary)[name]))
        assert canary.exists()


def test_a_pickled_module_is_named_with_what_it_asks_for() -> None:
    message = refusal(save(nn.Linear(2, 2)))
    assert "names code (torch.nn.modules.linear.Linear), which is never run" in message
    assert "'state_dict'" in message


def test_what_the_application_allowed_elsewhere_is_not_allowed_here(tmp_path: Path) -> None:
    data = save({"model": Call(shutil.copyfile, __file__, str(tmp_path / "canary"))})
    others = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([shutil.copyfile])
    try:
        refusal(data)
        assert not (tmp_path / "canary").exists()
        assert set(torch.serialization.get_safe_globals()) == {*others, shutil.copyfile}
        torch.load(io.BytesIO(data), weights_only=True)
        assert (tmp_path / "canary").exists()  # there it is allowed, so the canary is a live one
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def test_the_environment_cannot_switch_unpickling_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal(save(Call(Path.touch, tmp_path / "canary")))
    assert not (tmp_path / "canary").exists()


def test_a_torchscript_archive_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    assert "TorchScript" in refusal(buffer.getvalue())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([torch.zeros(1)], "it holds a list"),
        (torch.zeros(1), "it holds a Tensor"),
        ({}, "it holds no tensor"),
        ({"model": {}}, "it holds no tensor"),
        ({"epoch": 3, "w": torch.zeros(1)}, "the file holds a int under epoch, not only tensors"),
        ({"model": {"w": 3}}, "'model' holds a int under w"),
        ({"model": STATE, "policy": STATE}, "several state dicts (model, policy)"),
        ({1: torch.zeros(1)}, "under 1"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "tensor w is torch.complex64"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "tensors that are not plain (torch._utils._rebuild_sparse_tensor)"),
        ({"w": torch.zeros(2, device="meta")}, "not plain (torch._utils._rebuild_meta_tensor_no_storage)"),
        ({"w": torch.zeros(1).expand(10_000_000)}, "its tensors claim 40000000 bytes"),
    ],
)
def test_anything_but_plain_tensors_is_refused(value: Any, reason: str) -> None:
    assert reason in refusal(save(value))


@pytest.mark.parametrize(
    ("beside", "what"),
    [
        (b"abc", "bytes (_codecs.encode)"),
        ({1}, "a set (__builtin__.set)"),
        (Counter(a=1), "a Counter (of a MultiStepLR schedule?) (collections.Counter)"),
        (argparse.Namespace(lr=1), "an argparse.Namespace (argparse.Namespace)"),
    ],
)
def test_what_else_a_training_checkpoint_holds_is_said_in_plain_words(beside: Any, what: str) -> None:
    wanted = f"beside the weights it holds {what}, of which nothing is read; save the state dict alone"
    for is_zip in (True, False):
        assert wanted in refusal(save({"model": STATE, "args": beside}, is_zip=is_zip))


def test_an_ordinary_training_checkpoint_is_read() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    args = {"lr": 1e-3, "sizes": [1, 2], "big": 2**70, "none": None, "debug": False, "shape": (1, 2)}
    value = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    value |= {"epoch": 3, "args": args, "rng": torch.get_rng_state()}
    read = decode_state_dict(save(value), "old.pt")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in net.state_dict().items()
    }


def test_a_newer_pickle_protocol_is_named() -> None:
    assert "saved with pickle_protocol=4 or higher, torch.save's default is 2" in refusal(
        save(STATE, pickle_protocol=4)
    )


def nested_tuples(depth: int) -> bytes:
    """A pickle of {t: 1} where t is a tuple that holds the same tuple twice, and so on: hashing it takes 2**depth."""
    doubled = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))
    return b"\x80\x02}X\x01\x00\x00\x00aq\x00" + doubled + b"K\x01s."


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.", "names code (__builtin__.bytearray)"),
        (b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x40\x85R.", "names code (torch.Tensor)"),
        (b"\x80\x02ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x40\x85R.", "(torch.storage.UntypedStorage)"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R.", "(_codecs.encode)"),
        (nested_tuples(60), "nests tuples to more than 4096 entries"),
        (b"\x80\x02" + b"]" * 200_001 + b".", "takes more than 200000 operations"),
        (b"\x80\x02]q\x00(" + b"X\xff\xff\xff\x00abc", "its pickle breaks off"),
        (b"\x80\x02" + b"0" * 5 + b".", "operation 0x30"),
        (b"\x80\x02\x86.", "its pickle breaks off"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_small_file_cannot_ask_for_much_memory_or_time(payload: bytes, reason: str, is_zip: bool) -> None:
    begin = time.perf_counter()
    assert reason in refusal(zip_of(payload) if is_zip else payload)
    assert time.perf_counter() - begin < 1


def test_a_description_of_many_megabytes_is_refused() -> None:
    payload = b"\x80\x02" + b"X\x00\x00\x10\x00" + b"a" * 2**20 + b"0"
    assert "takes 5242920 bytes" in refusal(zip_of(payload * 5))
    assert "its pickle breaks off" in refusal(b"\x80\x02X\x00\x00\x50\x00" + b"a" * 5 * 2**20 + b"q\x00.")


def test_a_dict_cannot_bring_methods_of_its_own() -> None:
    """BUILD may set attributes of an OrderedDict; none of them is ever called."""
    methods = b"".join(
        b"X%c\x00\x00\x00%bccollections\nOrderedDict\n" % (len(name), name)
        for name in (b"get", b"items", b"keys", b"values", b"__getitem__")
    )
    payload = b"\x80\x02ccollections\nOrderedDict\n)R}(" + methods + b"ub."
    assert "it holds no tensor" in refusal(zip_of(payload))


def test_a_state_dict_beside_an_optimizer_and_settings_is_read() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 5))
    optimizer = torch.optim.Adam(net.parameters())
    settings = {"lr": 1e-3, "shape": torch.Size([1, 2]), "names": ("a", "b"), "on": True, "none": None, "big": 2**70}
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "settings": settings | {"dtype": torch.bfloat16, "device": torch.device("cpu"), "rng": torch.get_rng_state()},
    }
    for is_zip in (True, False):
        tensors = decode_state_dict(save(saved, is_zip=is_zip), "old.pt")
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
            name: tensor.tolist() for name, tensor in net.state_dict().items()
        }


def test_a_state_dict_with_numbers_that_are_not_finite_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^old.pt: tensor w holds values that are not finite"):
        decode_state_dict(save({"w": torch.tensor([1.0, torch.nan])}), "old.pt")
    with pytest.raises(CheckpointError, match=r"^old.pt: a\\nb cannot be the name of a tensor"):
        decode_state_dict(save({"a\nb": torch.zeros(1)}), "old.pt")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_anywhere_is_refused(is_zip: bool) -> None:
    data = save({"model": STATE}, is_zip=is_zip)
    for size in range(0, len(data), 13):
        refusal(data[:size])
    refusal(data[:-1])


def test_a_damaged_part_of_the_zip_is_refused() -> None:
    data = bytearray(save({"w": torch.full((64,), 1.5)}))
    place = data.index(torch.full((64,), 1.5).numpy().tobytes())
    data[place + 2] ^= 1
    assert "damaged (checksum)" in refusal(bytes(data))


def test_a_zip_that_unpacks_to_much_more_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert "unpack to 10000000 bytes" in refusal(buffer.getvalue())
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(save({"w": torch.zeros(4096)}))) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert re.search(r"its \d+ parts unpack to \d+ bytes, the file has \d+", refusal(buffer.getvalue()))


def test_two_parts_of_one_name_are_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert "one name" in refusal(buffer.getvalue())


def test_a_tensor_that_reaches_beyond_its_storage_is_refused() -> None:
    """Eight bytes of storage under a tensor of 4 MB: torch would grow the storage by memory that nobody wrote."""
    size, larger = b"K\x02\x85", b"J\x00\x00\x10\x00\x85"  # (2,) and (2**20,) in a pickle
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(save({"w": torch.zeros(2)}))) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info).replace(size, larger))
    legacy = save({"w": torch.zeros(2)}, is_zip=False)
    assert (legacy.count(size), buffer.getvalue().count(larger)) == (1, 1)
    refusal(buffer.getvalue())
    refusal(legacy.replace(size, larger))


@pytest.mark.parametrize("data", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n", b"\x80", b"PK\x03\x04"])
def test_other_files_are_refused(data: bytes) -> None:
    refusal(data)


def test_an_older_torch_reads_no_pt_file_at_all() -> None:
    for version in ("2.9.1", "2.9.1+cu128", "1.13.0", "unknown"):
        with pytest.raises(CheckpointError, match=r"old.pt: torch .* cannot read a .pt file safely, torch 2.10"):
            check_torch(version, "old.pt")
    for version in ("2.10.0", "2.13.0+cpu", "3.0"):
        check_torch(version, "old.pt")


def test_reading_leaves_no_module_behind(tmp_path: Path) -> None:
    """A pickle that names a module on the path does not even import it."""
    (tmp_path / "canary_module.py").write_text("class Net: pass\n")
    payload = b"\x80\x02ccanary_module\nNet\nq\x00)\x81q\x01."
    sys.path.insert(0, str(tmp_path))
    try:
        for data in (payload, zip_of(payload)):
            refusal(data)
    finally:
        sys.path.remove(str(tmp_path))
    assert "canary_module" not in sys.modules
