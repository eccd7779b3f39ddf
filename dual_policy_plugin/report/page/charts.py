"""Figures by matplotlib, each as inline SVG whose colors follow the page's theme, and as PNG.

Takes series and names; gives Plots. Names are other people's: they are shortened, and no formula is made of them.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dual_policy_plugin.evaluation.figure import DPI, draw_heat_map, short_name
from dual_policy_plugin.report.page.series import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Told apart by color-blind people (Okabe & Ito 2008); the page has a twin of each for a dark background."""
LEARNER, NPC, BOTH = 0, 1, 2
"""Of `COLORS`, the same in every figure."""
INK, GRID = "#24292f", "#d8dee4"
STYLES = ("-", "--", ":", "-.")
_SIZE, _SMALL_SIZE = (5.6, 2.9), (4.2, 2.1)  # width and height in inches, 72 of the page's units each
_LEFT = 0.62
"""Inches for the numbers of a vertical axis."""
_MAX_LEGEND = 8
"""Curves that a figure names itself; of more, and in small figures, the page has one key for all."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": GRID,
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Line:
    """A curve."""

    label: str
    steps: Floats
    values: Floats
    band: tuple[Floats, Floats] | None = None
    """Lower and upper bounds."""
    color: int = LEARNER
    style: int = 0
    is_dotted: bool = False
    """Points with their intervals, joined by a thin line."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Plot:
    """A figure and what is said below it."""

    name: str
    """Of its PNG file."""
    title: str
    caption: str
    """Plain text."""
    figure: Figure
    is_small: bool = False
    unnamed: Sequence[str] = ()
    """Labels of the curves where the figure itself has none."""


