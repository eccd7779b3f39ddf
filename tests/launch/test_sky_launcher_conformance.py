"""Hydra's own suites, with jobs of an app that is not ours on the stand-in's nodes.

What cannot run without a cloud, and why: `test_sweep_with_custom_resolver` wants the return value of a function of the
test's process, and a node runs the app, whose value is in result.json (shown below); IntegrationTestSuite compares the
jobs' working directories with folders of this machine, and a job's working directory is the node's.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.launch.sky_sdk import load_sky
from hydra_plugins.dual_policy.skypilot_launcher import SkyPilotLauncher
from tests.launch.sky_stand_in import Cloud

try:
    load_sky()
except LaunchError:
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

pytestmark = [  # the suites' apps name no version_base
    pytest.mark.filterwarnings("ignore::UserWarning:hydra.*"),
    pytest.mark.filterwarnings("ignore:.*Future Hydra versions will no longer change working directory:UserWarning"),
]
OVERRIDES = [
    "hydra.launcher.template=${oc.env:TEST_TEMPLATE}",
    "hydra.launcher.sync_uri=${oc.env:TEST_STORAGE}",
    "hydra.launcher.skip_git_check=true",
    "hydra.launcher.poll_s=0.05",
]
RUN = f"""words=(
)
exec {sys.executable} -W ignore -m hydra.test_utils.a_module "${{words[@]}}"
"""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the sweep's, which the suites remove."""
    return tmp_path_factory.mktemp("sky")


@pytest.fixture(autouse=True)
def cloud(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr(VersionBase.instance(), "version_base", Version("1.1"))  # as in a new process
    for name in ("app", "storage"):
        (place / name).mkdir()
    monkeypatch.chdir(place / "app")
    (place / "app.yaml").write_text(json.dumps({"run": RUN}))
    monkeypatch.setenv("TEST_TEMPLATE", str(place / "app.yaml"))
    monkeypatch.setenv("TEST_STORAGE", str(place / "storage"))
    one = Cloud(place / "cloud")
    one.install(monkeypatch.setattr)
    log = logging.getLogger()
    before = list(log.handlers)
    yield one
    one.end()
    for handler in [handler for handler in log.handlers if handler not in before]:  # Hydra's, into files that are gone
        log.removeHandler(handler)
        handler.close()


def test_hydra_finds_the_launcher() -> None:
    assert SkyPilotLauncher.__name__ in {plugin.__name__ for plugin in Plugins.instance().discover(Launcher)}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher_name", "overrides"), [("skypilot", OVERRIDES)])
class TestLauncherSuite(LauncherTestSuite):  # type: ignore[misc]
    """One job, several, and what a launcher must refuse."""

    @pytest.mark.skip(reason="the value would be that of a function in this process; a node runs the app")
    def test_sweep_with_custom_resolver(self, launcher_name: str, overrides: list[str]) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("skypilot", [*OVERRIDES, "hydra/sweeper=dual_policy_curriculum", "hydra.sweeper.max_batch_size=2"])],
)
class TestBatchedSuite(BatchedSweeperTestSuite):  # type: ignore[misc]
    """Jobs in batches."""


def run_app(sweep_runner: Any, place: Path, folder: Path, overrides: list[str], run: str) -> Any:
    """Sweeps in `folder` over an app that is a line of shell, which finds its own folder in DIR."""
    find = 'for word in "${words[@]}"; do case "$word" in hydra.run.dir=*) DIR="${word#*=}";; esac; done\n'
    text = f'words=(\n)\n{find}DIR="${{DIR//\\"/}}"; mkdir -p "$DIR"; {run}'
    (place / "app.yaml").write_text(json.dumps({"run": text}))
    return sweep_runner(
        calling_file=None, calling_module="hydra.test_utils.a_module", task_function=None, config_path="configs",
        config_name="compose", overrides=["hydra/launcher=skypilot", *OVERRIDES, *overrides], temp_dir=folder,
    )  # fmt: skip


def test_another_apps_value_is_the_objective_of_its_result(
    hydra_sweep_runner: Any, place: Path, tmp_path: Path
) -> None:
    write = """echo '{"objective": [0.25, '${#words[@]}']}' > "$DIR/result.json" """
    with run_app(hydra_sweep_runner, place, tmp_path, ["bar=1,2"], write) as sweep:
        returns = sweep.returns[0]
        assert json.loads((tmp_path / "1" / "result.json").read_text()) == {"objective": [0.25, 6]}
    assert [one.return_value for one in returns] == [[0.25, 6], [0.25, 6]]
    assert [one.cfg.bar for one in returns] == [1, 2]
    assert [str(one.hydra_cfg.hydra.job.id) for one in returns] == ["1", "2"]


def test_a_node_gets_the_words_of_its_job_alone(hydra_sweep_runner: Any, place: Path, tmp_path: Path) -> None:
    odd = "+text='a \"b\" $HOME `x` * ; \\'c\\''"
    keep = 'printf "%s\\n" "${words[@]}" > "$DIR/words"'
    with run_app(hydra_sweep_runner, place, tmp_path, ["bar=1", odd], keep) as sweep:
        (job,) = sweep.returns[0]
        assert job.return_value is None, "an app without a result has no value"
    where = place / "storage" / str(tmp_path / "0").lstrip("/")
    words = (where / "words").read_text().splitlines()
    assert words[:4] == ["--config-name", "compose", "--config-path", "pkg://hydra.test_utils.configs"]
    assert words[4] == "bar=1"
    assert OverridesParser.create().parse_override(words[5]).value() == job.cfg.text == "a \"b\" $HOME `x` * ; 'c'"
    assert words[6:] == [f'hydra.run.dir="{where}"']


def test_a_failed_job_reaches_the_sweeper_as_an_error_when_all_have_ended(
    hydra_sweep_runner: Any, place: Path, tmp_path: Path, cloud: Cloud
) -> None:
    fail = 'case "${words[*]}" in *bar=1*) exit 7;; *) sleep 0.3;; esac'
    with (
        pytest.raises(LaunchError, match=r"job 0 \(dp-.*, id 1\) ended as FAILED \(Job exited with exit code 7"),
        run_app(hydra_sweep_runner, place, tmp_path, ["bar=1,2"], fail),
    ):
        pass
    assert cloud.history(2)[-1] == "SUCCEEDED"


def test_secrets_reach_the_node_and_no_file_of_the_sweep(
    hydra_sweep_runner: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "canary-1234")
    words = ["bar=1", "hydra.launcher.secrets=[TEST_KEY]", "hydra.launcher.envs={NAME: 5}"]
    write = 'echo "{\\"objective\\": \\"$TEST_KEY $NAME\\"}" > "$DIR/result.json"'
    with run_app(hydra_sweep_runner, place, tmp_path, words, write) as sweep:
        (job,) = sweep.returns[0]
        assert job.return_value == "canary-1234 5"
        (tmp_path / "0" / "result.json").unlink()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert tmp_path / "skypilot_jobs.json" in files
        assert [path for path in files if b"canary" in path.read_bytes()] == []
    monkeypatch.delenv("TEST_KEY")
    with (
        pytest.raises(LaunchError, match=r"^job 0: hydra\.launcher\.secrets names TEST_KEY, which is not set here"),
        run_app(hydra_sweep_runner, place, tmp_path, ["bar=2", "hydra.launcher.secrets=[TEST_KEY]"], "true"),
    ):
        pass
