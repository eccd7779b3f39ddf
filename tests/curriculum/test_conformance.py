"""Without a ladder the sweeper is Hydra's basic one: Hydra's own suites say so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from hydra.types import HydraContext, RunMode
from hydra.version import VersionBase
from packaging.version import Version

from dual_policy_plugin.curriculum.config import default_node
from dual_policy_plugin.errors import ConfigError
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


def test_an_app_without_a_trainer_has_nothing_to_give_a_ladder_to(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("db: mysql\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        words = [SWEEPER, "hydra.sweeper.ladder=[builtin://arena/weak]"]
        cfg = GlobalHydra.instance().config_loader().load_configuration("app", words, RunMode.MULTIRUN)
        sweeper = Plugins.instance().instantiate_sweeper(
            hydra_context=HydraContext(GlobalHydra.instance().config_loader(), Callbacks(cfg)),
            task_function=lambda cfg: None,
            config=cfg,
        )
        with pytest.raises(ConfigError, match=re.escape("hydra.sweeper.ladder is set, and the config of this app has")):
            sweeper.sweep([])