def draw_lines(
    name: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    limits: tuple[float, float] | None = None,
    even: float | None = None,
    is_small: bool = False,
) -> Plot | None:
    """Curves over learner steps; None where no curve has a point.

    Args:
        name: of the PNG file.
        title: what the vertical axis is.
        caption: what is said below.
        lines: the curves.
        limits: of the vertical axis; None: what the curves need.
        even: a value that gets a line of its own.
        is_small: of half the height.
    """
    lines = [line for line in lines if len(line.values)]
    if not lines:
        return None
    with _styled():
        labels = [_plain(line.label) for line in lines] if len(lines) > 1 else []
        has_legend = bool(labels) and len(labels) <= (3 if is_small else _MAX_LEGEND)
        columns = max(1, min(4, int(74 // (8 + max(map(len, labels), default=1)))))
        legend = 0.22 * -(-len(labels) // columns) if has_legend else 0.0
        width, height = _SMALL_SIZE if is_small else _SIZE
        figure, axes = _new_axes(width, height + legend, top=0.12 + legend)
        if even is not None:
            axes.axhline(even, color=GRID, linewidth=1.5, zorder=0.5)
        for line in lines:
            _draw_line(axes, line)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda steps, _: format_steps(steps))
        axes.xaxis.set_major_locator(_tidy_ticks(5))
        _format_values(axes, max(float(np.abs(line.values).max()) for line in lines))
        axes.set_xlim(0, max(float(line.steps.max()) for line in lines) * 1.01 or 1)
        axes.yaxis.set_major_locator(_tidy_ticks(4 if is_small else 5))
        axes.set_xlabel("learner steps", fontsize=9)
        if limits is not None:
            axes.set_ylim(*limits)
        _make_room(axes, width)
        if has_legend:
            axes.legend(
                axes.get_lines()[-len(lines) :], labels, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns,
                frameon=False, fontsize=9, borderaxespad=0.1, handlelength=1.6, columnspacing=1.2, labelspacing=0.25,
            )  # fmt: skip
    unnamed = () if has_legend else labels
    return Plot(name=name, title=title, caption=caption, figure=figure, is_small=is_small, unnamed=unnamed)


def draw_intervals(
    name: str, title: str, caption: str, rows: Sequence[tuple[str, float, float, float]], *, unit: str
) -> Plot | None:
    """Values with their intervals, one below the other; None where there are none.

    Args:
        name, title, caption: as for `draw_lines`.
        rows: name, value, lower and upper bound of each.
        unit: of the values.
    """
    if not rows:
        return None
    with _styled():
        names = [short_name(row[0]) for row in rows]
        figure, axes = _new_axes(_SIZE[0], 0.9 + 0.3 * len(rows), left=0.25 + 0.085 * max(map(len, names)))
        places = np.arange(len(rows))
        values, low, high = (np.array([row[k] for row in rows]) for k in (1, 2, 3))
        axes.hlines(places, low, high, colors=COLORS[LEARNER], linewidth=2)
        axes.scatter(values, places, c=COLORS[LEARNER], s=26, zorder=3)
        for place, value, end in zip(places, values, high, strict=True):
            axes.annotate(f"{value:.0f}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(places, names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(unit, fontsize=9)
    return Plot(name=name, title=title, caption=caption, figure=figure)


def draw_matrix(
    name: str, title: str, caption: str, rates: Floats, rows: Sequence[str], columns: Sequence[str]
) -> Plot | None:
    """Win rates as a heat map; None where there are none.

    Args:
        name, title, caption: as for `draw_lines`.
        rates: (num_rows, num_columns); NaN where two did not play.
        rows, columns: names.
    """
    if not rates.size:
        return None
    with _styled():
        cell = 0.62 if len(columns) <= 8 else 0.52
        left, below = (0.3 + 0.085 * max(len(short_name(one)) for one in names) for names in (rows, columns))
        width = max(left + cell * len(columns) + 0.5, _SIZE[0])
        height = cell * len(rows) + 0.2 + 0.75 * below
        figure, axes = _new_axes(
            width, height, left=left, bottom=0.75 * below, right=width - left - cell * len(columns)
        )
        draw_heat_map(axes, rates, rows, columns)
    return Plot(name=name, title=title, caption=caption, figure=figure)


def as_svg(plot: Plot) -> str:
    """The figure as an <svg> element: text as text, and the theme's colors in place of its own."""
    buffer = io.StringIO()
    with _styled(plot.name):
        plot.figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z]+\w*_\d+">', "<g>", svg)  # numbered anew in every figure
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', _svg_opening(plot), svg, count=1)
    svg = re.sub(r"(font: [0-9.]+px) [^;\"]*", r"\1 var(--font)", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _THEME.get(found[0], found[0]), svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def as_png(plot: Plot) -> bytes:
    """The figure with its title, on white."""
    buffer = io.BytesIO()
    with _styled():
        title = plot.figure.suptitle(plot.title, x=0.02, y=1.0, ha="left", va="bottom", fontsize=11, fontweight="bold")
        names = None
        if plot.unnamed:
            axes = plot.figure.axes[0]
            curves = axes.get_lines()[-len(plot.unnamed) :]
            names = plot.figure.legend(
                curves, plot.unnamed, loc="upper left", bbox_to_anchor=(0.0, 0.0), frameon=False, fontsize=8, ncols=2
            )
        plot.figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15, facecolor="white")
        title.remove()
        if names is not None:
            names.remove()
    return buffer.getvalue()


def format_steps(steps: float) -> str:
    """As `250k`, `1.5M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(steps) >= size:
            return f"{steps / size:.3g}{letter}"
    return f"{steps:.0f}"


def _styled(salt: str | None = None) -> AbstractContextManager[None]:
    """Our settings of matplotlib, for a `with`; equal figures of one salt have equal ids in their SVG."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache, when it is imported

    from matplotlib import rc_context

    style: Any = {**_STYLE, "svg.hashsalt": salt}
    return rc_context(style)


def _plain(label: str) -> str:
    """A name for a legend; matplotlib leaves out those that begin with an underscore."""
    return re.sub("^_", " _", short_name(label))


_THEME = {color: f"var(--c{i})" for i, color in enumerate(COLORS)} | {INK: "var(--ink)", GRID: "var(--grid)"}


def _svg_opening(plot: Plot) -> str:
    width, _ = plot.figure.get_size_inches()
    wide = f' style="min-width:{72 * width:.0f}px"' if width > _SIZE[0] else ""
    return rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" aria-label="{plot.name}"{wide}>'


def _new_axes(
    width: float, height: float, *, left: float = _LEFT, right: float = 0.18, top: float = 0.12, bottom: float = 0.5
) -> tuple[Figure, Axes]:
    """A figure of so many inches, with axes that leave so many of them at each side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(box)
    axes.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _draw_line(axes: Axes, line: Line) -> None:
    color = COLORS[line.color % len(COLORS)]
    if line.band is not None and line.is_dotted:
        axes.vlines(line.steps, *line.band, colors=color, linewidth=1.4)
    elif line.band is not None:
        axes.fill_between(line.steps, *line.band, color=color, alpha=0.2, linewidth=0)
    is_pointed = line.is_dotted or len(line.values) == 1
    style, width = STYLES[line.style % len(STYLES)], 1.0 if line.is_dotted else 1.6
    marker = "o" if is_pointed else ""
    axes.plot(line.steps, line.values, style, color=color, linewidth=width, marker=marker, markersize=4)


def _format_values(axes: Axes, largest: float) -> None:
    """Numbers at the vertical axis, each written out: what they have in common is not set apart."""
    if largest >= 10_000:
        axes.yaxis.set_major_formatter(lambda value, _: format_steps(value))
    elif largest < 1e-3:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")


def _make_room(axes: Axes, width: float) -> None:
    """Moves the left side of axes in a figure of so many inches to where their numbers end, if they are long."""
    numbers = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks().tolist())
    left = max(_LEFT, 0.14 + 0.075 * max(map(len, numbers), default=0))
    box = axes.get_position()
    axes.set_position((left / width, box.y0, box.x1 - left / width, box.height))


def _tidy_ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=count)
