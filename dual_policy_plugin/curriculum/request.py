"""What a sweep is asked for, checked before anything runs: the jobs of its grid, and that it is the same as before.

The Hydra plugin makes a SweepRequest; `stages.py` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dual_policy_plugin.config import Config
from dual_policy_plugin.curriculum import gates
from dual_policy_plugin.curriculum.config import KEY, CurriculumConfig
from dual_policy_plugin.curriculum.decisions import AFTER_GATE
from dual_policy_plugin.curriculum.state import STATE_NAME, Rung, SweepState
from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.files import encode_json
from dual_policy_plugin.hydra_app.interpolation import config_values
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.hydra_app.nodes import to_plain
from dual_policy_plugin.hydra_app.overrides import text_override
from dual_policy_plugin.policies.npcs import LOCK_NAME
from dual_policy_plugin.run.config_diff import diff_configs, show_diff

NPC_KEY = "trainer.dual_policy.checkpoint_npc"
INITIAL_KEY = "trainer.initial_policy"
LOCK_KEY = "trainer.dual_policy.lock"
SEED_STEP = 1000
"""Between an attempt's seeds and the next one's, so that a repeat is another run."""
_STAND_IN = "builtin://arena/random"
_FREE = ("dry_run", "max_batch_size")
"""Settings that may be others when a sweep goes on: they change no result."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepRequest:
    """A sweep as the Hydra plugin hands it over."""

    settings: CurriculumConfig
    node: Mapping[str, Any]
    """`hydra.sweeper` as plain values."""
    overrides: Sequence[str]
    """What the user wrote, with the params of the sweep before it."""
    grid: Sequence[Sequence[str]]
    """The overrides of each job of a stage."""
    folder: Path
    """hydra.sweep.dir."""
    compose: Callable[[Sequence[str]], DictConfig]
    """The config of a job with these overrides."""
    launch: Callable[[Sequence[Sequence[str]], int], Sequence[Any]]
    """Runs jobs that are numbered from the second argument on; gives their JobReturns."""
    launcher: str
    """The launcher's name."""
    is_patient: bool = False
    """Whether a job of the launcher's waits for another process that has its run, instead of failing."""

    @property
    def lock(self) -> Path:
        """The lock that every job is held to."""
        return self.folder.absolute() / LOCK_NAME


def check_request(request: SweepRequest) -> list[Config]:
    """The configs of the grid's jobs, those alone that differ in who plays where, once nothing is wrong with them.

    Raises:
        DualPolicyError: a job does not compose, its env cannot be built, or its gate can never be passed.
    """
    configs: list[Config] = []
    for config in load_jobs(request):
        if not any(_where(config) == _where(one) for one in configs):
            configs.append(config)
            gates.check_gate(request.settings, gates.count_seatings(config))
    return configs


def load_jobs(request: SweepRequest) -> list[Config]:
    """The configs of the grid's jobs, with a stand-in as NPC.

    Raises:
        ConfigError: one of them does not compose, or says what the ladder says.
    """
    configs = []
    for overrides in request.grid:
        node = to_plain(request.compose(overrides))
        _check_free(node)
        node["trainer"]["dual_policy"] |= {"enabled": True, "checkpoint_npc": {"uri": _STAND_IN}}
        config = load_config(node)
        if config.trainer.dual_policy.training_agents_pct == 1:
            raise ConfigError(
                f"trainer.dual_policy.training_agents_pct=1 leaves no seat to the NPCs of {KEY}.ladder; "
                "use a fraction below 1, for example 0.5"
            )
        if len(request.grid) > 1 and config.evals.episodes == 0:
            raise ConfigError(
                f"evals.episodes=0 leaves nothing by which to choose the best of a stage's {len(request.grid)} jobs; "
                "use for example evals.episodes=512"
            )
        folder = config.train_dir / config.run
        if folder.absolute() != request.folder.absolute():
            raise ConfigError(
                f"hydra.sweep.dir={request.folder} is not where the jobs are, {folder}; "
                "leave it away, and give run= and train_dir= one value for all jobs"
            )
        configs.append(config)
    return configs


