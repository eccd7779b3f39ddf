"""The bench of saving counts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_saving

TINY = (
    "env.num_envs=4", "trainer.horizon=4", "trainer.num_minibatches=2", "agent.hidden_size=16", "trainer.threads=1",
    "trainer.checkpoint_interval=2",
)  # fmt: skip


def test_saves_within_the_loop_are_counted_and_timed(tmp_path: Path) -> None:
    found = bench_saving.run_loop(tmp_path, "a", 5, TINY)
    assert found["num_saves"] == 4  # checkpoint and state after iterations 2 and 4; those of the last are not in it
    assert 0 < found["saving_s"] < found["loop_s"]
    found = bench_saving.run_loop(tmp_path, "b", 5, [*TINY, *bench_saving.NEVER])
    assert (found["num_saves"], found["saving_s"]) == (0, 0)
    assert (tmp_path / "b/checkpoints/model_0005.safetensors").exists()


def test_a_width_gives_a_state_of_that_size() -> None:
    assert bench_saving.width_for(10.0) < bench_saving.width_for(40.0)
    policy_mb = [bench_saving.megabytes_of(bench_saving.width_for(mb)) for mb in (10.0, 40.0)]
    assert policy_mb == pytest.approx([10.0, 40.0], rel=0.1)
