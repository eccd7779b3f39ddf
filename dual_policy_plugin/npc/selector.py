"""Chooses among candidates: pure functions of what is known about them, never of the order in which they were listed.

Between `sources/` (which lists them) and `resolver.py` (which pins the chosen ones).
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dual_policy_plugin.errors import NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import Candidate

MAX_LISTED = 5


def select(
    candidates: Sequence[Candidate],
    *,
    type: str,
    range: int,
    metric: str,
    filters: Mapping[str, Any] | None,
    seed: int,
    asked: str = "",
) -> list[Candidate]:
    """The candidates that a selector means.

    Args:
        candidates: all that there are, in any order.
        type: specific (the one) | latest (newest first: by version, then time) | top (best first, by `metric`) |
            rand (drawn without repeats) | all (oldest first).
        range: how many; latest, top and rand only.
        metric: name of a number in the metadata, larger is better; top only.
        filters: metadata name -> the value it must have; candidates without it fall away.
        seed: of the draw. The same candidates and seed give the same draw.
        asked: what the user named, for messages.

    Raises:
        NpcNotFoundError: fewer are left than asked for.
        NpcError: a candidate has no such metric.
    """
    where = f"{asked}: " if asked else ""
    left = [candidate for candidate in candidates if _matches(candidate, filters or {})]
    if not left:
        raise NpcNotFoundError(f"{where}{_none_left(candidates, filters or {})}")
    wanted = {"specific": 1, "all": len(left)}.get(type, range)
    if type == "specific" and len(left) > 1:
        raise NpcError(
            f"{where}names {len(left)} policies ({_names(left)}); name one, or set type=latest, top, rand or all"
        )
    if wanted > len(left):
        there = f"{len(left)} of {len(candidates)} that pass the filters" if filters else f"{len(left)} that there are"
        raise NpcNotFoundError(f"{where}type={type} with range={range} asks for more than the {there}; lower range")
    if type == "top":
        _check_metric(left, metric, where)
        ordered = sorted(left, key=lambda one: (float(one.metadata[metric]), *_age(one)), reverse=True)
    elif type == "rand":
        ordered = sorted(left, key=lambda one: hashlib.sha256(f"{seed}:{one.uri}".encode()).digest())
    elif type == "latest":
        ordered = sorted(left, key=_age, reverse=True)
    else:
        ordered = sorted(left, key=_age)
    return ordered[:wanted]


def has_value(found: object, wanted: object) -> bool:
    """Whether a metadata value is what a filter wants; a text from the command line may stand for a number.

    `any` wants some value: the first checkpoints of a run have no win rate yet, and `top` refuses those.
    """
    if wanted == "any":
        return found is not None
    if isinstance(found, bool) or isinstance(wanted, bool):
        return str(found).lower() == str(wanted).lower()
    if isinstance(found, int | float):
        try:
            return float(found) == float(wanted)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return False
    return found is not None and str(found) == str(wanted)


def _matches(candidate: Candidate, filters: Mapping[str, Any]) -> bool:
    return all(has_value(_fact(candidate, name), wanted) for name, wanted in filters.items())


def _fact(candidate: Candidate, name: str) -> object:
    own = {"name": candidate.name, "version": candidate.version}
    return candidate.metadata.get(name, own.get(name))


def _age(candidate: Candidate) -> tuple[int, float, str]:
    """What newer means: a higher version, then a later time; the URI only makes the order certain."""
    version = -1 if candidate.version is None else candidate.version
    return version, _timestamp(candidate.created), candidate.uri


def _timestamp(text: str) -> float:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return -math.inf
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _check_metric(candidates: Sequence[Candidate], metric: str, where: str) -> None:
    """Raises an NpcError that counts and names the candidates without the metric."""
    lacking = [one for one in candidates if not _is_number(one.metadata.get(metric))]
    if not lacking:
        return
    known = sorted({name for one in candidates for name, value in one.metadata.items() if _is_number(value)})
    near = difflib.get_close_matches(metric, known, n=1)
    if near and near[0] != metric and len(lacking) == len(candidates):
        mend = f"did you mean metric={near[0]}?"
    elif len(lacking) == len(candidates):
        mend = f"there are {', '.join(known[:MAX_LISTED])}" if known else "they have no numbers at all; use type=latest"
    else:
        mend = f"leave them out with a filter {metric}=any, or use another metric"
    raise NpcError(f"{where}{len(lacking)} of {len(candidates)} policies have no {metric} ({_names(lacking)}); {mend}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _none_left(candidates: Sequence[Candidate], filters: Mapping[str, Any]) -> str:
    if not candidates:
        return "there is no policy"
    shown = ", ".join(f"{name}={value}" for name, value in filters.items())
    for name in filters:
        values = sorted({str(_fact(one, name)) for one in candidates if _fact(one, name) is not None})
        if not values:
            known = sorted({key for one in candidates for key in one.metadata})
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(known[:MAX_LISTED]) or 'none'}"
            return f"none of {len(candidates)} policies has a metadata name {name}; {mend}"
    return f"none of {len(candidates)} policies has {shown}; {name} is {', '.join(values[:MAX_LISTED])}"


def _names(candidates: Sequence[Candidate]) -> str:
    """Up to MAX_LISTED names, in a certain order, and the count of the others."""
    names = sorted(one.name for one in candidates)
    others = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + others
