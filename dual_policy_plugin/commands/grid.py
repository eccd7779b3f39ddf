"""A plain sweep (`dual-policy train -m seed=1,2`), looked at before its first job: what its last job would fail with.

Hydra composes every job before it starts the first, which finds a wrong key. Values and policies are looked at here; a
curriculum and the other launchers' commands look at theirs themselves.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.composition import compose_whole
from dual_policy_plugin.config import Config
from dual_policy_plugin.config_loading import load_config
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.evaluate import assign_seats, read_spec
from dual_policy_plugin.interpolation import hide_variables, keep_requested
from dual_policy_plugin.npc.resolver import PinnedPolicy, request_text, resolve_all
from dual_policy_plugin.policies.learner import build_learner
from dual_policy_plugin.policies.npcs import LOCK_NAME, load_npc
from dual_policy_plugin.types import EnvSpec

_CPU = torch.device("cpu")
Words = tuple[str, ...]


def check_grid(overrides: Sequence[str], *, has_params: bool = False) -> None:
    """Loads the config of every job of a sweep; of jobs that this process will run itself also env, net and policies.

    Does nothing where another sweeper than Hydra's basic one has the values, or where they cannot be listed.

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
    swept = [one for one in parsed if one.is_sweep_override()]
    if not all(one.is_discrete_sweep() and not isinstance(one.value(), Glob) for one in swept):
        return None
    jobs = list(itertools.product(*(_choices(one) for one in swept)))
    first = compose_whole(_of_job(parsed, jobs[0]))
    if first.hydra.runtime.choices["hydra/sweeper"] != "basic":
        return None
    if (params := first.hydra.sweeper.params) and not has_params:
        return check_grid([*(f"{key}={value}" for key, value in params.items()), *overrides], has_params=True)
    if len(jobs) == 1:
        return None  # it is looked at when it begins, which is at once
    is_plain = [_is_plain(one, first) for one in swept]
    composed = {_where_not(is_plain, jobs[0]): first}
    is_here = first.hydra.runtime.choices["hydra/launcher"] == "basic"
    runs = _Runs()
    for num, words in enumerate(jobs):
        files = _where_not(is_plain, words)
        if files not in composed:
            composed[files] = compose_whole(_of_job(parsed, words))
        with _named(num, words):
            config = _load(composed[files], list(itertools.compress(words, is_plain)))
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


def _is_plain(override: Override, cfg: DictConfig) -> bool:
    """Whether it changes one value of the composed config, and not which files that is composed of."""
    if override.type != OverrideType.CHANGE or override.package is not None or "/" in override.key_or_group:
        return False
    return not isinstance(OmegaConf.select(cfg, override.key_or_group), DictConfig)


def _where_not(is_plain: Sequence[bool], words: Words) -> Words:
    return tuple(word for word, one in zip(words, is_plain, strict=True) if not one)


def _load(cfg: DictConfig, words: Sequence[str]) -> Config:
    """The config of a job that differs from `cfg` in these words."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    for override in OverridesParser.create().parse_overrides(list(words)):
        with contextlib.suppress(OmegaConfBaseException):  # Hydra composes it next, and says what is wrong with it
            OmegaConf.update(cfg, override.key_or_group, override.value())
    cfg = keep_requested(cfg)
    try:
        return load_config(cfg)
    except DualPolicyError as error:
        hide_variables(error, cfg)
        raise


class _Runs:
    """What the jobs of this process will need, each thing of them looked at once."""

    def __init__(self) -> None:
        self._specs: dict[str, EnvSpec] = {}
        self._seen: set[str] = set()

    def check(self, config: Config, num: int) -> None:
        """Makes one copy of the job's env, its net, and every policy that it names.

        Raises:
            DualPolicyError: one of them is not possible, is missing or does not fit the others.
        """
        env, trainer = repr(config.env), config.trainer
        if env not in self._specs:
            self._specs[env] = read_spec(config)
        spec = self._specs[env]
        if self._is_new(env, trainer.dual_policy.training_agents_pct, trainer.dual_policy.assignment):
            assign_seats(spec.num_agents, trainer.dual_policy)
        if self._is_new(env, config.agent):
            self._build(config, spec, None)
        if trainer.sync_uri is not None or (config.train_dir / config.run / str(num) / LOCK_NAME).exists():
            return  # the job may have begun, and has its policies in its lock
        for role, source in config.policies:
            if trainer.dual_policy.lock is None and self._is_new(env, config.agent, role, request_text(source)):
                with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
                    found = resolve_all(source, seed=config.seed)
                for one in found:
                    if role == "initial":
                        self._build(config, spec, one)
                    else:
                        load_npc(source, one, spec, config.agent, dtype=torch.float32, device=_CPU)

    def _build(self, config: Config, spec: EnvSpec, initial: PinnedPolicy | None) -> None:
        source = config.trainer.initial_policy
        name = None if initial is None or source is None else source.agent
        build_learner(
            config.agent, spec, seed=config.seed, initial=initial, initial_agent=name, dtype=torch.float32, device=_CPU
        )

    def _is_new(self, *things: object) -> bool:
        """Whether these were not looked at together before."""
        before = len(self._seen)
        self._seen.add(repr(things))
        return len(self._seen) > before


@contextlib.contextmanager
def _named(num: int, words: Words) -> Iterator[None]:
    """Lets errors say which job they are of."""
    try:
        yield
    except DualPolicyError as error:
        raise type(error)(f"job {num} ({','.join(words)}): {error}") from error
