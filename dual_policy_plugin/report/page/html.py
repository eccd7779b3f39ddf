"""Pieces of the page. Every text that comes from outside goes through `text`; nothing else makes markup of it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from dual_policy_plugin.report.page.charts import COLORS, Plot, as_svg
from dual_policy_plugin.report.tables import printable

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the browser may load: nothing from anywhere, whatever a name says."""


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the page, in the contents by its title; without a body it is left out."""

    anchor: str
    title: str
    intro: str = ""
    """Plain text."""
    plots: Sequence[Plot | None] = ()
    blocks: Sequence[str] = ()
    """Markup that functions of this module made."""
    shown: list[Plot] = field(init=False)

    def __post_init__(self) -> None:
        self.shown = [plot for plot in self.plots if plot is not None]


def text(value: object) -> str:
    """Markup that shows `value` as it is: escaped, with unseen characters written out, its direction its own."""
    return f"<bdi>{html.escape(printable(str(value)))}</bdi>"


def paragraph(value: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_kind(kind)}>{html.escape(printable(value))}</p>" if value else ""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        header: plain text.
        rows: of plain values.
        numbers: columns that are set to the right.
    """
    if not rows:
        return ""
    sides = ["n" if k in numbers else "" for k in range(len(header))]
    head = "".join(f"<th{_kind(side)}>{text(cell)}</th>" for cell, side in zip(header, sides, strict=True))
    lines = (
        "".join(f"<td{_kind(side or _width(cell))}>{text(cell)}</td>" for cell, side in zip(row, sides, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def cards(facts: Sequence[tuple[str, str, str]]) -> str:
    """The headline: what it is, its figure, and what belongs to the figure."""
    return (
        '<dl class="cards">'
        + "".join(
            f"<div><dt>{text(what)}</dt><dd><b>{text(value)}</b> <span>{text(more) if more else ''}</span></dd></div>\n"
            for what, value, more in facts
        )
        + "</dl>"
    )


def color_key(labels: Sequence[str]) -> str:
    """Which curve is whose, in the order of the figures' colors; further rounds through them are drawn otherwise."""
    kinds = ("solid", "dashed", "dotted", "double")
    items = []
    for k, label in enumerate(labels):
        kind, color = kinds[k // len(COLORS) % len(kinds)], k % len(COLORS)
        items.append(f'<li><i style="border-top-style:{kind};border-color:var(--c{color})"></i>{text(label)}</li>')
    return f'<ul class="key">{"".join(items)}</ul>'


def listing(title: str, body: str) -> str:
    """A long text, folded up; its lines stay as they are."""
    lines = "\n".join(html.escape(printable(line)) for line in body.expandtabs().splitlines())
    return f"<details><summary>{text(title)}</summary><pre>{lines}</pre></details>" if body else ""


def figure(plot: Plot) -> str:
    """A plot, its title and its explanation."""
    title, caption = (html.escape(printable(one)) for one in (plot.title, plot.caption))
    small = ' class="small"' if plot.is_small else ""
    shown = f'<div class="wide">{as_svg(plot)}</div>'
    return f"<figure{small}><h3>{title}</h3>{shown}<figcaption>{caption}</figcaption></figure>"


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole document; the contents leave the first section out, it stands right below them."""
    shown = [one for one in sections if one.shown or any(one.blocks)]
    links = " ".join(f'<a href="#{one.anchor}">{html.escape(printable(one.title))}</a>' for one in shown[1:])
    style = files("dual_policy_plugin.report.page").joinpath("style.css").read_text(encoding="utf-8")
    first, *others = [_section(one) for one in shown]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(printable(title))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n<nav>{links}</nav>\n{first}\n" + "\n".join(others) + "\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    figures = "\n".join(figure(plot) for plot in section.shown)
    grid = f'<div class="figures">\n{figures}\n</div>' if figures else ""
    parts = [paragraph(section.intro), grid, *section.blocks]
    body = "\n".join(part for part in parts if part)
    return f'<section id="{section.anchor}">\n<h2>{html.escape(printable(section.title))}</h2>\n{body}\n</section>'


def _width(cell: object) -> str:
    """Short texts and names stay on one line, long ones get room."""
    shown = str(cell)
    return "s" if len(shown) <= (20 if " " in shown else 46) else "l"


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
