"""A ladder of the versions of a W&B artifact, by the sweep config that ships, against a loopback service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from tests.curriculum.sweeps import SMALL, state_of
from tests.services.fixtures import wandb_server  # noqa: F401
from tests.services.wandb_server import WandbServer
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were

URI = "wandb://team/arena/model/old"


@pytest.mark.slow
def test_every_version_is_a_stage_and_stays_what_it_was(
    tmp_path: Path,
    wandb_server: WandbServer,  # noqa: F811
) -> None:
    old = [f"train_dir={tmp_path}", "run=old", "trainer.total_timesteps=600", "trainer.checkpoint_interval=1"]
    assert main(["train", *SMALL, *old]) == 0
    files = sorted((tmp_path / "old/checkpoints").glob("model_*.safetensors"))[:2]
    for path in files:
        wandb_server.add_artifact("team", "arena", "old", files={path.name: path.read_bytes()})
    words = ["train", "+sweep=curriculum_wandb", f"hydra.sweeper.ladder.uri={URI}", *SMALL, f"train_dir={tmp_path}"]
    words += ["run=s", "hydra.sweeper.rating_episodes=16", "hydra.sweeper.episodes=64", "hydra.sweeper.promote_at=0.01"]
    with wandb_server.client():
        assert main(words) == 0
        state = state_of(tmp_path)
        assert {rung["uri"] for rung in state["rungs"]} == {f"{URI}:v0", f"{URI}:v1"}
        assert all(rung["rating"] is not None for rung in state["rungs"])
        assert [gate["decision"] for gate in state["gates"]] == ["promote", "promote"]

        # a further version is no further stage of a sweep that has begun
        wandb_server.add_artifact("team", "arena", "old", files={"x.safetensors": files[0].read_bytes()})
        state["status"], state["stage"] = "running", 2  # as where it was killed before the last gate
        del state["gates"][1]
        (tmp_path / "s/curriculum.json").write_text(json.dumps(state))
        assert main(words) == 0
    after = state_of(tmp_path)
    assert after["rungs"] == state["rungs"]
    assert [gate["decision"] for gate in after["gates"]] == ["promote", "promote"]
