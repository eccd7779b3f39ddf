"""docs/own_architecture.md: its net is written as it says, trains, is an NPC, and both its ways agree."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from dual_policy_plugin.cli import main
from dual_policy_plugin.envs.arena_config import ACTIONS, ArenaConfig, observation_space
from dual_policy_plugin.types import ObservationSpace
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "own_architecture.md"
SPACES = {
    "window": observation_space(ArenaConfig()),
    "tokens": ObservationSpace(kind="tokens", shape=(5, 3), features=("a", "b"), window=(3, 3), scales=(1.0, 2.0)),
    "vector": ObservationSpace(kind="vector", shape=(4,), features=("a", "b", "c", "d")),
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The page's package, installed into a folder that is on the path."""
    files = {
        block.text.splitlines()[0].removeprefix("# "): block.text for block in blocks(PAGE) if block.language != "sh"
    }
    assert sorted(files) == ["gru_policy.py", "pyproject.toml"]
    (tmp_path / "gru_policy.py").write_text(files["gru_policy.py"])
    (point,) = re.findall(r'entry-points."dual_policy.policies"\]\n(.*)', files["pyproject.toml"])
    info = tmp_path / "gru_policy-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gru-policy\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[dual_policy.policies]\n{point}\n".replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return importlib.import_module("gru_policy")


@pytest.mark.parametrize("kind", SPACES)
def test_a_segment_is_its_steps_with_episode_ends_inside(module: object, kind: str) -> None:
    torch.manual_seed(1)
    space, horizon, num_rows = SPACES[kind], 6, 5
    policy = module.GruPolicy(space, ACTIONS, hidden_size=8)
    shape = (horizon, num_rows, *space.shape)
    obs = torch.randn(shape) if kind == "vector" else torch.randint(0, 2, shape, dtype=torch.uint8)
    dones = torch.rand(horizon, num_rows) < 0.4
    assert dones[:-1].any()
    start = torch.randn(num_rows, policy.state_size)
    logits, values = policy.forward_segment(obs, start, dones)
    state = start
    for t in range(horizon):
        step_logits, step_values, state = policy.forward_step(obs[t], state)
        torch.testing.assert_close(step_logits, logits[t])
        torch.testing.assert_close(step_values, values[t])
        state = state * ~dones[t].unsqueeze(1)
    assert logits.shape == (horizon, num_rows, len(ACTIONS))
    assert logits.requires_grad
    assert not step_logits.requires_grad


def test_its_commands_run_and_its_checkpoint_plays(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["trainer.total_timesteps=2048", "env.num_envs=16", "evals.episodes=16", "trainer.threads=1"]
    (text,) = [block.text for block in blocks(PAGE) if block.language == "sh"]
    pip, *lines = text.replace("\\\n", " ").strip().splitlines()
    assert pip == "pip install ."
    for line in lines:
        words = shlex.split(line)[1:]
        assert main([*words, *(small if words[0] == "train" else ["episodes=4"])]) == 0, line
    table = capsys.readouterr().out
    assert "against_gru" in table
    config = Path("train_dir/against_gru/npc.lock.json").read_text()
    assert '"gru"' in config  # the NPC is a net of the page's architecture
