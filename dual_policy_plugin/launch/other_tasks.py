"""Checks and pins for tasks that are not one run: a curriculum sweep, an evaluation.

A sweep and an evaluation take no lock. Their words name each policy as it was pinned here: an immutable URI, or a file
that is carried along under its digest.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from dual_policy_plugin.config import Config, PolicySource, WandbConfig
from dual_policy_plugin.curriculum.config import KEY, load_settings
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.composition import compose_config, compose_hydra_node
from dual_policy_plugin.hydra_app.overrides import keep_run_names, text_override
from dual_policy_plugin.launch.preflight import Preflight, carry_entries, check_env, check_launch, check_logins
from dual_policy_plugin.npc.lock import LockEntry, lock_entries
from dual_policy_plugin.npc.resolver import resolve_all, unique_names

INITIAL = "trainer.initial_policy"
_WHICH = ("checkpoint_path", "policy_uri", "type", "range", "metric", "filters")
"""What else says which policy trainer.initial_policy is."""
_EXAMPLE = "policies=[builtin://arena/weak,train_dir/my_run]"
_EVALUATE_KEYS = ("policies", "episodes", "out", "png")


def check_task_words(task: str, words: Sequence[str]) -> Preflight:
    """The checks of a task of `sky/`, by its name.

    Raises:
        DualPolicyError: something in the words is not possible; nothing was written or launched.
    """
    if task in ("train", "train_multinode"):
        return check_launch(words)
    if task == "curriculum":
        return check_sweep(words)
    assert task == "evaluate"
    return check_evaluation(words)


def check_sweep(words: Sequence[str]) -> Preflight:
    """A curriculum sweep: the config of its first job, every rung of its ladder, and what its jobs name besides.

    Raises:
        ConfigError: the words describe no curriculum.
        DualPolicyError: as `check_launch`.
    """
    single = _first_values(keep_run_names(words))
    config, _ = compose_config(single)
    check_env(config)
    node = compose_hydra_node(single, "sweeper")
    if node.get("ladder") is None:
        raise ConfigError(f"{KEY}.ladder is not set; add +sweep=curriculum_builtin, or another config of configs/sweep")
    groups = [(key, _pin_all(sources, role, config)) for key, role, sources in _sweep_policies(config, node)]
    found = [one for _, group in groups for one in group]
    check_logins(config, found)
    there, files = carry_entries(found)
    places = iter([one.uri for one in there])
    pinned = [word for key, group in groups for word in _uris(key, [next(places) for _ in group])]
    if config.trainer.initial_policy is not None:
        pinned += [f"{INITIAL}.{name}=null" for name in _WHICH]
    return Preflight(config=config, words=(*words, *pinned), entries=_named(found), is_locked=False, files=files)


def check_evaluation(words: Sequence[str]) -> Preflight:
    """An evaluation: its config, and every player in `policies=`.

    Raises:
        ConfigError: no policies= with at least one URI.
        DualPolicyError: as `check_launch`.
    """
    named = [word for word in words if word.startswith("policies=")]
    if len(named) != 1:
        raise ConfigError(f"policies= is there {len(named)} times; name the players once, for example {_EXAMPLE}")
    config, _ = compose_config([word for word in words if word.partition("=")[0] not in _EVALUATE_KEYS])
    check_env(config)
    try:
        value: Any = OverridesParser.create().parse_override(named[0]).value()
    except OverrideParseException as error:
        raise ConfigError(f"{named[0]} cannot be read; write for example {_EXAMPLE}") from error
    sources = [PolicySource(uri=str(one)) for one in (value if isinstance(value, list) else [value])]
    found = _pin_all(sources, "opponent", config)
    check_logins(replace(config, wandb=WandbConfig()), found)
    there, files = carry_entries(found)
    (pinned,) = _uris("policies", [one.uri for one in there])
    node_words = tuple(pinned if word == named[0] else word for word in words)
    config = replace(config, run="evaluate")  # it makes none; the task's name
    return Preflight(config=config, words=node_words, entries=_named(found), is_locked=False, files=files)


def _sweep_policies(config: Config, node: dict[str, Any]) -> list[tuple[str, str, list[PolicySource]]]:
    """Key, role and sources of whatever a sweep's words name."""
    settings = load_settings(node)
    initial = config.trainer.initial_policy
    named = [
        (f"{KEY}.ladder", "npc", list(settings.ladder or ())),
        (f"{KEY}.start", "npc", [PolicySource(uri=settings.start)] if settings.start else []),
        (f"{INITIAL}.uri", "initial", [initial] if initial is not None else []),
        ("evals.opponents", "opponent", [PolicySource(uri=uri) for uri in config.evals.opponents]),
        ("evals.held_out", "held_out", [PolicySource(uri=uri) for uri in config.evals.held_out]),
    ]
    return [one for one in named if one[2]]


def _pin_all(sources: Sequence[PolicySource], role: str, config: Config) -> list[LockEntry]:
    """The policies of one key, in the order in which the node would have them."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    found: list[LockEntry] = []
    for source in sources:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
            entries = lock_entries(resolve_all(source, seed=config.seed), when, role=role)
        # a ladder climbs: the newest and the best, which these selectors give first, are its last rungs
        found += reversed(entries) if role == "npc" and source.type in ("latest", "top") else entries
    return found


def _first_values(words: Sequence[str]) -> list[str]:
    """The words of a sweep's first job: of `key=a,b` the first value."""
    first = []
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except OverrideParseException:
            first.append(word)  # composing says what is wrong with it
            continue
        if override.is_sweep_override():
            key = override.get_key_element()
            word = f"{key}={next(override.sweep_string_iterator())}"
        first.append(word)
    return first


def _uris(key: str, uris: Sequence[str]) -> list[str]:
    """The overrides that name these policies, whatever characters are in them."""
    if key in (f"{KEY}.start", f"{INITIAL}.uri"):
        (uri,) = uris
        return [text_override(key, uri)]
    word = f"{key}=[{','.join(text_override('', uri)[1:] for uri in uris)}]"
    return [f"{key}=null", word] if key == f"{KEY}.ladder" else [word]  # a list does not replace a node with a selector


def _named(entries: Sequence[LockEntry]) -> tuple[LockEntry, ...]:
    names = unique_names([one.name for one in entries])
    return tuple(replace(one, name=name) for one, name in zip(entries, names, strict=True))
