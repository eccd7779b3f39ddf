"""`dual-policy npc cache`: what is in the cache of fetched policies, less of it, and whether it is whole."""

from __future__ import annotations

import argparse
import math
import sys
from datetime import UTC, datetime

from dual_policy_plugin.commands.npc_facts import NOTHING, size
from dual_policy_plugin.commands.words import make_parser, parse_words
from dual_policy_plugin.files import encode_json
from dual_policy_plugin.npc.cache import ROOT_VARIABLE, SIZE_VARIABLE, Cache
from dual_policy_plugin.report.tables import format_table

ACTIONS = ("ls", "prune", "verify")


def run_cache(words: list[str]) -> tuple[str, int]:
    """`npc cache {ls,prune,verify}`: the text for standard output, and the exit code."""
    parser = make_parser(
        "dual-policy npc cache",
        "{ls,prune,verify} [options]",
        "The cache of fetched policies: ls lists them, the last used first; prune removes what was used longest ago, "
        "never what a live run uses; verify hashes all of them and removes what is damaged (exit code 1).",
        note=f"The cache stands in {ROOT_VARIABLE} (~/.cache/dual-policy), bound by {SIZE_VARIABLE} (20).",
        examples=(
            "dual-policy npc cache ls",
            "dual-policy npc cache prune --gb 5",
            "dual-policy npc cache verify",
        ),
    )
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("--gb", type=_gigabytes, metavar="GB", help=f"prune: how much may stay ({SIZE_VARIABLE})")
    parser.add_argument("--json", action="store_true", help="ls: as a list of objects")
    args = parse_words(parser, words)
    for option, value, action in (("--gb", args.gb, "prune"), ("--json", args.json or None, "ls")):
        if value is not None and args.action != action:
            parser.error(f"{option} goes with {action} only")
    cache = Cache()
    if args.action == "ls":
        return _list(cache, as_json=args.json), 0
    if args.action == "prune":
        removed = cache.prune(None if args.gb is None else int(args.gb * 1e9))
        print(f"{len(removed)} removed, {_total(cache)} left in {cache.root}", file=sys.stderr)
        return "\n".join(removed), 0
    num_whole, damaged = cache.verify()
    print(f"{num_whole} whole, {len(damaged)} damaged and removed, in {cache.root}", file=sys.stderr)
    return "\n".join(damaged), 1 if damaged else 0


def _list(cache: Cache, *, as_json: bool) -> str:
    entries = cache.ls()
    times = [datetime.fromtimestamp(entry.last_used, UTC).isoformat(timespec="seconds") for entry in entries]
    if as_json:
        facts = [
            {
                "sha256": entry.sha256,
                "bytes": entry.num_bytes,
                "last_used": time,
                "is_held": entry.is_held,
                "uris": list(entry.uris),
            }
            for entry, time in zip(entries, times, strict=True)
        ]
        return encode_json(facts, indent=2)
    print(f"{_total(cache)} in {cache.root}, of {size(cache.max_bytes)} at most", file=sys.stderr)
    if not entries:
        return ""
    rows = [
        (
            entry.sha256[:12],
            size(entry.num_bytes),
            time,
            "yes" if entry.is_held else "no",
            " ".join(entry.uris) or NOTHING,
        )
        for entry, time in zip(entries, times, strict=True)
    ]
    return format_table(("SHA-256", "Size", "Last used", "In use", "URIs"), rows)


def _total(cache: Cache) -> str:
    entries = cache.ls()
    return f"{len(entries)} policies ({size(sum(entry.num_bytes for entry in entries))})"


def _gigabytes(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{word!a} is no number of gigabytes")
    return value
