"""`dual-policy launch`: one run on other machines, checked and pinned before anything is launched.

    dual-policy launch sky TASK [--gpus=1 --nodes=1 --spot ... --dry-run] run=... [key=value ...]
    dual-policy launch slurm [--gpus=1 --nodes=1 --partition=main ... --dry-run] run=... [key=value ...]

Standard output holds what was launched, or with --dry-run the task (YAML) or the script (sbatch), with the table of
policies and the cost as its comments; notes go to standard error.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dual_policy_plugin.commands.words import choose_command, make_parser, parse_words
from dual_policy_plugin.errors import ConfigError, LaunchError
from dual_policy_plugin.waiting import waiting

Main = Callable[[list[str]], int]
TASKS = ("train", "train_multinode", "curriculum", "evaluate")
_SLURM_OPTIONS = {"gpus": "gpus_per_node", "nodes": "nodes", "cpus": "cpus_per_task", "partition": "partition"}
"""Option -> the setting of hydra.launcher that it stands for."""


def run(words: list[str], main: Main) -> int:
    """Runs `dual-policy launch <words>` and returns the exit code.

    Args:
        words: of the command line.
        main: the `dual-policy` command itself, which a job on Slurm begins with.
    """
    command = choose_command("dual-policy launch", words, _COMMANDS, examples=_EXAMPLES)
    return 0 if command is None else command(words[1:], main)


def launch_sky(words: list[str], main: Main) -> int:
    """`launch sky`: a task of `sky/` on a cluster of SkyPilot's, or as a managed job."""
    args = _parse_sky(words)

    from dual_policy_plugin.launch import sky_launch, sky_sdk
    from dual_policy_plugin.launch.checkout import read_checkout
    from dual_policy_plugin.launch.other_tasks import check_task_words
    from dual_policy_plugin.launch.preflight import npc_table
    from dual_policy_plugin.launch.sky_task import TaskOptions

    sky_sdk.check_infra(args.infra)
    checkout = read_checkout(Path.cwd(), git_ref=args.git_ref, skip_check=args.skip_git_check)
    sky_launch.check_folder(checkout)
    options = TaskOptions(
        gpus=args.gpus,
        nodes=args.nodes,
        spot=args.spot,
        cpus=args.cpus,
        max_runtime_hours=args.max_runtime_hours,
        heartbeat_timeout_s=args.heartbeat_timeout_seconds,
        git_ref=checkout.git_ref,
        git_url=checkout.git_url,
        workdir=checkout.folder,
        infra=args.infra,
    )
    with waiting("checking the task with SkyPilot"):
        launches = [
            sky_launch.plan_launch(args.task, preflight, checkout, options, args.secret)
            for preflight in _each_copy(partial(check_task_words, args.task), args.overrides, args.copies)
        ]
        for one in launches:
            sky_sdk.check_task(sky_launch.fill_secrets(one))
        cost = sky_launch.estimate_cost(launches)
    launches = [sky_launch.with_price(one, cost, len(launches)) for one in launches]
    tables = dict.fromkeys(npc_table(one.preflight.entries) for one in launches)
    summary = [*tables, f"code: {checkout.text}", cost.text(args.max_runtime_hours)]
    if args.dry_run:
        secrets = sorted({name for one in launches for name in one.secrets})
        if secrets:
            summary.append(f"needs: sky launch {' '.join(f'--secret {name}' for name in secrets)} ...")
        _print_comments(summary)
        print("---\n".join(sky_launch.as_yaml(one) for one in launches), end="")
        return 0
    _show(summary, args)
    if args.jobs and not launches[0].preflight.config.trainer.sync_uri:
        print("note: without trainer.sync_uri= a job that loses its machine begins anew", file=sys.stderr)
    _launch_all([partial(sky_launch.start, one, is_job=args.jobs, cluster=args.cluster) for one in launches])
    return 0


