"""One Slurm for all tests of a test process, where it can be had."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Cluster, missing, slurm


@pytest.fixture(scope="session")
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def cluster(_slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, found by whatever the test starts; no job is left when the test ends."""
    monkeypatch.setenv("SLURM_CONF", str(_slurm.conf))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the names of its nodes are known to Slurm only
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield _slurm
    _slurm.clear()
