"""`dual-policy curriculum`: how far a curriculum sweep is and why it went that way, from its state file.

    dual-policy curriculum status DIR [--format table|json]

Only reads, and the file is always whole: the command may be run at any moment of a sweep.
"""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from pathlib import Path

from dual_policy_plugin.commands.words import choose_command, make_parser, parse_words
from dual_policy_plugin.curriculum.state import STATE_NAME, SweepState, read_state
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.files import encode_json, read_json
from dual_policy_plugin.report.tables import format_table, printable

FORMATS = ("table", "json")
COLUMNS = ("stage", "NPC", "rating", "attempts", "job", "win rate", "decision")
NOTHING = "-"
_EXAMPLE = "dual-policy curriculum status train_dir/curriculum_builtin"
_MIN_NAME = 8  # columns that an NPC's name keeps on a narrow terminal


def run(words: list[str]) -> int:
    """Runs `dual-policy curriculum <words>` and returns the exit code."""
    command = choose_command(
        "dual-policy curriculum",
        words,
        _COMMANDS,
        examples=("dual-policy train +sweep=curriculum_builtin --dry-run", _EXAMPLE),
        note=" `dual-policy train +sweep=...` begins one.",
    )
    return command(words[1:]) if command else 0


def show_status(words: list[str]) -> int:
    """`curriculum status`: the state file of a sweep as a table, or as it is."""
    parser = make_parser(
        "dual-policy curriculum status",
        "DIR [--format table|json]",
        "Shows the stages of a curriculum sweep, its jobs, and every decision with its figures. Reads only; may be "
        "run while the sweep goes on.",
        examples=(
            _EXAMPLE,
            f"{_EXAMPLE} --format json",
        ),
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder, train_dir/<run>")
    parser.add_argument("--format", choices=FORMATS, default="table", help="(table)")
    args = parse_words(parser, words, is_mixed=True)
    state = read_state(args.folder)
    if state is None:
        raise RunError(_no_state(args.folder))
    if args.format == "json":
        print(encode_json(read_json(args.folder / STATE_NAME), indent=2))
    else:
        width = shutil.get_terminal_size(fallback=(120, 24)).columns
        print(format_status(state, str(args.folder), width=width))
    return 0


def format_status(state: SweepState, title: str, *, width: int) -> str:
    """The state of a sweep in words and one table of its stages, then each decision in the order of its making.

    Args:
        state: what stands in curriculum.json.
        title: the folder, as the user named it.
        width: columns of the terminal; names of NPCs are shortened to it, and sentences wrapped.
    """
    lines = [*(_wrapped(line, width) for line in _summary(state, title)), "", _stage_table(state, width)]
    if state.gates:
        lines += ["", "decisions:"]
    for gate in state.gates:
        lines.append(_wrapped(f"stage {gate.stage}, attempt {gate.attempt}: {gate.decision}: {gate.why}", width))
    return "\n".join(lines)


def _no_state(folder: Path) -> str:
    """The line for a folder that holds no sweep; names one that does, beside or below it."""
    near = [*sorted(folder.glob(f"*/{STATE_NAME}")), *folder.parent.glob(STATE_NAME)]
    there = f"for example {near[0].parent}" if near else "train_dir/<run>"
    return printable(f"{folder} holds no {STATE_NAME}; name the folder of a curriculum sweep, {there}")


def _summary(state: SweepState, title: str) -> list[str]:
    """Where the sweep stands, its jobs by status, and the policy that it has come to."""
    count = Counter(job.status for job in state.jobs)
    jobs = ", ".join(f"{count[status]} {status}" for status in ("finished", "planned", "failed"))
    demotions = f"; demotions: {state.demotions}" if state.demotions else ""
    one, chosen = state.policy, "none yet"
    if one is not None:
        chosen = f"{one.path} (stage {one.stage}, job {one.job}, sha256 {one.sha256[:12]})"
    return [f"{title}: {_place(state)}", f"jobs: {jobs}{demotions}", f"policy: {chosen}"]


def _place(state: SweepState) -> str:
    """Where the sweep stands, in words."""
    num_stages, goes_on = _num_stages(state), "(the command that began it goes on from here)"
    if state.status == "finished":
        return f"finished, all of its {num_stages} stages"
    if state.status == "stopped":
        return f"stopped at stage {state.stage} of {num_stages}"
    if not state.jobs and state.request.get("sweeper", {}).get("order") == "weakest_first":
        return f"before stage 1 of {num_stages}, its NPCs are rated and then ordered {goes_on}"
    return f"at stage {state.stage} of {num_stages}, attempt {state.attempt} {goes_on}"


def _num_stages(state: SweepState) -> int:
    """All stages; with `ladder: self` those to come have no rung yet."""
    stages = state.request.get("sweeper", {}).get("stages")
    return max(len(state.rungs), stages if isinstance(stages, int) else 0)


def _stage_table(state: SweepState, width: int) -> str:
    rows = [_stage_row(state, stage) for stage in range(1, _num_stages(state) + 1)]
    table = format_table(COLUMNS, rows)
    too_wide = max(map(len, table.splitlines())) - width
    if too_wide <= 0:
        return table
    longest = max(len(printable(row[1])) for row in rows)
    room = max(_MIN_NAME, longest - too_wide)
    return format_table(COLUMNS, [[row[0], _shortened(row[1], room), *row[2:]] for row in rows])


def _stage_row(state: SweepState, stage: int) -> list[str]:
    """The cells of one stage: how often it was tried, its newest gate, or before that its best job so far."""
    rung = state.rungs[stage - 1] if stage <= len(state.rungs) else None
    gates = [gate for gate in state.gates if gate.stage == stage]
    gate = gates[-1] if gates else None
    attempts = len(gates) + (state.status == "running" and state.stage == stage)
    best = state.best_job(stage)
    job = gate.job if gate else best.num if best else None
    return [
        str(stage),
        rung.name if rung else "best so far",
        _interval(rung.rating, rung.low, rung.high, ".0f") if rung else NOTHING,
        str(attempts or NOTHING),
        NOTHING if job is None else str(job),
        _interval(gate.win_rate, gate.low, gate.high, ".2f") if gate else NOTHING,
        gate.decision if gate else NOTHING,
    ]


def _interval(value: float | None, low: float | None, high: float | None, style: str) -> str:
    if value is None:
        return NOTHING
    return f"{value:{style}}" if low is None or high is None else f"{value:{style}} [{low:{style}}, {high:{style}}]"


def _shortened(name: str, room: int) -> str:
    """A name on at most `room` columns, its end kept: there the versions are told apart."""
    name = printable(name)
    return name if len(name) <= room else f"..{name[len(name) - room + 2 :]}"


def _wrapped(text: str, width: int) -> str:
    """One line on several where it is wider than the terminal; a path is never broken."""
    return textwrap.fill(
        printable(text), max(width, 40), subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


_COMMANDS = {"status": (show_status, "the stages, jobs and decisions of a curriculum sweep")}
