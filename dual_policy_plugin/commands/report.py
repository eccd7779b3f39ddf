"""`dual-policy report`: runs, sweeps and curricula as one self-contained HTML file.

    dual-policy report DIR [DIR ...] [--open] [--out FILE.html] [--png DIR] [--evaluation FILE.json]

Only reads the runs, and may be called while they go on. Standard output holds the path of the page, what was left out
goes to standard error.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from dual_policy_plugin.commands.console import show_page
from dual_policy_plugin.commands.words import make_parser, parse_words
from dual_policy_plugin.errors import RunError


def run(words: list[str]) -> int:
    """Writes the page and the figures that were asked for; returns the exit code."""
    parser = make_parser(
        "dual-policy report",
        "DIR [DIR ...] [options]",
        "Writes one HTML file that needs no network: curves, evaluations, policies, decisions, config. DIR is a run, a "
        "sweep or a curriculum sweep; several are compared. A run writes its own at its end (report=false: not).",
        examples=(
            "dual-policy report train_dir/first --open",
            "dual-policy report train_dir/first train_dir/second --out compared.html",
        ),
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's or a sweep's directory")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="(DIR/report.html; of several ./report.html)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="a folder that gets each figure as a PNG too")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE.json", help="of `dual-policy evaluate out=` (DIR/cross_play.json)"
    )
    args = parse_words(parser, words, is_mixed=True)
    out = _check_out(args.folders, args.out)
    if args.png is not None and args.png.exists() and not args.png.is_dir():
        raise RunError(f"--png={args.png} is a file; name a folder")

    from dual_policy_plugin.curriculum.state import read_state
    from dual_policy_plugin.files import publish
    from dual_policy_plugin.report.page.runs import find_runs
    from dual_policy_plugin.report.page.write import make_report, write_figures

    found = [find_runs(folder) for folder in args.folders]
    states = {one.folder: read_state(one.folder) for one in found if one.is_curriculum}
    ladders = {folder: asdict(state) for folder, state in states.items() if state is not None}
    report = make_report(found, ladders=ladders, evaluation=args.evaluation)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        publish(out, report.html)
    except RunError as error:
        raise RunError(f"{error}; or name another file with --out") from error
    print(f"{out} ({len(report.html) / 1e6:.1f} MB)")
    if args.png is not None:
        print(f"{args.png} ({write_figures(args.png, report.plots)} figures)")
    if args.open:
        show_page(out)
    return 0


def _check_out(folders: list[Path], out: Path | None) -> Path:
    """Where the page goes; an error where that is no file.

    Raises:
        RunError: a folder stands there, or the folder for it is missing.
    """
    if out is None:
        return Path("report.html") if len(folders) > 1 else folders[0] / "report.html"
    if out.is_dir():
        raise RunError(f"--out={out} is a folder; name a file in it, --out={out / 'report.html'}")
    if not out.parent.is_dir():
        raise RunError(f"--out={out} cannot be written, there is no folder {out.parent}; make it, or choose another")
    return out
