"""No file can make us run anything: every hostile file is refused with its name and a reason, and no canary fires."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dual_policy_plugin.checkpoint import encode_policy
from dual_policy_plugin.cli import main
from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.policies.loading import load_policy_from_checkpoint
from tests.security.doors import complaints
from tests.security.hostile_files import PROTOCOLS, all_files, containers, encode, ways, write_scratch
from tests.security.mutations import ARGS, make_policy_file

ALLOWING_READER = """
import os, pathlib, pickle, sys, warnings
warnings.simplefilter("ignore")
scratch, canaries = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.path.insert(0, str(scratch))
for path in sorted(scratch.glob("*.pickle"), key=lambda path: int(path.stem)):
    try:
        kept = pickle.loads(path.read_bytes())
        getattr(kept, "wait", int)()  # of a process
        getattr(kept, "read", int)()  # of what a process writes
        os.waitpid(kept, 0)  # of a process that was only started
    except Exception:
        pass  # most fail after they did their work
    found = list(canaries.iterdir())
    print("\\nfired", path.stem, len(found))
    for canary in found:
        canary.rename(scratch / f"fired_{path.stem}_{canary.name}")
    sys.modules.pop("canary_module", None)
"""


@pytest.fixture
def scratch(tmp_path: Path) -> tuple[Path, Path]:
    """(canary, scratch): the canary's folder is empty."""
    canary = tmp_path / "canaries" / "canary"
    canary.parent.mkdir()
    write_scratch(tmp_path / "scratch", canary)
    return canary, tmp_path / "scratch"


def test_every_way_is_a_live_one(scratch: tuple[Path, Path]) -> None:
    """The same pickles do fire where they are allowed to, by each of the three operations that call."""
    canary, folder = scratch
    expected = []
    for number, (name, call) in enumerate(ways(canary, folder).items()):
        protocol = PROTOCOLS[number % 6]
        operation = ("reduce", "obj", "inst")[number // 6 % 3]
        (folder / f"{number}.pickle").write_bytes(encode(call, protocol, operation))
        expected.append(f"{number} {name}")
    command = [sys.executable, "-c", ALLOWING_READER, str(folder), str(canary.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=folder)
    fired = set(re.findall(r"^fired (\d+) [1-9]", done.stdout, re.MULTILINE))
    assert [name for name in expected if name.split()[0] not in fired] == []
    assert len(expected) >= 50


def test_no_hostile_file_runs_anything(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    """A seventh of all (`make fuzz` takes all): each protocol with every way, and with every container."""
    canary, folder = scratch
    chosen = list(all_files(canary, folder, encode_policy(make_policy_file())))[::7]
    labels = [label.split(", ", 2) for label, _, _ in chosen]
    num_ways, num_containers = len(ways(canary, folder)), len(containers(b"", b"\0" * 8))
    assert num_ways >= 40
    assert len(chosen) >= 500
    assert len({(way, protocol) for way, protocol, _ in labels}) == num_ways * len(PROTOCOLS)
    assert len({(protocol, container) for _, protocol, container in labels}) == len(PROTOCOLS) * num_containers
    assert complaints(chosen, canary, tmp_path) == []


IMPORT_PATHS = (
    "os.system",
    "os:system",
    "canary_module",
    "canary_module.Net",
    "canary_module:Net",
    "torch.nn.Linear",
    "./canary_module.py",
    "file://canary_module.py",
    "builtins.eval",
    "__import__('canary_module')",
    "${canary_module}",
    "../fast",
    "",
)


@pytest.mark.parametrize("name", IMPORT_PATHS)
def test_a_checkpoint_can_name_no_import_path(
    name: str, scratch: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, folder = scratch
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    file = make_policy_file()
    path = tmp_path / "model.safetensors"
    for changes in ({"architecture": name}, {"args": {"_target_": name, **ARGS}}, {"args": {"encoder": name}}):
        path.write_bytes(encode_policy(replace(file, **changes)))
        with pytest.raises(CheckpointError, match=r"its architecture cannot be built: agent"):
            load_policy_from_checkpoint(str(path))
    # in metadata, where it is only text, it stays text
    path.write_bytes(encode_policy(replace(file, metadata={"_target_": name, "architecture": name, "agent": [name]})))
    assert isinstance(load_policy_from_checkpoint(str(path)), torch.nn.Module)
    assert "canary_module" not in sys.modules
    assert not canary.exists()


@pytest.mark.parametrize("key", ["agent.name", "env.name", "trainer.dual_policy.checkpoint_npc.agent", "wandb.mode"])
@pytest.mark.parametrize("name", ["canary_module:Net", "canary_module.Net", "os.system"])
def test_a_config_can_name_no_import_path(
    key: str,
    name: str,
    scratch: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    canary, folder = scratch
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    weights = make_policy_file().tensors
    torch.save(weights, tmp_path / "old.pt")
    words = ["train", f"{key}={name}", "+dual_policy=checkpoint", "trainer.total_timesteps=64", "device=cpu"]
    words += [f"trainer.dual_policy.checkpoint_npc.uri={tmp_path / 'old.pt'}", f"train_dir={tmp_path / 'runs'}"]
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert name in errors[0]
    assert "canary_module" not in sys.modules
    assert not canary.exists()