def job_overrides(
    request: SweepRequest, overrides: Sequence[str], *, rung: Rung, attempt: int, initial: str | None
) -> list[str]:
    """The overrides of a job of the grid for one attempt at a stage.

    Args:
        request: the sweep.
        overrides: of the job in the grid.
        rung: the stage's NPC.
        attempt: which; each has seeds of its own.
        initial: URI of the policy that the job starts from; None: what the config says.
    """
    result = npc_overrides(overrides, rung.uri, request.lock)
    node = to_plain(request.compose(overrides)) if attempt > 1 or initial is not None else {}
    if attempt > 1:
        result = _with(result, "seed", f"seed={int(node['seed']) + SEED_STEP * (attempt - 1)}")
    if initial is not None:
        said = [name for name, value in (node["trainer"].get("initial_policy") or {}).items() if value is not None]
        for name in said:
            if name != "keep_optimizer":
                result = _with(result, f"{INITIAL_KEY}.{name}", f"{INITIAL_KEY}.{name}=null")
        result = _with(result, f"{INITIAL_KEY}.uri", text_override(f"{INITIAL_KEY}.uri", initial))
    return result


def npc_overrides(overrides: Sequence[str], uri: str, lock: Path) -> list[str]:
    """A job's overrides with its NPC."""
    result = _with(overrides, "trainer.dual_policy.enabled", "trainer.dual_policy.enabled=true")
    result = _with(result, f"{NPC_KEY}.uri", text_override(f"{NPC_KEY}.uri", uri))
    return _with(result, LOCK_KEY, text_override(LOCK_KEY, str(lock)))


def request_record(request: SweepRequest) -> dict[str, Any]:
    """What the state file remembers of the request."""
    sweeper = {name: value for name, value in request.node.items() if name not in ("_target_", *_FREE)}
    config = config_values(request.compose(request.grid[0]))
    return {"sweeper": sweeper, "overrides": list(request.overrides), "config": config}


def check_same(request: SweepRequest, state: SweepState, where: str) -> None:
    """Raises a RunError where the sweep that stands at `where` was begun by another request."""
    path = request.folder / STATE_NAME
    old, new = (encode_json(_comparable(one)) for one in (state.request, request_record(request)))
    changes = diff_configs(old, new, path)
    if changes:
        raise RunError(
            f"{where} was made by another sweep: {show_diff(changes)}; "
            "use another run= name, or the old values to continue it"
        )


def check_unused(folder: Path) -> None:
    """Raises a RunError where a run or a sweep without a ladder stands in the folder of a new sweep."""
    there = next((one for one in (*folder.glob("checkpoints"), *folder.glob("*/checkpoints"))), None)
    if there is not None:
        raise RunError(
            f"{folder} has runs that are of no curriculum ({there}), and no {STATE_NAME}; use another run= name"
        )


def _where(config: Config) -> tuple[object, ...]:
    dual, evals, initial = config.trainer.dual_policy, config.evals, config.trainer.initial_policy
    seats = dual.training_agents_pct, dual.assignment
    return config.env, config.agent, initial, evals.opponents, evals.held_out, seats


def _check_free(node: Mapping[str, Any]) -> None:
    """The ladder alone says who the NPC is."""
    if not isinstance(node.get("trainer"), Mapping):
        raise ConfigError(
            f"{KEY}.ladder is set, and the config of this app has no trainer to give its NPCs to; start from "
            "`dual-policy train`, or use ladder=null for a plain sweep"
        )
    dual = node["trainer"].get("dual_policy") or {}
    for name, value in (dual.get("checkpoint_npc") or {}).items():
        if value is not None:
            raise ConfigError(
                f"{NPC_KEY}.{name}={value} is set beside {KEY}.ladder, which names the NPC of every stage; remove it"
            )
    for name in ("pool", "lock"):
        if dual.get(name):
            raise ConfigError(
                f"trainer.dual_policy.{name} is set beside {KEY}.ladder, by which every stage has one NPC; remove it"
            )
    if dual.get("enabled") is False:
        raise ConfigError(f"trainer.dual_policy.enabled=false beside {KEY}.ladder switches the NPC off; remove it")


def _with(overrides: Sequence[str], key: str, word: str) -> list[str]:
    """The overrides with `word` in place of what they say about its key."""
    return [*(one for one in overrides if one.partition("=")[0].lstrip("+") != key), word]


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what may be another when a sweep goes on, and with overrides by key, as a difference is shown.

    Of `AFTER_GATE` some values are possible and others not, which `decisions.reopen` finds.
    """
    words = (str(word).partition("=") for word in record.get("overrides", []))
    sweeper = {name: value for name, value in record.get("sweeper", {}).items() if name not in AFTER_GATE}
    return {**record, "sweeper": sweeper, "overrides": {key: value for key, _, value in words}}
