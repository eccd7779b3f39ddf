"""A plain sweep (`dual-policy train -m seed=1,2`), looked at before its first job: what its last job would fail with.

Hydra composes every job before it starts the first, which finds a wrong key. Values and policies are looked at here; a
curriculum and the other launchers' commands look at theirs themselves.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.config import Config
from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.evaluate import assign_seats, read_spec
from dual_policy_plugin.hydra_app.composition import compose_whole
from dual_policy_plugin.hydra_app.interpolation import hide_variables, keep_requested
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.npc.resolver import resolve_all
from dual_policy_plugin.npc.uri import parse_uri
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.learner import build_learner
from dual_policy_plugin.policies.npcs import LOCK_NAME, load_npc
from dual_policy_plugin.ranks.variables import find_ranks
from dual_policy_plugin.types import EnvSpec

# A config with one of these is known in the job alone; with one of the others, where a launcher's job runs.
_OF_THE_JOB = ("${hydra:",)
_OF_ITS_MACHINE = ("${oc.env:", "${npc:")
Words = tuple[str, ...]


def check_grid(overrides: Sequence[str], *, has_params: bool = False) -> None:
    """Loads the config of every job of a sweep; of jobs that this process will run itself also env, net and policies.

    Does nothing where another sweeper than Hydra's basic one has the values, where they cannot be listed, or where
    each job has a working directory or variables of its own.

    Args:
        overrides: as on the command line, without Hydra's flags.
        has_params: what the config says in hydra.sweeper.params stands before them already.

    Raises:
        DualPolicyError: a job would fail with it; begins with the job's number and words.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return None  # it says so itself, and better
    listed = [
        one.is_discrete_sweep() and not isinstance(one.value(), Glob) for one in parsed if one.is_sweep_override()
    ]
    if not all(listed):
        return None
    parsed = list({one.get_key_element(): one for one in parsed}.values())  # the last word of a key, as Hydra does it
    swept = [one for one in parsed if one.is_sweep_override()]
    jobs = list(itertools.product(*(_choices(one) for one in swept)))
    first = compose_whole(_of_job(parsed, jobs[0]))
    if first.hydra.runtime.choices["hydra/sweeper"] != "basic":
        return None
    if (params := first.hydra.sweeper.params) and not has_params:
        return check_grid([*(f"{key}={value}" for key, value in params.items()), *overrides], has_params=True)
    if len(jobs) == 1:
        return None  # it is looked at when it begins, which is at once
    if first.hydra.job.chdir or first.hydra.job.env_set:
        return None
    is_plain = [_is_plain(one, parsed, first) for one in swept]
    composed = {_where_not(is_plain, jobs[0]): first}
    is_here = first.hydra.runtime.choices["hydra/launcher"] == "basic"
    unknown = _OF_THE_JOB if is_here else _OF_THE_JOB + _OF_ITS_MACHINE
    runs = _Runs()
    for num, words in enumerate(jobs):
        files = _where_not(is_plain, words)
        if files not in composed:
            composed[files] = compose_whole(_of_job(parsed, words))
        cfg = _with_words(composed[files], list(itertools.compress(words, is_plain)))
        text = str(OmegaConf.to_container(cfg, resolve=False))
        if any(one in text for one in unknown):
            continue
        with _named(num, words, cfg):
            config = load_config(cfg)
            if is_here:  # another launcher's machines may see other files
                runs.check(config, num)
    return None


def _choices(override: Override) -> list[str]:
    """A swept override as one word for each of its values."""
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _of_job(parsed: Sequence[Override], words: Words) -> list[str]:
    """The overrides of a job, in the order in which they were written, which decides between files."""
    chosen = iter(words)
    return [next(chosen) if one.is_sweep_override() else str(one.input_line) for one in parsed]


def _is_plain(override: Override, parsed: Sequence[Override], cfg: DictConfig) -> bool:
    """Whether it changes a value of the composed config, no later word does, and it chooses no files to compose."""
    if override.type != OverrideType.CHANGE or override.package is not None:
        return False
    key = override.key_or_group
    later = [one.key_or_group for one in parsed[parsed.index(override) + 1 :]]
    is_last = not any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in later)
    return is_last and key not in cfg.hydra.runtime.choices


def _where_not(is_plain: Sequence[bool], words: Words) -> Words:
    return tuple(word for word, one in zip(words, is_plain, strict=True) if not one)


def _with_words(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """The config of a job that differs from `cfg` in these words, without Hydra's own."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    for override in OverridesParser.create().parse_overrides(list(words)):
        with contextlib.suppress(OmegaConfBaseException):  # Hydra composes it next, and says what is wrong with it
            OmegaConf.update(cfg, override.key_or_group, override.value())
    return keep_requested(cfg)


class _Runs:
    """What the jobs of this process will need, each thing of them looked at once."""

    def __init__(self) -> None:
        self._specs: dict[str, EnvSpec] = {}
        self._seen: set[str] = set()
        self._folders: set[Path] = set()

    def check(self, config: Config, num: int) -> None:
        """Makes one copy of the job's env, its net, and every policy that it names; where it will run.

        Raises:
            DualPolicyError: one of them is not possible, is missing or does not fit the others.
        """
        device = choose_device(config.device, local_rank=find_ranks().local_rank)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._check_on(device, config, num)
        self._folders.add(_absolute(config.train_dir / config.run / str(num)))

    def _check_on(self, device: torch.device, config: Config, num: int) -> None:
        env, trainer = repr(config.env), config.trainer
        dual = trainer.dual_policy
        if env not in self._specs:
            self._specs[env] = read_spec(config)
        spec = self._specs[env]
        assign_seats(spec.num_agents, dual)
        dtype = compute_dtype(trainer.precision, device)
        build = partial(build_learner, config.agent, spec, seed=config.seed, dtype=dtype, device=device)
        place = (env, config.agent, device, dtype)
        if self._is_new(*place):
            build(initial=None, initial_agent=None)
        run_path = config.train_dir / config.run / str(num)
        if dual.lock is not None or trainer.sync_uri is not None or (run_path / LOCK_NAME).exists():
            return  # the job may have begun, and has its policies in its lock
        for role, source in config.policies:
            if self._will_be_made(source.uri) or not self._is_new(*place, role, source):
                continue
            with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
                found = resolve_all(source, seed=config.seed)
            for one in found:
                if role == "initial":
                    build(initial=one, initial_agent=source.agent)
                else:
                    load_npc(source, one, spec, config.agent, dtype=dtype, device=device)

    def _will_be_made(self, uri: str) -> bool:
        """Whether it is a file of a job before this one."""
        parsed = parse_uri(uri)
        path = _absolute(Path(parsed.path))
        return parsed.scheme == "file" and not self._folders.isdisjoint([path, *path.parents])

    def _is_new(self, *things: object) -> bool:
        """Whether these were not looked at together before."""
        before = len(self._seen)
        self._seen.add(repr(things))
        return len(self._seen) > before


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


@contextlib.contextmanager
def _named(num: int, words: Words, cfg: DictConfig) -> Iterator[None]:
    """Lets errors say which job they are of, and not what a variable of its config holds."""
    try:
        yield
    except Exception as error:
        hide_variables(error, cfg)
        if not isinstance(error, DualPolicyError):
            raise
        raise type(error)(f"job {num} ({','.join(words)}): {error}") from error
