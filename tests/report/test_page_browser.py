"""The report in a real browser: it loads, fits a phone, follows the theme, and its curves are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from dual_policy_plugin.cli import main
from tests.browser import open_page, sideways_scroll, start_chromium
from tests.curriculum.test_status import STATE
from tests.report.made_runs import make_run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    yield from start_chromium()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The page of a run whose names are as long as they can be, and of a curriculum sweep."""
    folder = tmp_path_factory.mktemp("pages")
    long = "n" * 64
    run = make_run(folder / ("r" * 120), 60, npcs=[long, "weak"], config=f"run: {'r' * 300}\n")
    for num in range(9):
        make_run(folder / "s" / str(num), 20, seed=num)
    (folder / "s" / "curriculum.json").write_text(json.dumps(STATE))
    for one in (run, folder / "s"):
        assert main(["report", str(one)]) == 0
    return [run / "report.html", folder / "s" / "report.html"]


@pytest.mark.parametrize("which", [0, 1], ids=["run", "curriculum"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(chromium: Browser, pages: list[Path], which: int, width: int) -> None:
    with open_page(chromium, pages[which], width=width) as page:
        assert sideways_scroll(page) == 0
        assert page.locator("svg").count() >= 15
        for figure in page.locator("svg").all()[:4]:
            box = figure.bounding_box()
            assert box is not None
            assert box["width"] > 280
            assert box["height"] > 90
        sizes = page.evaluate(
            "[...document.querySelectorAll('figure:not(.small) text')].map(t => t.getBoundingClientRect().height)"
        )
        assert min(sizes) > 6
        links = [link.get_attribute("href") for link in page.locator("nav a").all()]
        assert len(links) >= 6
        assert all(page.locator(f"section{link}").count() == 1 for link in links)


def test_colors_follow_the_theme(chromium: Browser, pages: list[Path]) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        with open_page(chromium, pages[0], color_scheme=scheme) as page:
            paper, ink = (
                page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
            )
            curve = page.evaluate(
                "getComputedStyle(document.querySelector('#wins svg [style*=\"stroke: var(--c0)\"]')).stroke"
            )
            words = page.evaluate("getComputedStyle(document.querySelector('#wins svg text')).fill")
            assert words == ink
            seen[scheme] = (paper, ink, curve)
    assert seen["light"] == ("rgb(255, 255, 255)", "rgb(36, 41, 47)", "rgb(0, 114, 178)")
    assert seen["dark"] == ("rgb(18, 22, 27)", "rgb(227, 232, 238)", "rgb(79, 168, 224)")


def test_the_config_unfolds(chromium: Browser, pages: list[Path]) -> None:
    with open_page(chromium, pages[0], width=390) as page:
        assert not page.locator("pre").first.is_visible()
        page.locator("summary").first.click()
        assert page.locator("pre").first.is_visible()
        assert sideways_scroll(page) == 0
