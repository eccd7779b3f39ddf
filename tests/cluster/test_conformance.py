"""Hydra's own suites for launchers, on a real Slurm."""

from __future__ import annotations

import pytest
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore::UserWarning:hydra.*"),  # the suites' apps name no version_base
]
SLURM = "hydra/launcher=submitit_slurm"


@pytest.fixture(autouse=True)
def _no_version_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: an app that ran in this one before may have named its own."""
    monkeypatch.setattr(VersionBase.instance(), "version_base", Version("1.1"))


@pytest.mark.parametrize(("launcher_name", "overrides"), [("submitit_slurm", [])])
class TestLauncherSuite(LauncherTestSuite):  # type: ignore[misc]
    """One job, several, and what a launcher must refuse."""


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", SLURM])])
class TestIntegrationSuite(IntegrationTestSuite):  # type: ignore[misc]
    """Apps in processes of their own."""
