"""The table of envs: a name from the config becomes a VecEnv.

`arena` is torch-native; `mettagrid` and `pettingzoo` are ours to run in workers; any other name is an installed entry
point of the group `dual_policy.envs`, a function `make(index, **args)` as docs/own_env.md describes. A config never
holds an import path.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch

from dual_policy_plugin.config import EnvConfig
from dual_policy_plugin.envs import mettagrid, pettingzoo
from dual_policy_plugin.envs.host import nearest
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.types import VecEnv

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "dual_policy.envs"

# name -> (make, its accepted keys are those of this callable or dataclass, what checks the values)
FOREIGN: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., None]]] = {
    "mettagrid": (mettagrid.make, mettagrid.MettagridConfig, mettagrid.check_args),
    "pettingzoo": (pettingzoo.make, pettingzoo.make, pettingzoo.check_args),
}


def make_env(
    config: EnvConfig,
    *,
    device: torch.device | str,
    num_workers: int,
    first_env: int = 0,
    env_numbers: Sequence[int] | None = None,
    make_host: Callable[..., Any] | None = None,
) -> VecEnv:
    """The env that the config names, with `config.num_envs` copies.

    Args:
        config: name, num_envs and args; an arg that is None has its default.
        device: where the training's tensors are.
        num_workers: processes of a foreign env; the arena has none.
        first_env: number of the first env here, for seeds: several ranks share one numbering.
        env_numbers: the numbers of all envs instead; those that are equal play equal episodes.
        make_host: a user's own `make(index, **args)` at the top of a module; then `config.name` is just its name.

    Raises:
        ConfigError: an unknown name or arg, with the nearest valid one.
        EnvError: a package is missing, or the env could not be made.
    """
    args = {key: value for key, value in config.args.items() if value is not None}
    numbers = range(first_env, first_env + config.num_envs) if env_numbers is None else env_numbers
    if config.name == "arena" and make_host is None:
        from dual_policy_plugin.envs.arena import make_arena

        log.debug("trainer.num_workers=%d is not used by env.name=arena, which runs on %s", num_workers, device)
        return make_arena(config.num_envs, args, device, env_numbers=numbers)
    name = config.name
    if make_host is None and name in FOREIGN:
        make, accepts, check_args = FOREIGN[name]
        _check_keys(args, accepts, name)
        check_args(**args)
        name = f"pettingzoo:{args['id']}" if name == "pettingzoo" else name
    else:
        make = make_host or _installed(name)
        _check_keys(args, make, name)
        _check_required(args, make, name)
    from dual_policy_plugin.envs.workers import WorkerVecEnv

    return WorkerVecEnv(
        make, args, name=name, num_envs=config.num_envs, num_workers=num_workers, device=device, env_numbers=numbers
    )


def num_processes(config: EnvConfig, num_workers: int, make_host: Callable[..., Any] | None = None) -> int:
    """How many worker processes `make_env` would start: none for the arena, else no more than envs."""
    is_arena = config.name == "arena" and make_host is None
    return 0 if is_arena else min(num_workers, config.num_envs)


def env_bytes(config: EnvConfig) -> int:
    """About how much memory the env's own tensors take at most, while it draws its maps; 0 for envs in workers.

    The arena, measured at 24x24 and 74x74 cells with their margins: up to 22 bytes a cell and 120 an agent.

    Raises:
        ConfigError: an arg that the arena does not take.
    """
    if config.name != "arena":
        return 0
    from dual_policy_plugin.envs.arena_config import WINDOW, parse_arena_args

    arena = parse_arena_args({key: value for key, value in config.args.items() if value is not None})
    cells = (arena.height + WINDOW - 1) * (arena.width + WINDOW - 1)
    return config.num_envs * (22 * cells + 120 * arena.num_agents)


def _installed(name: str) -> Callable[..., Any]:
    """The user's `make` behind an installed entry point."""
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise ConfigError(f"env.name={name} is not known; {nearest(name, ['arena', *FOREIGN, *found])}")
    try:
        make: Callable[..., Any] = found[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"env.name={name} stands for {found[name].value}, which cannot be loaded: {error}") from error
    return make


def _check_keys(args: dict[str, Any], accepts: Callable[..., Any], name: str) -> None:
    """Raises for a key that `accepts` has no parameter for, naming the nearest one."""
    parameters = [parameter for key, parameter in inspect.signature(accepts).parameters.items() if key != "index"]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for key in args:
        if key not in known:
            raise ConfigError(f"env.{key} is no setting of env.name={name}; {nearest(key, known)}")


def _check_required(args: dict[str, Any], make: Callable[..., Any], name: str) -> None:
    """Raises for a parameter of `make` that has no default and is not in `args`."""
    parameters = list(inspect.signature(make).parameters.values())
    if not parameters or parameters[0].name != "index":
        raise ConfigError(f"env.name={name}: the first parameter of {make.__qualname__} must be `index`")
    for parameter in parameters[1:]:
        is_named = parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if is_named and parameter.default is inspect.Parameter.empty and parameter.name not in args:
            raise ConfigError(f"env.{parameter.name} is missing; env.name={name} has no default for it")
