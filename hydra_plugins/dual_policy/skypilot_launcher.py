"""`hydra/launcher=skypilot`: a sweep's jobs on machines that SkyPilot finds; run at every app's start, so light."""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dual_policy_plugin.launch.sky_settings import default_node


class SkyPilotLauncher(Launcher):
    """Launches through `launch/sky_sweep.py`; the settings are in `launch/sky_settings.py`."""

    def __init__(self, **settings: Any) -> None:
        """Takes `hydra.launcher`; what the settings say is read and checked when jobs are launched."""
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what the jobs are composed from; the task function runs on the nodes alone."""
        self.config = config
        self.hydra_context = hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs to their end; gives their JobReturns in their order."""
        from dual_policy_plugin.launch.sky_sweep import launch_sweep

        assert self.config is not None
        assert self.hydra_context is not None
        return launch_sweep(self.config, self.hydra_context, job_overrides, initial_job_idx)


_NODE = {"_target_": f"{__name__}.SkyPilotLauncher", **default_node()}
ConfigStore.instance().store(group="hydra/launcher", name="skypilot", node=_NODE, provider="dual_policy")
