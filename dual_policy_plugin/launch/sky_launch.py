"""One command line as SkyPilot tasks: what is sent, with which keys, and what it may cost.

Takes what `preflight` and `checkout` have let through; gives plain tasks, which `sky_sdk` hands to SkyPilot. The keys
are put into a task only in the moment in which it is launched.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dual_policy_plugin.config import Config
from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.hydra_app.overrides import text_override
from dual_policy_plugin.launch import sky_sdk
from dual_policy_plugin.launch.checkout import COMMIT_VARIABLE, Checkout
from dual_policy_plugin.launch.preflight import (
    AWS_VARIABLES,
    LOCK_KEY,
    WANDB_VARIABLE,
    Preflight,
    aws_login,
    carry_entries,
    check_carried,
    needed_logins,
    store_lock,
    wandb_key,
)
from dual_policy_plugin.launch.sky_task import TaskOptions, build_task, read_template

COST_VARIABLE = "METTA_HOURLY_COST"
_PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables of this machine that say where, and are no secret."""
_MAX_NAME = 56


@dataclass(kw_only=True, slots=True, frozen=True)
class SkyLaunch:
    """A run that is ready to be launched."""

    preflight: Preflight
    name: str
    """Of the task, and of its cluster where none is named."""
    task: Mapping[str, Any]
    """SkyPilot's config of the task, with empty secrets."""
    secrets: tuple[str, ...]
    """Variables that are filled in when it is launched."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """What a launch costs as far as it is known."""

    hourly: float | None
    """Dollars for an hour of all nodes of all runs."""
    source: str
    """Where that is from, or why it is not known."""

    def text(self, hours: float | None) -> str:
        """One line for people; `hours` is the limit of each run."""
        if self.hourly is None:
            return f"cost: not known; {self.source}"
        most = f", up to ${self.hourly * hours:.2f} in {hours:g} h" if hours else ""
        return f"cost: ${self.hourly:.2f} an hour{most} ({self.source})"


def plan_launch(
    template: str, preflight: Preflight, checkout: Checkout, options: TaskOptions, secrets: Sequence[str] = ()
) -> SkyLaunch:
    """The task of one run, with its lock and the files that the lock names.

    Args:
        template: a task of `sky/`.
        preflight: the run, checked and pinned.
        checkout: the code that is sent.
        options: of the machines.
        secrets: further variables of this machine that the node is to have.

    Raises:
        LaunchError: no such template, or a variable that is not set.
        ConfigError: something that no lock can carry.
    """
    config = preflight.config
    check_carried(config, preflight.entries)
    words = list(preflight.words)
    files = dict(preflight.files)
    if preflight.entries and preflight.is_locked:
        there, carried = carry_entries(preflight.entries)
        place, lock = store_lock(there)
        files |= carried | {place: lock}
        words.append(text_override(LOCK_KEY, place))
    name = task_name(config.run)
    task = build_task(
        read_template(template),
        name=name,
        run=config.run,
        words=words,
        options=options,
        files=files,
        envs=_node_variables(checkout),
    )
    wanted = _needed_secrets(config, preflight) + tuple(secrets)
    task["secrets"] = dict(task.get("secrets") or {}) | dict.fromkeys(wanted, "")
    for one in secrets:
        if not os.environ.get(one):
            raise LaunchError(f"--secret={one}: the variable {one} is not set here; set it, or leave --secret away")
    return SkyLaunch(preflight=preflight, name=name, task=task, secrets=tuple(dict.fromkeys(wanted)))


def check_folder(checkout: Checkout) -> None:
    """Raises a LaunchError where the folder that is sent lacks the scripts that every node begins with."""
    if checkout.git_ref is None and not (checkout.folder / "sky" / "setup.sh").is_file():
        raise LaunchError(f"{checkout.folder} has no sky/setup.sh, which a node begins with; cd into your checkout")


def fill_secrets(launch: SkyLaunch) -> dict[str, Any]:
    """The task with its keys, for SkyPilot alone: never printed, never written."""
    task = copy.deepcopy(dict(launch.task))
    is_aws = any(name in launch.secrets for name in AWS_VARIABLES)
    values = {WANDB_VARIABLE: wandb_key()} | (aws_login() if is_aws else {})
    for name in launch.secrets:
        task["secrets"][name] = os.environ.get(name) or values.get(name) or ""
    return task


def as_yaml(launch: SkyLaunch) -> str:
    """The task for `sky launch`, its keys left out."""
    return str(yaml.dump(dict(launch.task), Dumper=_Dumper, sort_keys=False, width=1000))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Scripts line by line, not with their line breaks written out."""


