"""`dual-policy demo`: trains against a built-in NPC for a minute and measures the win rate.

dual-policy demo [--seed N] [--train-dir DIR] [key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from dual_policy_plugin.commands.console import configure_logging
from dual_policy_plugin.commands.words import make_parser, parse_words


def run(words: list[str]) -> int:
    """Trains, plays before and after, prints who wins; returns the exit code."""
    parser = make_parser(
        "dual-policy demo",
        "[--seed N] [--train-dir DIR] [key=value ...]",
        "Trains for about a minute on the CPU against builtin://arena/medium, with a live panel, and ends with one "
        "line: the win rate before and after, with its 95 % interval.",
        examples=("dual-policy demo", "dual-policy demo --seed 2 trainer.total_timesteps=500000"),
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the run (1)")
    parser.add_argument(
        "--train-dir", type=Path, metavar="DIR", default=Path("train_dir"), help="where runs stand (train_dir)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `dual-policy train`")
    args = parse_words(parser, words, is_mixed=True)
    configure_logging()

    from dual_policy_plugin.demo import demo

    return demo(args.seed, args.train_dir, args.overrides)