def launch_slurm(words: list[str], main: Main) -> int:
    """`launch slurm`: one job in Slurm's queue for each copy; does not wait for it."""
    args = _parse_slurm(words)

    from dual_policy_plugin.launch import slurm_job
    from dual_policy_plugin.launch.checkout import read_checkout
    from dual_policy_plugin.launch.preflight import check_launch, npc_table

    own = [word for word in args.overrides if re.match(r"hydra[./]launcher\b", word)]
    overrides = [word for word in args.overrides if word not in own]
    checkout = read_checkout(Path.cwd(), skip_check=args.skip_git_check)
    preflights = list(_each_copy(partial(check_launch, is_shared=True), overrides, args.copies))
    settings = [slurm_job.read_settings([*_slurm_words(args), *own], one.words) for one in preflights]
    scripts = [slurm_job.make_script(one) for one in settings]
    hours = settings[0]["timeout_min"] / 60
    price, nodes = preflights[0].config.hourly_cost, int(settings[0]["nodes"]) * len(preflights)
    cost = "cost: not known; METTA_HOURLY_COST is not set"
    if price is not None:
        cost = f"cost: ${price * nodes:.2f} an hour (METTA_HOURLY_COST={price:g} a node), for each start of {hours:g} h"
    summary = [*dict.fromkeys(npc_table(one.entries) for one in preflights), f"code: {checkout.text}", cost]
    if args.dry_run:
        for script in scripts:
            first, _, rest = script.partition("\n")  # a script begins with its #!
            print(first)
            _print_comments(summary)
            print(rest)
        return 0
    _show(summary, args)
    pairs = zip(preflights, settings, strict=True)
    _launch_all([partial(slurm_job.launch, main, *pair, commit=checkout.text) for pair in pairs])
    return 0


def _each_copy(check: Callable[[Sequence[str]], Any], overrides: list[str], copies: int) -> Iterable[Any]:
    """What is checked: the words themselves or, for several copies, run/0, run/1, ... with seeds one apart."""
    first = check(overrides)
    if copies == 1:
        return [first]

    from dual_policy_plugin.hydra_app.overrides import text_override

    config = first.config
    return [
        check([*overrides, text_override("run", f"{config.run}/{i}"), f"seed={config.seed + i}"]) for i in range(copies)
    ]


def _launch_all(starts: Sequence[Callable[[], str]]) -> None:
    """Launches one after the other, and prints a line for each; an error names what is launched already."""
    for i, start in enumerate(starts):
        try:
            print(start(), flush=True)
        except LaunchError as error:
            if i:
                raise LaunchError(f"{error} ({i} of {len(starts)} copies are launched, see above)") from error
            raise