def _text_node(dumper: Any, text: str) -> Any:
    is_script = "\n" in text and text.isascii() and text.replace("\n", "").isprintable()  # YAML has breaks of its own
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if is_script else None)


_Dumper.add_representer(str, _text_node)


def start(launch: SkyLaunch, *, is_job: bool, cluster: str | None) -> str:
    """Launches it; gives a line that says where to look.

    Raises:
        LaunchError: SkyPilot refuses it.
    """
    task = fill_secrets(launch)
    if is_job:
        job = sky_sdk.start_job(task, launch.name)
        return f"run {launch.preflight.config.run}: managed job {job}; `sky jobs logs {job}`, `sky jobs cancel {job}`"
    where = cluster or launch.name
    job = sky_sdk.start_cluster(task, where, down=False, idle_minutes=None)
    return (
        f"run {launch.preflight.config.run}: job {job} on cluster {where}; `sky logs {where} {job}`, "
        f"`sky cancel {where} {job}`, `sky down {where}`"
    )


def estimate_cost(launches: Sequence[SkyLaunch]) -> Cost:
    """What an hour of all runs costs: SkyPilot's price, else METTA_HOURLY_COST for every node."""
    number = len(launches)
    price, why = None, "SkyPilot has no price for these machines here"
    try:
        price = sky_sdk.hourly_cost(launches[0].task)
    except LaunchError as error:  # a launch can do without, and the line of the cost says why
        why = str(error)
    if price is not None:
        return Cost(hourly=price * number, source="SkyPilot's price")
    own = launches[0].preflight.config.hourly_cost
    if own is not None:
        return Cost(hourly=own * number * int(launches[0].task["num_nodes"]), source=f"{COST_VARIABLE}={own:g} a node")
    return Cost(hourly=None, source=f"{why}, and {COST_VARIABLE} is not set")


def with_price(launch: SkyLaunch, cost: Cost, number: int) -> SkyLaunch:
    """The launch with the price of a node among the node's variables, where it is known."""
    if cost.hourly is None:
        return launch
    task = copy.deepcopy(dict(launch.task))
    task["envs"][COST_VARIABLE] = f"{cost.hourly / number / int(task['num_nodes']):.6f}"
    return replace(launch, task=task)


def task_name(run: str) -> str:
    """The run's name as SkyPilot takes it for clusters and jobs: letters, digits, `-`, `_`, `.`, a letter first.

    A name that is changed ends in a digest: no other run has it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-._")
    if name == run and name[:1].isalpha() and len(name) <= _MAX_NAME:
        return name
    first = name[: _MAX_NAME - len("run--12345678")].strip("-._")
    parts = (first if first[:1].isalpha() else f"run-{first}".strip("-"), hashlib.sha256(run.encode()).hexdigest()[:8])
    return "-".join(parts)


def _needed_secrets(config: Config, preflight: Preflight) -> tuple[str, ...]:
    wandb_for, aws_for = needed_logins(config, preflight.entries)
    aws = tuple(aws_login()) if aws_for else ()
    base = ("WANDB_BASE_URL",) if wandb_for and os.environ.get("WANDB_BASE_URL") else ()  # may hold a password
    return (*((WANDB_VARIABLE, *base) if wandb_for else ()), *aws)


def _node_variables(checkout: Checkout) -> dict[str, str]:
    return {COMMIT_VARIABLE: checkout.text} | {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
