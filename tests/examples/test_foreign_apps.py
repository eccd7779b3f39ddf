"""The node in apps whose config has no place for it, and the mends that docs/your_trainer.md names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

APP = """
from dataclasses import dataclass, field
from typing import Any
import hydra
from hydra.core.config_store import ConfigStore
from dual_policy_plugin import DualPolicyError, load_dual_policy

@dataclass
class Trainer:
    lr: float = 0.1

@dataclass
class Open:
    trainer: Trainer = field(default_factory=Trainer)
    opponents: Any = None

ConfigStore.instance().store("empty", {"lr": 0.1})
ConfigStore.instance().store("text", {"trainer": "sgd"})
ConfigStore.instance().store("typed", Open)

@hydra.main(version_base="1.3", config_path=None, config_name="empty")
def main(cfg):
    found = cfg.get("opponents") or cfg.trainer.dual_policy
    print(load_dual_policy(found).npc.uri, sorted(cfg))

main()
"""
URI = "checkpoint_npc.uri=builtin://arena/weak"
THERE = ("+dual_policy=checkpoint", f"trainer.dual_policy.{URI}")
ELSEWHERE = ("+dual_policy@opponents=checkpoint", f"opponents.{URI}")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "app.py").write_text(APP)
    command = [sys.executable, "app.py", *words, "hydra.run.dir=out"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("config", "words", "keys"),
    [
        ("empty", THERE, ["lr", "trainer"]),
        ("empty", ELSEWHERE, ["lr", "opponents"]),
        ("text", ELSEWHERE, ["opponents", "trainer"]),
        ("typed", ELSEWHERE, ["opponents", "trainer"]),
    ],
)
def test_the_node_finds_a_place(tmp_path: Path, config: str, words: tuple[str, ...], keys: list[str]) -> None:
    done = run(tmp_path, f"--config-name={config}", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"builtin://arena/weak {keys}\n"


def test_a_typed_config_without_a_place_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--config-name=typed", *THERE)
    assert done.returncode == 1
    assert "Key 'dual_policy' not in 'Trainer'" in done.stderr
