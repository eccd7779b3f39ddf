"""The Mongo-like filters and the orders that `wandb.Api().runs` and `.artifacts` send, applied to runs and versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tests.services.graphql_execution import GraphqlError
from tests.services.wandb_store import Run

MISSING = object()

RUN_KEYS = {
    "state": "state",
    "name": "run_id",
    "display_name": "display_name",
    "displayName": "display_name",
    "created_at": "created_at",
    "createdAt": "created_at",
    "heartbeat_at": "heartbeat_at",
    "group": "group",
    "jobType": "job_type",
    "job_type": "job_type",
}

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: value == wanted,
    "$ne": lambda value, wanted: value != wanted,
    "$gt": lambda value, wanted: _is_ordered(value, wanted) and value > wanted,
    "$gte": lambda value, wanted: _is_ordered(value, wanted) and value >= wanted,
    "$lt": lambda value, wanted: _is_ordered(value, wanted) and value < wanted,
    "$lte": lambda value, wanted: _is_ordered(value, wanted) and value <= wanted,
    "$in": lambda value, wanted: value in wanted,
    "$nin": lambda value, wanted: value not in wanted,
    "$exists": lambda value, wanted: (value is not MISSING) == wanted,
    "$regex": lambda value, wanted: isinstance(value, str) and re.search(wanted, value) is not None,
}


def matches(filters: Mapping[str, Any] | None, look_up: Callable[[str], Any]) -> bool:
    """Whether an item passes; `look_up(key)` gives the item's value or MISSING. An unknown operator is an error."""
    for key, wanted in (filters or {}).items():
        match key:
            case "$and":
                passed = all(matches(part, look_up) for part in wanted)
            case "$or":
                passed = any(matches(part, look_up) for part in wanted)
            case "$not":
                passed = not matches(wanted, look_up)
            case _:
                conditions = wanted if isinstance(wanted, dict) else {"$eq": wanted}
                if unknown := set(conditions) - set(COMPARISONS):
                    raise GraphqlError(f"unknown filter operator {sorted(unknown)}", status=400)
                passed = all(COMPARISONS[name](look_up(key), value) for name, value in conditions.items())
        if not passed:
            return False
    return True


def ordered(items: list[Any], order: str | None, look_up: Callable[[Any, str], Any]) -> list[Any]:
    """Items sorted by one key, `+` ascending (also without sign) or `-` descending; stable.

    Items without the key come first in ascending and last in descending order, as with SQL nulls.
    """
    if not order:
        return items
    key = order.lstrip("+-")

    def sort_key(item: Any) -> tuple[int, Any]:
        value = look_up(item, key)
        if value is MISSING or value is None:
            return (0, 0)
        return (1, value) if isinstance(value, int | float) else (2, str(value))

    return sorted(items, key=sort_key, reverse=order.startswith("-"))


def dig(tree: Any, keys: list[str]) -> Any:
    """`tree[a][b][c]` for dotted keys, where a key may itself hold dots or slashes; MISSING where there is none."""
    if not keys:
        return tree
    if isinstance(tree, Mapping):
        for num in range(len(keys), 0, -1):
            key = ".".join(keys[:num])
            if key in tree:
                return dig(tree[key], keys[num:])
    return MISSING


def run_value(run: Run, key: str) -> Any:
    """What a filter's or an order's key means for a run; an unknown key is an error, not an empty answer."""
    head, _, rest = key.partition(".")
    if head in ("summary_metrics", "summaryMetrics", "summary"):
        return dig(run.summary, rest.split("."))
    if head == "config":
        value = dig(run.config, rest.split("."))
        return value["value"] if isinstance(value, dict) and "value" in value else value
    if key == "tags":
        return run.tags[0] if run.tags else MISSING
    if key not in RUN_KEYS:
        raise GraphqlError(f"unknown run key {key!r}", status=400)
    return getattr(run, RUN_KEYS[key])


def _is_ordered(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) or (isinstance(value, int | float) and isinstance(wanted, int | float))
