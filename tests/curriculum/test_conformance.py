"""Without a ladder the sweeper is Hydra's basic one: Hydra's own suites say so, through two launchers."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

from dual_policy_plugin.curriculum.config import default_node
from hydra_plugins.dual_policy.curriculum_sweeper import CurriculumSweeper

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:hydra.*")  # the suites' apps name no version_base
SWEEPER = "hydra/sweeper=dual_policy_curriculum"


@pytest.fixture(autouse=True)
def _no_version_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: an app that ran in this one before may have named its own."""
    monkeypatch.setattr(VersionBase.instance(), "version_base", Version("1.1"))


def test_hydra_finds_the_sweeper() -> None:
    found = {plugin.__name__ for plugin in Plugins.instance().discover(Sweeper)}
    assert CurriculumSweeper.__name__ in found


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", [SWEEPER])])
class TestLauncherSuite(LauncherTestSuite):  # type: ignore[misc]
    """One job, several, and what a launcher must refuse."""


@pytest.mark.slow
@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", [SWEEPER, "hydra.sweeper.max_batch_size=2"])])
class TestBatchedSuite(BatchedSweeperTestSuite):  # type: ignore[misc]
    """Jobs in batches."""


@pytest.mark.slow
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", SWEEPER, "hydra/launcher=basic"])])
class TestIntegrationSuite(IntegrationTestSuite):  # type: ignore[misc]
    """Apps in processes of their own."""


def test_a_sweep_without_a_ladder_knows_every_setting() -> None:
    settings: dict[str, Any] = default_node()
    assert settings["ladder"] is None
    assert {"order", "carry", "promote_at", "on_fail", "max_batch_size", "params"} <= set(settings)
