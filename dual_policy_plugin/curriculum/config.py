"""The settings of a curriculum sweep, `hydra.sweeper.*`: each with its meaning, each range checked where it stands.

`load_settings` turns the composed node into a `CurriculumConfig`; the Hydra plugin stores `default_node()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.config_checks import check, check_range
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.dual_policy_node import SELECTOR_DEFAULTS, load_source
from dual_policy_plugin.hydra_app.nodes import build, check_keys
from dual_policy_plugin.npc.uri import parse_uri

KEY = "hydra.sweeper"
SELF = "self"
_CHOICES = {
    "order": ("given", "weakest_first"),
    "carry": ("policy", "nothing"),
    "rule": ("wilson", "sprt"),
    "on_fail": ("stop", "advance", "demote"),
}


@dataclass(kw_only=True, slots=True, frozen=True)
class CurriculumConfig:
    """How a sweep walks through its stages."""

    ladder: tuple[PolicySource, ...] | None = None
    """What the stages' NPCs are, one or several by each source; empty: `self`, each stage's NPC is the best policy so
    far; None: no curriculum, a sweep as Hydra's own."""
    stages: int | None = None
    """How many stages `self` has."""
    start: str | None = None
    """URI of the first stage's NPC of `self`; None: trainer.initial_policy.uri."""
    order: str = "given"
    """given | weakest_first: by ratings from games that the NPCs play against each other."""
    rating_episodes: int = 256
    """Episodes per pair for weakest_first."""
    carry: str = "policy"
    """policy | nothing: what a stage, or a further attempt, starts from."""
    promote_at: float = 0.55
    """Win rate that a policy must exceed to pass a stage."""
    rule: str = "wilson"
    """wilson | sprt: how the games decide (evaluation/sequential.py)."""
    confidence: float = 0.95
    """wilson: of the two-sided interval whose lower bound must exceed promote_at."""
    alpha: float = 0.05
    """sprt: largest probability of passing with a win rate of promote_at or less."""
    beta: float = 0.05
    """sprt: largest probability of failing with a win rate of promote_at + indifference or more."""
    indifference: float = 0.05
    """sprt: how far above promote_at a win rate has to be for `beta` to hold."""
    episodes: int = 1024
    """Episodes that a gate plays against an NPC; the most that it plays where the rule is sprt."""
    forget_tolerance: float = 0.1
    """A promoted policy's win rate against every earlier stage's NPC is at least 0.5 - forget_tolerance."""
    max_attempts: int = 2
    """How often a stage is tried before on_fail says what follows."""
    on_fail: str = "stop"
    """stop | advance | demote: end the sweep, go on to the next stage, go back one stage."""
    max_demotions: int = 3
    """How often a sweep goes back; then it stops."""
    max_batch_size: int | None = None
    """Jobs that are handed to the launcher together; None: all of an attempt."""
    params: dict[str, Any] | None = None
    """Overrides of every sweep, as Hydra's basic sweeper has them."""
    dry_run: bool = False
    """Print the stages and start nothing."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            check(value in choices, f"{KEY}.{name}", value, f"use {', '.join(choices[:-1])} or {choices[-1]}")
        for name, low, high in (
            ("rating_episodes", 2, 10**7), ("promote_at", 0, 1), ("confidence", 0.5, 0.999999),
            ("alpha", 1e-9, 0.499), ("beta", 1e-9, 0.499), ("indifference", 1e-6, 1), ("episodes", 2, 10**7),
            ("forget_tolerance", 0, 0.5), ("max_attempts", 1, 10**6), ("max_demotions", 0, 10**6),
        ):  # fmt: skip
            check_range(f"{KEY}.{name}", getattr(self, name), low, high)
        for name in ("stages", "max_batch_size"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{KEY}.{name}", value, "use a value above 0, or null")
        if self.rule == "sprt":
            high = self.promote_at + self.indifference
            check(
                self.promote_at > 0 and high < 1,
                f"{KEY}.promote_at",
                self.promote_at,
                f"rule=sprt tests it against {high:g}, a win rate higher by indifference; both lie between 0 and 1",
            )
        if self.ladder is None:
            check(
                not self.dry_run,
                f"{KEY}.dry_run",
                self.dry_run,
                f"it shows the stages of a ladder; set {KEY}.ladder, or use for example +sweep=curriculum_builtin",
            )
            return
        if not self.is_self_play:
            for name in ("stages", "start"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{KEY}.{name}={getattr(self, name)} is for ladder=self; "
                        "a ladder of NPCs has a stage for each, remove it"
                    )
        elif self.stages is None:
            raise ConfigError(
                f"{KEY}.stages is not set, and ladder=self has no end of its own; use for example {KEY}.stages=5"
            )
        elif self.order != "given":
            raise ConfigError(
                f"{KEY}.order={self.order} does not go with ladder=self, whose NPCs are yet to be made; use given"
            )

    @property
    def is_self_play(self) -> bool:
        """Whether each stage's NPC is the best policy so far."""
        return self.ladder == ()


def default_node() -> dict[str, Any]:
    """The keys of `hydra.sweeper` with their defaults, for Hydra's config store."""
    return {field.name: field.default for field in fields(CurriculumConfig)}


def load_settings(node: Mapping[str, Any]) -> CurriculumConfig:
    """The settings in a plain `hydra.sweeper` node.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, an empty ladder, settings that contradict each
            other.
        NpcError: a rung's text is no URI.
    """
    values = {name: value for name, value in node.items() if name not in ("_target_", "ladder")}
    check_keys(values, default_node(), KEY)
    if values.get("start") is not None:
        parse_uri(str(values["start"]))
    return build(CurriculumConfig, values, KEY, ladder=_load_ladder(node.get("ladder")))


def _load_ladder(value: object) -> tuple[PolicySource, ...] | None:
    key = f"{KEY}.ladder"
    if value is None or value == SELF:
        return None if value is None else ()
    if isinstance(value, dict) and value:
        return (_load_selector(value, key),)
    if isinstance(value, list | dict) and not value:
        raise ConfigError(f"{key}={value} is empty; name at least one NPC, or use null for a sweep without a ladder")
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{key}={value} is not possible; use a list of URIs, self, or a node with uri and type")
    for one in value:
        parse_uri(one)
    return tuple(PolicySource(uri=one) for one in value)


def _load_selector(node: dict[str, Any], key: str) -> PolicySource:
    names = ("uri", *(name for name in SELECTOR_DEFAULTS if name != "name"))
    check_keys(node, names, key)
    if node.get("uri") is None:
        raise ConfigError(f"{key}.uri is not set; name an artifact or a folder, for example {key}.uri=train_dir/old")
    source = load_source({**node, "type": node.get("type") or "all"}, key, names)
    assert source is not None, "a node with a URI names a source"
    return source
