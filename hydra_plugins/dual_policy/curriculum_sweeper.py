"""`hydra/sweeper=dual_policy_curriculum`: Hydra's basic sweeper, and with a ladder a walk through its stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from dual_policy_plugin.curriculum.config import default_node


class CurriculumSweeper(BasicSweeper):
    """The basic sweeper while `ladder` is null; the settings are in dual_policy_plugin/curriculum/config.py."""

    def __init__(self, max_batch_size: int | None = None, params: Any = None, **settings: Any) -> None:
        """Takes `hydra.sweeper`; what the settings say is read and checked when the sweep begins."""
        super().__init__(max_batch_size, params)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the sweep; gives the launcher's JobReturns by batch."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from dual_policy_plugin.curriculum.config import load_settings

        assert self.config is not None
        assert self.hydra_context is not None
        node: Any = OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)
        settings = load_settings(node)
        if settings.ladder is None:
            return super().sweep(arguments)

        from dual_policy_plugin.curriculum.dry_run import describe_sweep
        from dual_policy_plugin.curriculum.request import SweepRequest
        from dual_policy_plugin.curriculum.stages import run_sweep
        from dual_policy_plugin.train import train

        words = [*self._parse_config(), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        returns: list[Any] = []

        def launch(batch: Sequence[Sequence[str]], first: int) -> Any:
            assert self.launcher is not None
            returns.append(self.launcher.launch(batch, initial_job_idx=first))
            return returns[-1]

        request = SweepRequest(
            settings=settings,
            node=node,
            overrides=words,
            grid=self.split_arguments(parser.parse_overrides(words), None)[0],
            folder=Path(self.config.hydra.sweep.dir),
            compose=self._compose,
            launch=launch,
            launcher=str(self.config.hydra.runtime.choices["hydra/launcher"]),
            is_patient=getattr(self.launcher, "_EXECUTOR", "") == "slurm",  # submitit's name of it
        )
        if settings.dry_run:
            print(describe_sweep(request, train))
        else:
            run_sweep(request)
        return returns

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a job, as the job will see it."""
        from dual_policy_plugin.hydra_app.interpolation import keep_requested

        assert self.config is not None
        assert self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            del cfg["hydra"]
        return keep_requested(cfg)


_NODE = {"_target_": f"{__name__}.CurriculumSweeper", **default_node()}
ConfigStore.instance().store(group="hydra/sweeper", name="dual_policy_curriculum", node=_NODE, provider="dual_policy")
