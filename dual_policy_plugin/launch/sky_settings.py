"""The settings of `hydra/launcher=skypilot`, `hydra.launcher.*`: each with its meaning, each range checked here.

`load_settings` turns the composed node into a `SkyLauncherConfig`; the Hydra plugin stores `default_node()`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dual_policy_plugin.config_checks import check, check_range
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.nodes import build, check_keys

KEY = "hydra.launcher"


@dataclass(kw_only=True, slots=True, frozen=True)
class SkyLauncherConfig:
    """How the jobs of a sweep run on SkyPilot."""

    mode: str = "jobs"
    """jobs: each a managed job, on machines of its own that are replaced where they are lost. cluster: all on one
    cluster, as many at once as it has room for."""
    cluster: str | None = None
    """The cluster's name, for mode=cluster; it is made where there is none."""
    template: str = "train"
    """A task of `sky/` by its name, or a YAML file whose `run` has a words=( ... ) block."""
    gpus: str | None = None
    """Per node: a count, KIND or KIND:COUNT; 0: none; None: what the template says."""
    cpus: str | None = None
    """Per node: 8, or 8+ for at least so many; None: what the template says."""
    nodes: int = 1
    """Of each job."""
    spot: bool | None = None
    """Whether the machines may be taken away, at a lower price; None: what the template says."""
    infra: str | None = None
    """Where: aws, gcp/us-central1, k8s/context, slurm/cluster, ...; None: what the template says."""
    max_parallel: int = 8
    """Jobs that are in the queue or run at the same time."""
    sync_uri: str | None = None
    """s3://bucket/prefix/ or a shared folder that run folders come back through; None: trainer.sync_uri."""
    poll_s: float = 30.0
    """Seconds between two looks at the queue."""
    envs: dict[str, Any] | None = None
    """Variables of the nodes."""
    secrets: list[str] | None = None
    """Names of variables of this shell that the nodes get as SkyPilot's secrets, which it hides."""
    max_runtime_hours: float | None = None
    """Of a job over all restarts; 0: no limit; None: what the template says."""
    heartbeat_timeout_seconds: int | None = None
    """Without a sign of life a run is begun again; 0: never; None: what the template says."""
    git_ref: str | None = None
    """Branch, tag or commit on the remote that the nodes run; None: what is checked out here."""
    skip_git_check: bool = False
    """Send the working directory as it is, committed or not."""
    idle_minutes: int = 10
    """After which an idle cluster of mode=cluster stops."""
    down: bool = True
    """Whether such a cluster ends, rather than stops."""

    def __post_init__(self) -> None:
        check(self.mode in ("jobs", "cluster"), f"{KEY}.mode", self.mode, "use jobs or cluster")
        if self.mode == "cluster" and not self.cluster:
            raise ConfigError(f"{KEY}.mode=cluster needs a name; set {KEY}.cluster, for example {KEY}.cluster=sweep")
        if self.mode == "jobs" and self.cluster is not None:
            raise ConfigError(
                f"{KEY}.cluster={self.cluster} has no effect with mode=jobs; add {KEY}.mode=cluster, or remove it"
            )
        for name, low, high in (
            ("nodes", 1, 10**4), ("max_parallel", 1, 10**4), ("poll_s", 0.01, 3600), ("idle_minutes", 0, 10**5),
        ):  # fmt: skip
            check_range(f"{KEY}.{name}", getattr(self, name), low, high)
        for name in ("max_runtime_hours", "heartbeat_timeout_seconds"):
            if getattr(self, name) is not None:
                check_range(f"{KEY}.{name}", getattr(self, name), 0, 10**7)
        for name in (*(self.secrets or ()), *(self.envs or {})):
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)) is None:
                what = str(name).partition("=")[0]
                raise ConfigError(
                    f"{KEY}: {what[:40]!r} is no variable's name; secrets are names alone, [WANDB_API_KEY], envs are "
                    "{NAME: value}"
                )
        if self.sync_uri is not None and "://" in self.sync_uri:
            check(
                self.sync_uri.startswith("s3://"),
                f"{KEY}.sync_uri",
                self.sync_uri,
                "use s3://bucket/prefix/ or a folder",
            )


def default_node() -> dict[str, Any]:
    """The keys of `hydra.launcher` with their defaults, for Hydra's config store."""
    return {field.name: field.default for field in fields(SkyLauncherConfig)}


def load_settings(node: Mapping[str, Any]) -> SkyLauncherConfig:
    """The settings in a plain `hydra.launcher` node.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, settings that contradict each other.
    """
    values = {name: value for name, value in node.items() if name != "_target_"}
    check_keys(values, default_node(), KEY)
    if isinstance(values.get("gpus"), int):
        values["gpus"] = str(values["gpus"])
    return build(SkyLauncherConfig, values, KEY)
