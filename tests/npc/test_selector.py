"""Selectors: which candidates they mean, whatever the order of the listing, and what they say where they cannot."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from dual_policy_plugin.errors import NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import MAX_METADATA_KEYS, Candidate, flat_metadata
from dual_policy_plugin.npc.selector import has_value, select


def make(name: str, version: int | None = None, created: str = "", **metadata: Any) -> Candidate:
    return Candidate(name=name, uri=f"file:///{name}", version=version, created=created, metadata=metadata)


VERSIONS = [
    make("a", 2, "2026-01-09T00:00:00Z", win=0.5, epoch=20, run="x"),
    make("b", 10, "2026-01-01T00:00:00Z", win=0.25, epoch=100, run="y"),
    make("c", 9, "2026-01-08T00:00:00Z", win=0.75, epoch=90, run="x"),
    make("d", None, "2026-02-01T00:00:00Z", win=0.5, epoch=5, run="x"),
    make("e", None, "2026-02-01T02:00:00+05:00", win=0.1, epoch=6, run="z"),
]


def names(type: str, range: int = 1, candidates: Sequence[Candidate] = VERSIONS, **more: Any) -> str:
    """The names that a selector gives, joined; the same for 5 orders of the listing."""
    settings = {"metric": "epoch", "filters": None, "seed": 1} | more
    results = set()
    for order in (0, 1, 2, 3, 4):
        listed = random.Random(order).sample(list(candidates), len(candidates))
        results.add("".join(one.name for one in select(listed, type=type, range=range, **settings)))
    assert len(results) == 1
    return results.pop()


def test_latest_is_by_version_then_time() -> None:
    assert names("latest") == "b"
    assert names("latest", 3) == "bca"
    assert names("latest", 5) == "bcade"  # e: 21:00 UTC of the day before d
    without = [make(name, None, f"2026-01-0{day}T00:00:00Z") for name, day in (("p", 3), ("q", 9), ("r", 4))]
    assert names("latest", 3, without) == "qrp"
    assert names("latest", 2, [make("p", 1), make("q", 1, "2026-01-01")]) == "qp"


def test_top_is_by_the_metric_and_equals_by_age() -> None:
    assert names("top", 5, metric="win") == "cadbe"
    assert names("top", 2) == "bc"
    assert names("top", 1, [make("p", win=-1), make("q", win=-0.5)], metric="win") == "q"


def test_all_is_in_the_order_of_age() -> None:
    assert names("all") == "edacb"
    assert names("all", filters={"run": "x"}) == "dac"


def test_rand_draws_with_the_seed_alone() -> None:
    assert names("rand", 3, seed=7) == names("rand", 3, seed=7)
    assert len(set(names("rand", 5))) == 5
    drawn = Counter(names("rand", seed=seed) for seed in range(2000))
    assert set(drawn) == set("abcde")
    assert all(300 < count < 500 for count in drawn.values())  # 400 of 2000 each; 300 is 5.6 deviations away
    assert {names("rand", 2, seed=seed) for seed in range(200)} == {a + b for a in "abcde" for b in "abcde" if a != b}


def test_filters_leave_out_what_has_another_value() -> None:
    assert names("latest", 2, filters={"run": "x"}) == "ca"
    assert names("top", 1, metric="win", filters={"run": "x", "epoch": "20"}) == "a"
    assert names("latest", filters={"version": 9}) == "c"
    assert names("specific", filters={"name": "d"}) == "d"


@pytest.mark.parametrize(
    ("found", "wanted", "is_equal"),
    [
        (3, "3", True),
        (3, 3.0, True),
        (0.5, "0.50", True),
        (3, "x", False),
        (True, "true", True),
        (True, True, True),
        (True, 1, False),
        (1, True, False),
        ("3", 3, True),
        ("a", "A", False),
        (None, "None", False),
        (1, "9" * 400, False),
        (0.0, "any", True),
        (False, "any", True),
        (None, "any", False),
    ],
)
def test_what_a_filter_takes_for_equal(found: object, wanted: object, is_equal: bool) -> None:
    assert has_value(found, wanted) is is_equal


def test_a_candidate_without_the_metric_is_counted_and_named() -> None:
    lacking = [make(f"n{i}", i) for i in range(7)]
    with pytest.raises(NpcError) as caught:
        names("top", metric="win", candidates=[*VERSIONS, *lacking], asked="s3://b/p/")
    assert str(caught.value) == (
        "s3://b/p/: 7 of 12 policies have no win (n0, n1, n2, n3, n4 and 2 more); "
        "leave them out with a filter win=any, or use another metric"
    )
    assert names("top", 5, metric="win", candidates=[*VERSIONS, *lacking], filters={"win": "any"}) == names(
        "top", 5, metric="win"
    )
    with pytest.raises(NpcNotFoundError, match=r"none of 7 policies has a metadata name win"):
        names("top", metric="win", candidates=lacking, filters={"win": "any"})
    assert names("top", metric="win", candidates=[*VERSIONS, *lacking], filters={"run": "x"}) == "c"
    for value in ("0.5", True, float("nan"), None):
        with pytest.raises(NpcError, match=r"1 of 2 policies have no win \(q\)"):
            names("top", metric="win", candidates=[make("p", win=1), make("q", win=value)])


def test_a_metric_that_nobody_has_names_the_nearest() -> None:
    with pytest.raises(NpcError, match=r"5 of 5 policies have no wim .* did you mean metric=win\?"):
        names("top", metric="wim")
    with pytest.raises(NpcError, match=r"have no zzz .*; there are epoch, win$"):
        names("top", metric="zzz")
    with pytest.raises(NpcError, match=r"no numbers at all; use type=latest"):
        names("top", candidates=[make("p")], metric="win")


def test_too_few_are_an_error_and_not_fewer() -> None:
    with pytest.raises(NpcNotFoundError, match=r"type=latest with range=6 asks for more than the 5 that there are"):
        names("latest", 6)
    with pytest.raises(NpcNotFoundError, match=r"range=4 asks for more than the 3 of 5 that pass the filters"):
        names("rand", 4, filters={"run": "x"})
    with pytest.raises(NpcNotFoundError, match="there is no policy"):
        names("all", candidates=[])
    with pytest.raises(NpcNotFoundError, match=r"none of 5 policies has run=w; run is x, y, z$"):
        names("latest", filters={"run": "w"})
    with pytest.raises(NpcNotFoundError, match=r"has a metadata name rum; did you mean run\?"):
        names("latest", filters={"rum": "x"})
    with pytest.raises(NpcError, match=r"names 5 policies \(a, b, c, d, e\); name one"):
        names("specific")


def test_metadata_are_flat_plain_and_bounded() -> None:
    nested = {
        "epoch": 3, "metrics": {"dual_policy/win_rate": 0.5, "bad": float("nan")}, "npcs": [1], "a": {"b": {"c": "d"}},
        "run": "x" * 257, "env": "${oc.env:SECRET}", "two\nlines": 1, "text": "two\nlines", "big": 2**80, "flag": True,
        3: 4, "none": None, "": 1, "deep": {"a": {"a": {"a": {"a": {"a": 1}}}}},
    }  # fmt: skip
    assert flat_metadata(nested) == {"epoch": 3, "dual_policy/win_rate": 0.5, "a.b.c": "d", "flag": True}  # type: ignore[arg-type]
    assert len(flat_metadata({str(i): i for i in range(1000)})) == MAX_METADATA_KEYS
    flat = flat_metadata(nested)  # type: ignore[arg-type]
    assert flat_metadata(flat) == flat
