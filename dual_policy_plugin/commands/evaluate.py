"""`dual-policy evaluate`: every policy against every other and itself, as a table, as JSON and as a picture.

    dual-policy evaluate policies=[URI,...] [episodes=256] [out=FILE.json] [png=FILE.png] [key=value ...]

Standard output holds the table; notes go to standard error.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_policy_plugin.commands.words import check_read, make_parser, parse_words
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.files import check_writable
from dual_policy_plugin.report.tables import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dual_policy_plugin.evaluation.cross_play import CrossPlay

KEYS = ("policies", "episodes", "out", "png")
_HALF = "two policies have half of the seats each, so remove it"
UNREAD = {
    "evals.episodes": "write episodes=",
    "evals.opponents": "name all players in policies=",
    "evals.held_out": "name all players in policies=",
    "trainer.dual_policy.training_agents_pct": _HALF,
    "trainer.dual_policy.policy_a_percentage": _HALF,
}
"""Keys of the config that one might think this command reads -> what to do instead."""
MAX_EPISODES = 10**7
COLUMN_WIDTH = 6  # of a win rate in the table
_EXAMPLE = "policies=[builtin://arena/weak,train_dir/my_run]"


@dataclass(kw_only=True, slots=True, frozen=True)
class _Request:
    """The words of the command line."""

    policies: list[str]
    """URIs."""
    episodes: int
    """Per pair."""
    out: Path | None
    """The JSON file."""
    png: Path | None
    """The picture."""
    overrides: list[str]
    """The other words, for the config."""


def run(words: list[str]) -> int:
    """Plays, prints the table and writes the files; returns the exit code."""
    request = _parse(words)
    for path in (request.out, request.png):
        if path is not None:
            check_writable(path)

    from dual_policy_plugin.devices import choose_device, set_threads
    from dual_policy_plugin.evaluate import cross_play
    from dual_policy_plugin.files import publish, publish_json
    from dual_policy_plugin.hydra_app.composition import compose_config
    from dual_policy_plugin.hydra_app.overrides import with_seats
    from dual_policy_plugin.npc.resolver import resolve, unique_names

    config, _ = compose_config(with_seats(request.overrides))
    with contextlib.redirect_stdout(sys.stderr):  # whatever a client library prints
        found = [resolve(uri) for uri in request.policies]
    names = unique_names([one.name for one in found])
    pinned = [replace(one, name=name) for one, name in zip(found, names, strict=True)]
    device = choose_device(config.device)
    set_threads(config)
    print(f"playing {len(pinned)} policies on {config.env.name}: {request.episodes} episodes a pair", file=sys.stderr)
    cross = cross_play(pinned, config, episodes=request.episodes, seed=config.seed, device=device)
    if request.out is not None:
        publish_json(request.out, cross.as_dict())
    if request.png is not None:
        from dual_policy_plugin.evaluation.figure import draw_cross_play

        publish(request.png, draw_cross_play(cross))
    print_cross_play(cross)
    for path in (request.out, request.png):
        if path is not None:
            print(f"written: {path}", file=sys.stderr)
    return 0


def print_cross_play(cross: CrossPlay, console: Console | None = None) -> None:
    """Prints ratings, win rates and cycles, as wide as the terminal. A policy has a number in all tables."""
    from rich.console import Console

    console = console or Console(highlight=False)
    size = len(cross.policies)
    roles = [printable(role) for role in cross.roles]
    sides = f"{roles[0]} against {roles[1]}" if roles else "both seatings"
    console.print(f"{printable(cross.env)}: {size} policies, {cross.episodes} episodes a pair, {sides}\n", markup=False)
    order = list(range(size)) if cross.roles else sorted(range(size), key=lambda k: -cross.ratings.rating[k])
    console.print(_ratings_table(cross, order))
    title = "win rate of row against column"
    title += f", row as {roles[0]}, column as {roles[1]}" if roles else ""
    per_table = max(1, (console.width - 4) // COLUMN_WIDTH)
    for start in range(0, size, per_table):
        columns = range(start, min(start + per_table, size))
        console.print(f"\n{title}{', continued' if start else ''}", markup=False)
        label_width = min(24, console.width - COLUMN_WIDTH * len(columns) - 1)
        console.print(_win_rate_table(cross, order, columns, label_width))
    if size > 2:
        console.print(f"\n{_cycles(cross)}", markup=False)


def _ratings_table(cross: CrossPlay, order: Sequence[int]) -> Table:
    from rich.text import Text

    rated, size = cross.ratings, len(order)
    number_of = {k: place + 1 for place, k in enumerate(order)}
    table = _table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("policy", overflow="fold")
    for heading in ("rating", "95 % interval", "worst case", "against"):
        table.add_column(heading, justify="right", no_wrap=True)
    for k in sorted(range(len(rated.names)), key=lambda k: -rated.rating[k]):
        table.add_row(
            str(number_of[k % size]),
            Text(printable(rated.names[k])),
            str(round(rated.rating[k])),
            "given" if rated.anchored[k] else f"{round(rated.low[k])} to {round(rated.high[k])}",
            f"{cross.worst_case[k]:.2f}",
            str(number_of[_worst_opponent(cross, k)]),
        )
    return table


def _worst_opponent(cross: CrossPlay, player: int) -> int:
    """Which policy the player did worst against."""
    size = len(cross.policies)
    rates = cross.win_rate[player] if player < size else 1 - cross.win_rate[:, player - size]
    others = [k for k in range(size) if k != player % size]
    return min(others, key=lambda k: float(rates[k]))


def _win_rate_table(cross: CrossPlay, order: Sequence[int], columns: Sequence[int], label_width: int) -> Table:
    """Win rates of all rows in some of the columns; green and red where the interval leaves 1/2 out."""
    from rich.text import Text

    table = _table()
    table.add_column("", width=label_width, no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(str(column + 1), justify="right", no_wrap=True)
    for place, k in enumerate(order):
        cells = []
        for column in columns:
            low, high = cross.low[k, order[column]], cross.high[k, order[column]]
            is_own = place == column and not cross.roles
            style = "dim" if is_own else "green" if low > 0.5 else "red" if high < 0.5 else ""
            cells.append(Text(f"{cross.win_rate[k, order[column]]:.2f}", style=style))
        name = printable(cross.policies[k].name)
        table.add_row(Text(f"{place + 1:2} {name}" if label_width > 8 else f"{place + 1:2}"), *cells)
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")


def _cycles(cross: CrossPlay) -> str:
    share, sure = cross.intransitive_share, cross.sure_intransitive_share
    if sure:
        return (
            f"cycles: {sure:.0%} of the triples surely beat each other in a circle ({share:.0%} in these games); "
            "no rating tells who wins there, the table does"
        )
    if share:
        return f"cycles: {share:.0%} of the triples beat each other in a circle in these games, none of them surely"
    return "cycles: none"


def _parse(words: list[str]) -> _Request:
    parser = make_parser(
        "dual-policy evaluate",
        "policies=[URI,URI,...] [episodes=N] [key=value ...]",
        "Plays every policy against every other and itself, from both seatings, and prints win rates and ratings "
        "(builtin://arena/random has 0 where it plays, else the mean is 0; 400 points are odds of 10 to 1).",
        note="policies=[URI,URI,...] two or more; episodes=256 per pair; out=FILE.json also writes FILE.png; "
        "png=FILE.png; all others are keys of `dual-policy train`, for example env=arena env.num_envs=512 seed=2. "
        "env.num_envs is how many envs are played at once.",
        examples=(
            "dual-policy evaluate 'policies=[builtin://arena/weak,builtin://arena/random]'",
            "dual-policy evaluate 'policies=[train_dir/first,builtin://arena/medium]' \\\n"
            "      episodes=1024 out=ratings.json",
        ),
    )
    parser.add_argument("words", nargs="+", metavar="key=value", help="see below")
    args = parse_words(parser, words, "keys are written without dashes, for example out=FILE.json", is_mixed=True)
    own = {key: value for key, value in map(_own_word, args.words) if key}
    overrides = [word for word in args.words if word.partition("=")[0] not in KEYS]
    for word in overrides:
        _check_key(word.partition("=")[0])
    check_read(overrides, UNREAD)
    out, png = _path(own, "out"), _path(own, "png")
    if out is not None and out.suffix == ".png":
        raise ConfigError(f"out={out} is for the JSON file; write out={out.with_suffix('.json')}, or png={out}")
    if out is not None and png is None:
        png = out.with_suffix(".png")
    return _Request(policies=_policies(own), episodes=_episodes(own), out=out, png=png, overrides=overrides)


def _own_word(word: str) -> tuple[str, Any]:
    """A key of ours and its value, as Hydra's grammar reads it; ("", None) for a word of the config's."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from dual_policy_plugin.hydra_app.mends import mend

    key = word.partition("=")[0]
    if key not in KEYS:
        return "", None
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException as error:
        if key == "policies":
            raise ConfigError(
                f'{word} cannot be read; put a URI with special characters in quotes: \'policies=["URI","URI"]\''
            ) from error
        raise mend(error, [word]) or error from error
    if override.is_sweep_override():
        raise ConfigError(f"{word} has a comma outside of brackets; write {key}=[{word.partition('=')[2]}]")
    return key, override.value()


