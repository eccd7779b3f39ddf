"""`dual-policy gate NEW --not-weaker-than OLD`: whether a policy may take another's place, as an exit code for CI.

Exit code 0: not weaker. 1: weaker, or undecided after --max-episodes; the line says which. 2: bad input.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import logging
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dual_policy_plugin.commands.words import check_read, make_parser, parse_words, seed_word
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.sequential import GateVerdict, Rule, can_pass, play_until_decided, sprt
from dual_policy_plugin.report.tables import printable

if TYPE_CHECKING:
    from dual_policy_plugin.config import Config
    from dual_policy_plugin.evaluation.matches import MatchResult
    from dual_policy_plugin.npc.resolver import PinnedPolicy

EPISODES_PER_LOOK = 512
EPISODES_PER_SEED = 2  # each policy once on either side
UNREAD = {
    "evals.episodes": "use --max-episodes",
    "evals.opponents": "NEW plays against OLD alone",
    "evals.held_out": "NEW plays against OLD alone",
}
"""Keys of the config that one might think this command reads -> what to do instead."""

_log = logging.getLogger(__name__)


def run(words: list[str]) -> int:
    """Plays until it is decided, prints the verdict in one line, and returns the exit code."""
    args = _parse(words)
    check_read(args.overrides, UNREAD)
    rule = partial(
        sprt, p0=0.5 - args.margin, p1=0.5, alpha=args.alpha, beta=args.beta, episodes_per_seed=EPISODES_PER_SEED
    )
    _check_can_pass(rule, args.max_episodes)
    if "=" in args.new and "://" not in args.new and not Path(args.new).exists():
        raise ConfigError(f"{args.new} stands where NEW belongs; write the policy first, then the overrides")

    from dual_policy_plugin.hydra_app.composition import compose_config
    from dual_policy_plugin.hydra_app.overrides import with_seats
    from dual_policy_plugin.npc.resolver import resolve

    config, _ = compose_config(with_seats(args.overrides))
    seed = config.seed if args.seed is None else args.seed
    with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
        new, old = resolve(args.new), resolve(args.not_weaker_than)
    verdict = _decide(new, old, config, rule, seed=seed, max_episodes=args.max_episodes)
    print(_line(verdict, args.new, args.not_weaker_than))
    return 0 if verdict.passed else 1


def _decide(
    new: PinnedPolicy, old: PinnedPolicy, config: Config, rule: Rule, *, seed: int, max_episodes: int
) -> GateVerdict:
    """Plays rounds of fresh seeds, each policy as often on either side, until the rule decides.

    Where the sides are not equal (roles, unequal numbers of seats), the match is played in both orders.
    """

    from dual_policy_plugin.devices import choose_device, set_threads
    from dual_policy_plugin.evaluate import SEED_OFFSET, evaluate_pinned, read_spec
    from dual_policy_plugin.evaluation.matches import can_swap
    from dual_policy_plugin.rng import LOW_31_BITS, hash32
    from dual_policy_plugin.rollout.assignment import assign

    device, dual, spec = choose_device(config.device), config.trainer.dual_policy, read_spec(config)
    set_threads(config)
    is_mirrored = can_swap(assign(spec.num_agents, dual.training_agents_pct, dual.assignment), spec)

    def match(one: PinnedPolicy, other: PinnedPolicy, look: int, episodes: int) -> MatchResult:
        fresh = int(hash32(seed + SEED_OFFSET, look)) & LOW_31_BITS
        (result,) = evaluate_pinned(one, [other], config, episodes=episodes, seed=fresh, device=device)
        return result

    def play(look: int, episodes: int) -> tuple[float, int]:
        if is_mirrored:
            result = match(new, old, look, episodes)
            wins, played = result.wins, result.episodes
        else:
            first, second = match(new, old, look, -(-episodes // 2)), match(old, new, look, -(-episodes // 2))
            wins, played = first.wins + second.episodes - second.wins, first.episodes + second.episodes
        _log.info("look %d: %g wins in %d episodes", look + 1, wins, played)
        return wins, played

    return play_until_decided(rule, play, max_episodes=max_episodes, episodes_per_look=EPISODES_PER_LOOK)


def _line(verdict: GateVerdict, new: str, old: str) -> str:
    said = {True: "not weaker", False: "weaker", None: "undecided"}[verdict.passed]
    fails, passes = verdict.bounds
    return (
        f"{said}: {printable(new)} wins {verdict.win_rate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}] "
        f"against {printable(old)} in {verdict.episodes} episodes, log likelihood ratio {verdict.statistic:.2f} "
        f"(passes at {passes:.2f}, fails at {fails:.2f})"
    )


def _check_can_pass(rule: Rule, max_episodes: int) -> None:
    if not can_pass(rule, max_episodes):
        fewest = bisect.bisect_left(range(10**12), True, key=partial(can_pass, rule))
        raise ConfigError(
            f"--max-episodes={max_episodes} can never pass, not even by winning all of them; use at least {fewest}, "
            "or a larger --margin or --alpha"
        )


def _parse(words: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "dual-policy gate",
        "NEW --not-weaker-than OLD [options] [key=value ...]",
        "Plays NEW against OLD on fresh seeds, both on either side, until a sequential test decides whether NEW's win "
        "rate (draws as half) is at least 0.5 or at most 0.5 - margin.",
        note="Exit codes: 0 not weaker; 1 weaker, or undecided after --max-episodes; 2 bad input. Overrides describe "
        "the env as in `dual-policy train`, for example env.num_agents=8.",
        examples=(
            "dual-policy gate builtin://arena/medium --not-weaker-than builtin://arena/weak",
            "dual-policy gate train_dir/second --not-weaker-than train_dir/first",
        ),
    )
    parser.add_argument("new", metavar="NEW", help="path, file://, wandb://, s3:// or builtin://")
    parser.add_argument("--not-weaker-than", required=True, metavar="OLD", help="the policy to compare with")
    parser.add_argument(
        "--margin", metavar="M", type=_below_half, default=0.05, help="how much weaker is weaker (0.05)"
    )
    parser.add_argument(
        "--alpha", metavar="A", type=_below_half, default=0.05, help="how often a weaker one may pass (0.05)"
    )
    parser.add_argument(
        "--beta", metavar="B", type=_below_half, default=0.05, help="how often an equal one may fail (0.05)"
    )
    parser.add_argument(
        "--max-episodes", metavar="N", type=_count, default=20_000, help="the most that are played (20000)"
    )
    parser.add_argument("--seed", metavar="N", type=seed_word, default=None, help="of the episodes (the config's)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `dual-policy train`")
    return parse_words(parser, words, is_mixed=True)


def _below_half(word: str) -> float:
    if re.fullmatch(r"[0-9]*\.?[0-9]+(e-[0-9]+)?", word) is None or not 0 < float(word) < 0.5:
        raise argparse.ArgumentTypeError(f"{word!a} is not between 0 and 0.5")
    return float(word)


def _count(word: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", word) is None or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!a} is no count of 1 or more")
    return int(word)
