"""`dual-policy demo`: trains against a built-in NPC for a minute and measures the win rate.

dual-policy demo [--seed N] [--train-dir DIR] [key=value ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dual_policy_plugin.commands.console import configure_logging
from dual_policy_plugin.commands.words import parse_words


def run(words: list[str]) -> int:
    """Trains, plays before and after, prints who wins; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dual-policy demo", description="Trains against builtin://arena/medium.")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--train-dir", type=Path, default=Path("train_dir"), help="where runs stand (train_dir)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `dual-policy train`")
    args = parse_words(parser, words)
    configure_logging()

    from dual_policy_plugin.demo import demo

    return demo(args.seed, args.train_dir, args.overrides)