def _check_key(key: str) -> None:
    near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.75)
    if near and "." not in key:
        raise ConfigError(f"{key} is not a known key; did you mean {near[0]}?")


def _policies(own: dict[str, Any]) -> list[str]:
    value = own.get("policies")
    if value is None:
        raise ConfigError(f"policies= is missing; name two or more, for example {_EXAMPLE}")
    uris = value if isinstance(value, list) else [value]
    for uri in uris:
        if not isinstance(uri, str) or not uri:
            raise ConfigError(f"policies has {uri!a}, which is no URI; quote a path that looks like a number")
    if len(uris) < 2:
        alone = uris[0] if uris else "URI"
        raise ConfigError(f"policies=[{','.join(uris)}] has nobody to play; name another, policies=[{alone},URI]")
    return list(uris)


def _episodes(own: dict[str, Any]) -> int:
    value = own.get("episodes", 256)
    if type(value) is not int or not 2 <= value <= MAX_EPISODES:
        raise ConfigError(f"episodes={value} is not possible; use a whole number from 2 (one per seating)")
    return value


def _path(own: dict[str, Any], key: str) -> Path | None:
    value = own.get(key)
    if value is None:
        return None
    if isinstance(value, list | dict) or not str(value):
        raise ConfigError(
            f"{key}={value} is no file; use for example {key}=cross_play.{'json' if key == 'out' else key}"
        )
    return Path(str(value)).expanduser()
