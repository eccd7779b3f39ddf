"""The settings of the sweeper: what a ladder may be, and one line for each that cannot work."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.curriculum.config import default_node, load_settings
from dual_policy_plugin.curriculum.gates import check_gate
from dual_policy_plugin.errors import ConfigError, DualPolicyError

RUNGS = ["builtin://arena/random", "builtin://arena/forager"]


def load(**values: Any) -> Any:
    return load_settings({"_target_": "x", **default_node(), **values})


def test_the_defaults() -> None:
    settings = load(ladder=RUNGS)
    assert settings.ladder == tuple(PolicySource(uri=uri) for uri in RUNGS)
    assert not settings.is_self_play
    assert (settings.order, settings.carry, settings.rule, settings.on_fail) == ("given", "policy", "wilson", "stop")
    assert (settings.promote_at, settings.confidence, settings.episodes) == (0.55, 0.95, 1024)
    assert (settings.max_attempts, settings.max_demotions, settings.forget_tolerance) == (2, 3, 0.1)
    assert load().ladder is None


def test_a_ladder_may_be_self_or_a_selector() -> None:
    assert load(ladder="self", stages=3).is_self_play
    (source,) = load(ladder={"uri": "old_runs", "type": None}).ladder
    assert (source.uri, source.type) == ("old_runs", "all")
    (source,) = load(ladder={"uri": "old_runs", "type": "top", "range": 3, "metric": "reward"}).ladder
    assert (source.type, source.range, source.metric) == ("top", 3, "reward")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ladder": []}, "hydra.sweeper.ladder=[] is empty; name at least one NPC"),
    ({"ladder": {}}, "hydra.sweeper.ladder={} is empty"),
    ({"ladder": "builtin://arena/weak"}, "use a list of URIs, self, or a node with uri and type"),
    ({"ladder": [1, 2]}, "use a list of URIs, self, or a node"),
    ({"ladder": ["gs://b/x"]}, "gs:// is not read"),
    ({"ladder": {"type": "all"}}, "hydra.sweeper.ladder.uri is not set; name an artifact or a folder"),
    ({"ladder": {"uri": "x", "kind": "all"}}, "hydra.sweeper.ladder.kind is not a known key"),
    ({"ladder": {"uri": "x", "type": "each"}}, "hydra.sweeper.ladder.type=each is not possible"),
    ({"ladder": RUNGS, "order": "strongest"}, "hydra.sweeper.order=strongest is not possible; use given or weakest"),
    ({"ladder": RUNGS, "carry": "all"}, "hydra.sweeper.carry=all is not possible; use policy or nothing"),
    ({"ladder": RUNGS, "rule": "exact"}, "hydra.sweeper.rule=exact is not possible; use wilson or sprt"),
    ({"ladder": RUNGS, "on_fail": "retry"}, "hydra.sweeper.on_fail=retry is not possible; use stop, advance or demote"),
    ({"ladder": RUNGS, "promote_at": "high"}, "hydra.sweeper.promote_at='high' is not possible; use a number"),
    ({"ladder": RUNGS, "promote_at": 1.5}, "hydra.sweeper.promote_at=1.5 is not possible; use a value from 0 to 1"),
    ({"ladder": RUNGS, "episodes": 0}, "hydra.sweeper.episodes=0 is not possible"),
    ({"ladder": RUNGS, "max_attempts": 0}, "hydra.sweeper.max_attempts=0 is not possible"),
    ({"ladder": RUNGS, "rule": "sprt", "promote_at": 0.97}, "hydra.sweeper.promote_at=0.97 is not possible; rule=sprt"),
    ({"ladder": RUNGS, "max_batch_size": 0}, "hydra.sweeper.max_batch_size=0 is not possible"),
    ({"ladder": RUNGS, "stages": 3}, "hydra.sweeper.stages=3 is for ladder=self"),
    ({"ladder": RUNGS, "start": "x"}, "hydra.sweeper.start=x is for ladder=self"),
    ({"ladder": "self"}, "hydra.sweeper.stages is not set"),
    ({"ladder": "self", "stages": 2, "order": "weakest_first"}, "does not go with ladder=self"),
    ({"dry_run": True}, "hydra.sweeper.dry_run=True is not possible; it shows the stages of a ladder"),
    ({"ladder": RUNGS, "attempts": 2}, "hydra.sweeper.attempts is not a known key"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "line"), BAD)
def test_what_cannot_work_is_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(DualPolicyError, match=re.escape(line)) as caught:
        load(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ({"promote_at": 1.0}, False),
        ({"promote_at": 0.99, "episodes": 300}, False),  # 150 pairs of mirrored games, all won: above 0.975
        ({"promote_at": 0.97, "episodes": 300}, True),
        ({"promote_at": 0.55, "episodes": 4}, False),
        ({"promote_at": 0.55, "episodes": 1024}, True),
        ({"promote_at": 0.55, "episodes": 16, "rule": "sprt"}, False),
        ({"promote_at": 0.55, "episodes": 1024, "rule": "sprt"}, True),
    ],
)
def test_a_gate_that_can_never_be_passed(values: dict[str, Any], passes: bool) -> None:
    settings = load(ladder=RUNGS, **values)
    if passes:
        check_gate(settings, 2)
        return
    line = f"hydra.sweeper.promote_at={values['promote_at']:g} can never be passed with hydra.sweeper.episodes="
    with pytest.raises(ConfigError, match=re.escape(line)):
        check_gate(settings, 2)
