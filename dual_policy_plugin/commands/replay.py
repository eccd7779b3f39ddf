"""`dual-policy replay`: games of a policy against an NPC as one HTML page to watch, and as a GIF.

    dual-policy replay POLICY --npc URI [--episodes 4] [--seed N] [--out FILE.html] [--gif FILE.gif] [--open]
                       [key=value ...]

Where POLICY stands in a run directory, the run's env and seats are taken from its config.yaml, and without --npc its
first NPC from its npc.lock.json; overrides win. Standard output holds the files; notes go to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dual_policy_plugin.commands.console import show_page
from dual_policy_plugin.commands.words import check_read, make_parser, parse_words, seed_word
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.report.tables import printable

if TYPE_CHECKING:
    from dual_policy_plugin.npc.resolver import PinnedPolicy

MAX_EPISODES = 64  # of a page that is still pleasant to load
UNREAD = {
    "evals.episodes": "use --episodes",
    "evals.opponents": "use --npc",
    "evals.held_out": "use --npc",
    "trainer.dual_policy.checkpoint_npc.uri": "use --npc",
}
"""Keys of the config that one might think this command reads -> what to do instead."""


def run(words: list[str]) -> int:
    """Plays, writes the files and prints their names; returns the exit code."""
    args = _parse(words)
    check_read(args.overrides, UNREAD)

    from dual_policy_plugin.devices import choose_device, set_threads
    from dual_policy_plugin.files import check_writable, publish
    from dual_policy_plugin.hydra_app.composition import compose_config
    from dual_policy_plugin.hydra_app.overrides import with_seats
    from dual_policy_plugin.npc.resolver import resolve
    from dual_policy_plugin.replay.from_run import run_of, run_words
    from dual_policy_plugin.replay.page import PAGE_NAME, write_page
    from dual_policy_plugin.replay.record import check_recordable, record

    with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
        policy = resolve(args.policy)
    run_path = run_of(policy)
    out = args.out or (run_path or Path()) / PAGE_NAME
    for path in filter(None, (out, args.gif)):
        check_writable(path)
    taken = run_words(run_path, args.overrides) if run_path else []
    config, _ = compose_config(with_seats([*taken, *args.overrides]))
    if taken:
        _say(f"from {run_path}/config.yaml: {' '.join(taken)}")
    check_recordable(config, args.episodes)
    npc, is_greedy = _npc(args.npc, run_path)
    set_threads(config)
    seed = config.seed if args.seed is None else args.seed
    recording, result = record(
        policy,
        npc,
        config,
        episodes=args.episodes,
        seed=seed,
        device=choose_device(config.device),
        is_greedy=is_greedy,
    )
    publish(out, write_page(recording))
    written = [out]
    if args.gif:
        from dual_policy_plugin.replay.gif import write_gif

        publish(args.gif, write_gif(recording))
        written.append(args.gif)
    wins, played = sum(episode.share for episode in recording.episodes), len(recording.episodes)
    _say(
        f"{policy.name} against {npc.name}: {wins:g} of {played} won (a draw is half), mean return "
        f"{result.learner_return:.2f} to {result.opponent_return:.2f} per agent"
    )
    for path in written:
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")
    if args.open:
        show_page(out)
    return 0


def _npc(uri: str | None, run_path: Path | None) -> tuple[PinnedPolicy, bool]:
    """Whom --npc names; without it the first NPC of the policy's run. And whether it acts greedily."""
    from dual_policy_plugin.npc.resolver import resolve
    from dual_policy_plugin.replay.from_run import first_npc

    if uri is not None:
        with contextlib.redirect_stdout(sys.stderr):
            return resolve(uri), False
    if run_path is None:
        raise ConfigError("--npc is missing; name whom to play against, for example --npc builtin://arena/medium")
    npc, is_greedy, count = first_npc(run_path)
    which = "the NPC" if count == 1 else f"the first of {count} NPCs"
    _say(f"against {npc.uri}, {which} of {run_path}{', which acts greedily' if is_greedy else ''}")
    return npc, is_greedy


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "dual-policy replay",
        "POLICY [--npc URI] [options] [key=value ...]",
        "Plays POLICY against an NPC, the games that an evaluation begins with, and writes a page to watch them.",
        note="The env is described as in `dual-policy train`, for example env.num_agents=4. A POLICY that stands in a "
        "run directory is played in its run's env, and without --npc against its run's first NPC.",
        examples=(
            "dual-policy replay train_dir/first --open",
            "dual-policy replay builtin://arena/medium --npc builtin://arena/weak",
        ),
    )
    parser.add_argument("policy", metavar="POLICY", help="run directory, path, file://, wandb://, s3:// or builtin://")
    parser.add_argument("--npc", metavar="URI", help="whom to play against (the first NPC of POLICY's run)")
    parser.add_argument("--episodes", metavar="N", type=_episodes, default=4, help=f"1 to {MAX_EPISODES} (4)")
    parser.add_argument("--seed", metavar="N", type=seed_word, help="of the games (the config's)")
    parser.add_argument(
        "--out", metavar="FILE", type=_path_to(".html"), help="the page (replay.html, in POLICY's run if it has one)"
    )
    parser.add_argument("--gif", metavar="FILE", type=_path_to(".gif"), help="also an animated GIF")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for `dual-policy train`")
    args = parse_words(parser, words, is_mixed=True)
    if "=" in args.policy and "://" not in args.policy and not Path(args.policy).exists():
        raise ConfigError(f"{args.policy} stands where POLICY belongs; write the policy first, then the overrides")
    return args


def _episodes(word: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", word) is None or not 1 <= int(word) <= MAX_EPISODES:
        raise argparse.ArgumentTypeError(f"{word!a} is not possible; use 1 to {MAX_EPISODES}")
    return int(word)


def _path_to(suffix: str) -> Callable[[str], Path]:
    def path(word: str) -> Path:
        if Path(word).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{word!a} does not end with {suffix}; use for example game{suffix}")
        return Path(word).expanduser()

    return path
