"""From directories to a page: find the runs, read them, draw them, publish the file.

`dual-policy report` calls it with what the user named; a run calls it with itself at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import DualPolicyError, RunError
from dual_policy_plugin.files import file_error, publish
from dual_policy_plugin.report.page.charts import Plot, as_png
from dual_policy_plugin.report.page.curves import one_run, several_runs
from dual_policy_plugin.report.page.facts import (
    config_section,
    headline,
    policies_section,
    seats_section,
    table_of_runs,
)
from dual_policy_plugin.report.page.html import Section, page
from dual_policy_plugin.report.page.ladder import ladder_section, sweeper_settings
from dual_policy_plugin.report.page.matrix import cross_play_section, evaluation_section, read_cross_play
from dual_policy_plugin.report.page.runs import CROSS_PLAY_NAME, Found, Run, find_runs, read_run, unique_names

REPORT_NAME = "report.html"
MAX_DRAWN = 14
"""Runs whose curves are drawn over each other."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class Report:
    """A page that is ready to be written."""

    html: bytes
    plots: tuple[Plot, ...]
    notes: tuple[str, ...]
    """What was left out, one line each."""


def write_own_report(folder: Path, *, ladder: Mapping[str, Any] | None = None) -> str:
    """Writes the report of a run or a curriculum sweep that this process has just completed, into its directory.

    No error leaves here: a report can be made at any time, and a sweep of weeks is not to fail by one.

    Args:
        folder: the directory.
        ladder: of a sweep, what its curriculum.json holds.

    Returns:
        A line that says where it is; or why it is not there, and what to do.
    """
    path, ladders = folder / REPORT_NAME, {} if ladder is None else {folder: ladder}
    try:
        publish(path, make_report([find_runs(folder)], ladders=ladders, is_own=ladder is None).html)
    except Exception as error:
        _log.debug("the report of %s", folder, exc_info=True)
        why = error if isinstance(error, DualPolicyError) else f"{type(error).__name__}: {error}"
        return f"{folder} is complete, but its report is not written ({why}); `dual-policy report {folder}` writes it"
    return f"report: {path}"


def make_report(
    found: Sequence[Found],
    *,
    ladders: Mapping[Path, Mapping[str, Any]] | None = None,
    evaluation: Path | None = None,
    is_own: bool = False,
) -> Report:
    """The page of the runs that were found.

    Args:
        found: the directories.
        ladders: folder of a curriculum sweep -> what its curriculum.json holds.
        evaluation: a cross-play's JSON; None: cross_play.json of the directories.
        is_own: as for `read_run`.

    Raises:
        RunError: a file cannot be read, or there is nothing to show.
    """
    ladders = ladders or {}
    runs = [read_run(name, folder, is_own=is_own) for name, folder in unique_names(found)]
    if not runs and not ladders:
        raise RunError(f"{found[0].folder} has no run yet; wait for its first job")
    several = len(runs) != 1
    name = ", ".join(one.folder.absolute().name for one in found) if several else runs[0].name
    evaluations = [evaluation] if evaluation else _cross_plays(found)
    stages = [
        ladder_section(folder.name, state, k if len(ladders) > 1 else 0)
        for k, (folder, state) in enumerate(ladders.items(), 1)
    ]
    crossed = [cross_play_section(read_cross_play(path)) for path in evaluations]
    settings = [sweeper_settings(state) for state in ladders.values()]
    if several:
        sections = _sections_of_several(runs, stages, crossed, settings)
    else:
        run = runs[0]
        sections = [
            headline(run), *stages, *one_run(run), evaluation_section(runs), *crossed, policies_section(runs),
            seats_section(run), config_section(runs, *settings),
        ]  # fmt: skip
        sections.sort(key=lambda section: section.anchor == "other")  # stable: to the end, before the config
        sections.append(sections.pop(next(k for k, section in enumerate(sections) if section.anchor == "config")))
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    plots = tuple(plot for section in sections for plot in section.shown)
    return Report(html=page(name, sections).encode(), plots=plots, notes=tuple(notes))


def write_figures(folder: Path, plots: Sequence[Plot]) -> int:
    """Writes each figure as a PNG into `folder`; returns how many.

    Raises:
        RunError: one cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, folder, "created") from error
    used: set[str] = set()
    for plot in plots:
        name, count = plot.name, 2
        while name in used:
            name, count = f"{plot.name}_{count}", count + 1
        used.add(name)
        publish(folder / f"{name}.png", as_png(plot))
    return len(used)


def _sections_of_several(
    runs: Sequence[Run], stages: Sequence[Section], crossed: Sequence[Section], settings: Sequence[str]
) -> list[Section]:
    drawn, note = _drawn(runs)
    return [
        table_of_runs(runs), *stages, *several_runs(drawn, note), evaluation_section(runs), *crossed,
        policies_section(runs), config_section(runs, *settings),
    ]  # fmt: skip


def _drawn(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """The runs whose curves are drawn: all, or of many those of the highest objective."""
    if len(runs) <= MAX_DRAWN:
        return list(runs), ""
    best = set(sorted(range(len(runs)), key=lambda k: -_objective(runs[k]))[:MAX_DRAWN])
    note = f"Drawn are the {MAX_DRAWN} of {len(runs)} runs with the highest objective."
    return [run for k, run in enumerate(runs) if k in best], note


def _objective(run: Run) -> float:
    value = None if run.result is None else run.result.get("objective")
    return value if isinstance(value, float) else float("-inf")


def _cross_plays(found: Sequence[Found]) -> list[Path]:
    return [path for one in found if (path := one.folder / CROSS_PLAY_NAME).is_file()]
