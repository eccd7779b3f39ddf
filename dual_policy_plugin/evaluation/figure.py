"""A CrossPlay as a picture: the win rates as a heat map with their numbers, beside it the ratings with intervals."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dual_policy_plugin.evaluation.cross_play import CrossPlay

DPI = 130
MAX_LABEL = 28  # letters of a name
LOSS, EVEN, WIN, SECOND = "#b2182b", "#f7f7f7", "#2166ac", "#d6604d"


def draw_cross_play(cross: CrossPlay) -> bytes:
    """The picture as PNG; policies are in the order of their ratings, the best first."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache, when it is imported

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, num_rated = len(cross.policies), len(cross.ratings.names)
    longest = max(len(short_name(name)) for name in cross.ratings.names)
    cell = 0.62 if size <= 8 else 0.52
    side = max(cell * size, 2.2)
    left = 0.35 + 0.085 * longest
    height = max(side, 0.3 * num_rated) + 1.3 + 0.075 * longest
    width = left + side + 0.9 + left + 3.2
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    top = 1 - 0.75 / height
    heat = figure.add_axes((left / width, top - side / height, side / width, side / height))
    start = left + side + 0.9 + left if cross.roles else left + side + 0.45
    tall = max(side, 0.3 * num_rated) if cross.roles else side
    bars = figure.add_axes((start / width, top - tall / height, 3.0 / width, tall / height))
    order = _order(cross)
    _draw_win_rates(heat, cross, order)
    _draw_ratings(bars, cross, order)
    figure.suptitle(
        f"{short_name(cross.env)}: {cross.episodes} episodes a cell", x=0.15 / width, y=1 - 0.15 / height,
        ha="left", va="top", fontsize=11, fontweight="bold",
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.2)
    return buffer.getvalue()


def _draw_win_rates(axes: Axes, cross: CrossPlay, order: list[int]) -> None:
    names = [cross.policies[k].name for k in order]
    draw_heat_map(axes, cross.win_rate[np.ix_(order, order)], names, names)
    axes.set_title("win rate, row against column", fontsize=10, loc="left")
    if cross.roles:
        axes.set_ylabel(f"as {cross.roles[0]}", fontsize=9)
        axes.set_xlabel(f"as {cross.roles[1]}", fontsize=9)


def draw_heat_map(axes: Axes, rates: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draws win rates with their numbers: red below one half, blue above.

    Args:
        axes: to draw in.
        rates: (num_rows, num_columns) win rates; NaN where two did not play.
        rows, columns: names, shortened here.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("win_rate", [LOSS, EVEN, WIN])
    axes.imshow(rates, cmap=colors, vmin=0, vmax=1, aspect="equal")
    labels = [short_name(name) for name in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(rows)), [short_name(name) for name in rows], fontsize=9)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    size = 9 if len(columns) <= 8 else 8
    for (row, column), rate in np.ndenumerate(rates):
        if not np.isnan(rate):
            ink = "white" if abs(rate - 0.5) > 0.36 else "black"
            axes.text(column, row, f"{rate:.2f}", ha="center", va="center", color=ink, fontsize=size)


def _draw_ratings(axes: Axes, cross: CrossPlay, order: list[int]) -> None:
    """Beside the heat map's rows; with roles a list of its own, the second role's players in another color."""
    rated, size = cross.ratings, len(order)
    if cross.roles:
        order = sorted(range(2 * size), key=lambda k: -rated.rating[k])
    rating, low, high = (np.array(values)[order] for values in (rated.rating, rated.low, rated.high))
    places = np.arange(len(order))
    colors = [WIN if k < size else SECOND for k in order]
    axes.hlines(places, low, high, colors=colors, linewidth=2)
    axes.scatter(rating, places, c=colors, s=28, zorder=3)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_yticks(
        places, [short_name(rated.names[k]) for k in order] if cross.roles else [""] * len(order), fontsize=9
    )
    axes.margins(x=0.25)
    for place, value, end in zip(places, rating, high, strict=True):
        axes.annotate(
            f"{round(value)}", (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_title("rating and 95 % interval", fontsize=10, loc="left")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _order(cross: CrossPlay) -> list[int]:
    """The policies by their ratings, the best first; with roles as they were given."""
    size = len(cross.policies)
    return list(range(size)) if cross.roles else sorted(range(size), key=lambda k: -cross.ratings.rating[k])


def short_name(name: str) -> str:
    """A name that fits, in letters that every font has; `$` would begin a formula."""
    name = name.encode("ascii", "backslashreplace").decode()
    text = name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 13]}…{name[-12:]}"
    return text.replace("$", r"\$")
