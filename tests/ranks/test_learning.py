"""Several ranks learn what one process learns from the same batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dual_policy_plugin.checkpoint import decode_policy
from tests.ranks.conftest import RunRanks
from tests.ranks.programs import ITERATION


def weights_of(path: Path, name: str) -> torch.Tensor:
    """All weights of a checkpoint of the run, as one vector."""
    file = decode_policy((path / f"runs/several/checkpoints/{name}.safetensors").read_bytes(), name)
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(file.tensors.items())])


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "runs/several/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
def test_ranks_learn_as_one_process_with_the_same_batch(run_ranks: RunRanks, tmp_path: Path, pool: bool) -> None:
    """8 iterations of two updates, 8 envs: on one rank, on two of 4, on four of 2.

    Every episode is the same, so what is counted is equal. Only sums of float32 are added up in another order: the
    weights end within 1e-5 of the way that they went (about 1e-6 was seen), a loss within 1e-6.
    """
    settings = {"pool": pool, "total_timesteps": 8 * ITERATION, "epochs": 2, "learning_rate": 0.003}
    weights, figures = {}, {}
    for world in (1, 2, 4):
        ended = run_ranks("train", world, num_envs=8 // world, **settings)
        assert [one.code for one in ended] == [0] * world, ended
        weights[world], figures[world] = weights_of(tmp_path, "latest"), metrics(tmp_path)
        start = weights_of(tmp_path, "model_0000")
        (tmp_path / "runs").rename(tmp_path / f"runs of {world}")
    way = (weights[1] - start).norm()
    assert way > 0.5
    assert any("dual_policy/episodes" in line for line in figures[1])
    for world in (2, 4):
        assert (weights[world] - weights[1]).norm() < 1e-5 * way
        for one, other in zip(figures[1], figures[world], strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                near = pytest.approx(value, rel=1e-5, abs=1e-6)
                assert other[name] == (near if name.startswith("losses/") else value), name
    if pool:
        names = {name.split("/")[2] for line in figures[1] for name in line if name.startswith("dual_policy/npc/")}
        assert {"random", "forager", "medium"} < names  # and snapshots
        assert {line["dual_policy/policy_a_agent_count"] for line in figures[1]} == {4.0, 5.0, 6.0}