def _show(summary: list[str], args: argparse.Namespace) -> None:
    """Says on standard error what is about to be launched, and asks where --confirm wants that."""
    print("\n".join(summary), file=sys.stderr)
    if not args.confirm:
        return
    if not sys.stdin.isatty():
        raise LaunchError("--confirm asks at a terminal, and standard input is none; leave --confirm away")
    print("launch? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise LaunchError("not launched, as was answered")


def _print_comments(parts: list[str]) -> None:
    print("\n".join(f"# {line}" for part in parts for line in part.splitlines()))


def _slurm_words(args: argparse.Namespace) -> list[str]:
    """The options as overrides of hydra.launcher."""
    words = ["hydra/launcher=dual_policy_slurm_gpu"] if args.gpus else []
    words += [
        f"hydra.launcher.{setting}={getattr(args, option)}"
        for option, setting in _SLURM_OPTIONS.items()
        if getattr(args, option) not in (None, 0)
    ]
    if args.timeout_hours is not None:
        words.append(f"hydra.launcher.timeout_min={max(1, round(args.timeout_hours * 60))}")
    return words


def _parse_sky(words: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "dual-policy launch sky",
        "TASK [options] [key=value ...]",
        "Checks the run, pins its policies, and launches a task of sky/ with SkyPilot.",
        allow_abbrev=False,
        note="Overrides are those of `dual-policy train`, and reach it as they are.",
        examples=(_EXAMPLES[0],),
    )
    parser.add_argument("task", metavar="TASK", type=_task, help=", ".join(TASKS))
    parser.add_argument(
        "--gpus", metavar="WHAT", help="per node: a count, KIND or KIND:COUNT; 0: none (what the task says)"
    )
    parser.add_argument("--nodes", metavar="N", type=_count, default=1, help="machines of the task (1)")
    parser.add_argument("--cpus", metavar="N", help="per node: 8, or 8+ for at least so many")
    parser.add_argument("--infra", metavar="WHERE", help="aws, gcp/us-central1, k8s, slurm/cluster, ... (the cheapest)")
    parser.add_argument("--spot", action=argparse.BooleanOptionalAction, help="machines that may be taken away")
    parser.add_argument("--jobs", action="store_true", help="a managed job, which is begun again on another machine")
    parser.add_argument("--cluster", metavar="NAME", type=_name, help="a cluster's name (the run's)")
    parser.add_argument("--max-runtime-hours", metavar="H", type=_hours, help="over all restarts; 0: no limit")
    parser.add_argument(
        "--heartbeat-timeout-seconds",
        metavar="S",
        type=_whole,
        help="ended after so long without a sign of life; 0: never",
    )
    parser.add_argument(
        "--git-ref", metavar="REF", help="branch, tag or commit on the remote, in place of this checkout"
    )
    parser.add_argument(
        "--secret", metavar="NAME", action="append", default=[], type=_variable, help="a variable that the node gets"
    )
    _add_common(parser)
    args = _parse(parser, words)
    if args.jobs and args.cluster:
        raise ConfigError(
            f"--cluster={args.cluster} has no effect with --jobs, which finds its own; remove one of them"
        )
    if args.git_ref is not None and args.skip_git_check:
        raise ConfigError("--skip-git-check sends the folder as it is and --git-ref does not; remove one of them")
    return args


def _parse_slurm(words: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "dual-policy launch slurm",
        "[options] [key=value ...]",
        "Checks the run, pins its policies, and puts one job into Slurm's queue.",
        allow_abbrev=False,
        note="Overrides are those of `dual-policy train`; hydra.launcher.* says the rest of the job (docs/slurm.md).",
        examples=(_EXAMPLES[1],),
    )
    parser.add_argument("--gpus", metavar="N", type=_whole, help="per node (0)")
    parser.add_argument("--nodes", metavar="N", type=_count, help="machines of the job (1)")
    parser.add_argument("--cpus", metavar="N", type=_count, help="per process")
    parser.add_argument("--partition", metavar="NAME", type=_name, help="(the cluster's default)")
    parser.add_argument(
        "--timeout-hours", metavar="H", type=_hours, help="of one start; then it saves and is queued again"
    )
    _add_common(parser)
    return _parse(parser, words)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--copies", metavar="N", type=_count, default=1, help="N runs NAME/0, NAME/1, ... with seeds one apart"
    )
    parser.add_argument("--skip-git-check", action="store_true", help="launch code that is not committed or pushed")
    parser.add_argument("--dry-run", action="store_true", help="print what would be launched")
    parser.add_argument("--confirm", action="store_true", help="ask before launching")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `dual-policy train`")


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    if flag := next((word for word in words if word in ("-m", "--multirun")), None):
        launcher = "skypilot" if parser.prog.endswith("sky") else "dual_policy_slurm"
        raise ConfigError(
            f"{flag}: one launch is one run; add --copies=N for several seeds, or sweep with "
            f"`dual-policy train -m hydra/launcher={launcher}`"
        )
    args = parse_words(parser, words, is_mixed=True)
    if word := next((word for word in args.overrides if "=" not in word and not word.startswith("~")), None):
        raise ConfigError(f"{word!r} cannot be read; an override is key=value, for example run=my_experiment")
    return args


def _task(word: str) -> str:
    if word not in TASKS:
        near = "".join(f"did you mean {one}? " for one in difflib.get_close_matches(word, TASKS, n=1))
        raise argparse.ArgumentTypeError(f"{word!a} is no task that can be checked; {near}there are {', '.join(TASKS)}")
    return word


def _whole(word: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", word) is None:
        raise argparse.ArgumentTypeError(f"{word!a} is no whole number")
    return int(word)


def _count(word: str) -> int:
    if _whole(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!a} is no count of 1 or more")
    return int(word)


def _hours(word: str) -> float:
    if re.fullmatch(r"[0-9]{0,6}\.?[0-9]{1,6}", word) is None:
        raise argparse.ArgumentTypeError(f"{word!a} is no number of hours")
    return float(word)


def _name(word: str) -> str:
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9._,-]*", word) is None:
        raise argparse.ArgumentTypeError(f"{word!a} is no name; use letters, digits, _ . -, a letter first")
    return word


def _variable(word: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", word) is None:
        raise argparse.ArgumentTypeError(f"{word.partition('=')[0]!a} is no variable's name; give no value with it")
    return word


_EXAMPLES = (
    "dual-policy launch sky train --gpus H100 --spot --dry-run run=first \\\n"
    "      +user=dual_policy_checkpoint_example",
    "dual-policy launch slurm --gpus 1 --partition gpu --dry-run run=first \\\n"
    "      +user=dual_policy_checkpoint_example",
)
_COMMANDS: dict[str, tuple[Callable[[list[str], Main], int], str]] = {
    "sky": (launch_sky, "on a cloud, with SkyPilot: a cluster or a managed job"),
    "slurm": (launch_slurm, "as a job in Slurm's queue"),
}
