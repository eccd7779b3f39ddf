"""`dual-policy runs`: the runs of a W&B project with their scores and the URIs of what they published."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from dataclasses import asdict

from dual_policy_plugin.commands.words import make_parser, parse_words
from dual_policy_plugin.errors import ConfigError, NoRunsError
from dual_policy_plugin.report.tables import format_table
from dual_policy_plugin.wandb_runs import DEFAULT_PROJECT, ORDERS, STATES, WandbRun, list_runs, wandb_defaults

FORMATS = ("table", "json", "uris")
COLUMNS = ("Run Name", "Score", "Created", "WandB URI")


def run(words: list[str]) -> int:
    """Prints the runs; with json and uris standard output holds only those. Returns the exit code."""
    args = _parse(words)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever the client has to say
            entity, project = _entity_and_project(args)
            runs = list_runs(entity, project, limit=args.limit, state=args.state, order=args.order)
    except NoRunsError:
        if args.format == "json":
            print("[]")
        raise
    if args.format == "json":
        print(json.dumps([asdict(run) for run in runs], indent=2))
    elif args.format == "uris":
        print("".join(f"{run.uri}\n" for run in runs if run.uri is not None), end="")
        if missing := sum(run.uri is None for run in runs):
            print(f"note: {missing} of {len(runs)} runs published no policy and are left out", file=sys.stderr)
    else:
        print(_format(runs))
    return 0


def _entity_and_project(args: argparse.Namespace) -> tuple[str | None, str]:
    """From the command line, else the W&B settings, else the config; no entity: the login's own."""
    entity, project = args.entity, args.project
    if entity is None or project is None:
        entity_set, project_set = wandb_defaults()
        entity, project = entity or entity_set, project or project_set
    if entity is None or project is None:
        from dual_policy_plugin.hydra_app.composition import compose_config

        wandb = compose_config(args.overrides)[0].wandb
        entity, project = entity or wandb.entity, project or wandb.project or DEFAULT_PROJECT
    for name, value in (("entity", entity), ("project", project)):
        if value is not None and (not value.isprintable() or re.search(r"[/\\#?%:]", value) or not value.strip()):
            raise ConfigError(f"--{name}={value!a} is no name; use it as it stands in the address of the W&B page")
    return entity, project


def _format(runs: list[WandbRun]) -> str:
    rows = [(run.name, "N/A" if run.score is None else f"{run.score:.3f}", run.created, run.uri or "-") for run in runs]
    return format_table(COLUMNS, rows)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "dual-policy runs",
        "[options] [key=value ...]",
        "Lists the runs of a W&B project, and the URI of the newest policy that each of them published.",
        note="Exit codes: 4 no runs, 5 no login or no access, 6 no network. Overrides such as wandb.project=arena "
        "are read where neither an option nor the W&B settings name entity and project.",
        examples=(
            "dual-policy runs --project arena",
            "dual-policy runs --project arena --state finished --order -score --format uris",
        ),
    )
    parser.add_argument("--entity", help="user or team (W&B settings, then the config, then the login's own)")
    parser.add_argument("--project", help="(W&B settings, then the config)")
    parser.add_argument("--limit", type=_positive, metavar="N", default=20, help="how many runs (20)")
    parser.add_argument("--state", choices=STATES, default="all", help="only runs in this state (all)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="(table)")
    parser.add_argument(
        "--order", type=_order, default="-created", help=f"{', '.join(ORDERS)} (-created: newest first)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `dual-policy train`")

    return parse_words(parser, _joined(words), is_mixed=True)


def _joined(words: list[str]) -> list[str]:
    """`--order -created` as `--order=-created`: argparse takes a word with a dash for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--order" and re.fullmatch(r"-[a-z_]+", word):
            joined[-1] = f"--order={word}"
        else:
            joined.append(word)
    return joined


def _order(text: str) -> str:
    """One of ORDERS; a `+` and the client's own created_at are understood."""
    order = re.sub(r"^\+", "", text).replace("created_at", "created")
    if order not in ORDERS:
        raise argparse.ArgumentTypeError(f"{text!a} is none of {', '.join(ORDERS)}")
    return order


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!a} is no count of 1 or more")
    return int(text)
