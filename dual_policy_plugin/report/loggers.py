"""Weights & Biases: takes every metric and timing of an iteration, and the checkpoints; off, offline or online.

The variable WANDB_MODE can make a run quieter than its config says, never louder. Where the config is silent, W&B's own
variables and settings say project, entity, group and tags.

The W&B run's id stands in the run directory's state, so a continued run goes on in the same W&B run. Its files stand in
the run directory too, under wandb/.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from dual_policy_plugin.config import WandbConfig
from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.npc.sources.wandb_client import open_client
from dual_policy_plugin.publishing import Checkpoint, Destination, checkpoint_facts, plain_name
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.wandb_runs import DEFAULT_PROJECT, clean, quieter_mode, wandb_defaults

if TYPE_CHECKING:
    import wandb

POLICY_NAME = "model.safetensors"
"""The one file of an artifact."""
UPLOAD_TIMEOUT_S = 300
_STATE_NAME = "wandb.json"
_logger = logging.getLogger(__name__)


class WandbLogger:
    """The open W&B run; does nothing where wandb.mode is off."""

    def __init__(self, run: wandb.Run | None) -> None:
        """Takes over an open W&B run; users call `open`."""
        self._run = run

    @classmethod
    def open(
        cls, config: WandbConfig, run_directory: RunDirectory, *, name: str, run_config: Mapping[str, Any]
    ) -> Self:
        """Starts or continues the W&B run of `run_directory`.

        Args:
            config: mode, project, entity, group, tags.
            run_directory: holds the W&B run's id and its files.
            name: how W&B shows the run.
            run_config: the run's config as plain values; W&B shows and compares it.

        Raises:
            ConfigError: wandb is not installed, or W&B cannot be reached or refuses the login.
        """
        mode = quieter_mode(config.mode, os.environ.get("WANDB_MODE", ""))
        if mode == "off":
            return cls(None)
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"wandb.mode={mode} needs the package wandb; "
                f"install it with `pip install 'dual-policy-plugin[wandb]'`, or use wandb=off"
            ) from error
        try:
            if mode == "online" and open_client() is None:
                raise ConfigError(
                    "wandb.mode=online finds no W&B login; "
                    "run `wandb login`, set WANDB_API_KEY, or use wandb=offline or wandb=off"
                )
            run = wandb.init(
                mode="online" if mode == "online" else "offline",
                project=config.project or wandb_defaults()[1] or DEFAULT_PROJECT,
                entity=config.entity,
                group=config.group,
                tags=config.tags or None,  # an empty list would hide WANDB_TAGS
                name=name,
                id=_run_id(run_directory),
                resume="allow" if mode == "online" else None,  # an offline run is joined when it is synced
                dir=str(run_directory.path),
                config=dict(run_config),
                settings=wandb.Settings(console="off"),  # else it records every redraw of the progress panel
            )
        except wandb.errors.Error as error:
            reason = clean(str(error))  # a base URL may hold a password
            raise ConfigError(
                f"wandb.mode={mode} could not start: {reason}; "
                f"see that the server is reachable and the login right, or use wandb=offline or wandb=off"
            ) from error
        return cls(run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends the metrics of an iteration.

        Args:
            metrics: by name.
            step: agent_step. Figures of one step may come in several calls; W&B drops those of a step before its last,
                so what a continued run does again is not shown twice.
        """
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def destination(self, run_name: str) -> Destination | None:
        """Where the run's checkpoints go as versions of one artifact of type model; None: no W&B run.

        The newest version has the alias `latest` (W&B's own doing), the best one `best`. Offline the client keeps a
        copy that `wandb sync` sends; which version it will be is not known then.

        Args:
            run_name: the run's name; the artifact has the same, with - for what a name cannot hold.
        """
        if self._run is None:
            return None
        run, name = self._run, plain_name(run_name)
        place = f"wandb://{run.entity}/{run.project}/model/{name}" if not run.offline else f"offline:{name}"

        def send(checkpoint: Checkpoint) -> str:
            import wandb

            try:
                facts = {**checkpoint_facts(checkpoint.path), "wandb_run": run.id}
                artifact = wandb.Artifact(name, type="model", metadata=facts)
                # mutable: the client uploads a copy of its own
                artifact.add_file(str(checkpoint.path), name=POLICY_NAME, policy="mutable", skip_cache=True)
                logged = run.log_artifact(artifact, aliases=["best"] if checkpoint.is_best else [])
                if run.offline:
                    return place
                logged.wait(timeout=UPLOAD_TIMEOUT_S)
            except Exception as error:  # the client raises its own errors, ValueError, and those of its service
                what = f"{checkpoint.path.name} could not be published to {place}"
                raise RunError(f"{what}: {clean(str(error)) or type(error).__name__}") from error
            return f"{place}:{logged.source_version}"

        return Destination(name=place, send=send)

    def finish(self, result: Mapping[str, Any] | None = None, *, exit_code: int = 0) -> None:
        """Sends what is left and ends the W&B run; may be called twice.

        Args:
            result: goes into the run's summary.
            exit_code: 0 marks the W&B run as finished, anything else as failed.
        """
        if self._run is None:
            return
        if result is not None:
            self._run.summary.update(dict(result))
        self._run.finish(exit_code=exit_code)
        self._run = None


def _run_id(run_directory: RunDirectory) -> str:
    """The stored id of the run directory's W&B run; a new one, stored before its first use, if there is none."""
    stored = run_directory.load_state(_STATE_NAME)
    if stored is not None:
        return str(json.loads(stored)["id"])
    run_id = secrets.token_hex(4)
    run_directory.save_state(_STATE_NAME, json.dumps({"id": run_id}).encode())
    return run_id
