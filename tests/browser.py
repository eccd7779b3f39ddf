"""A page in a real headless Chromium, for tests of what we write as HTML.

@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    yield from start_chromium()

with open_page(chromium, path) as page:
    assert page.locator("h1").text_content() == "..."
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def start_chromium() -> Iterator[Browser]:
    """The system's Chromium, for a fixture to yield from; the test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(NAMES)} on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, path: Path, *, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Page]:
    """The file in a window of its own; nothing may have been said on the console in the end, nor anything but files
    asked for.

    Args:
        browser: of `start_chromium`.
        path: the HTML file.
        width, height: of the window, in CSS pixels.
        options: of playwright's `new_context`, for example color_scheme="dark", has_touch=True.
    """
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.resolve().as_uri())
        yield page
        assert not said, f"said on the console: {said}"
        outside = [url for url in asked if not url.startswith(("file://", "data:"))]
        assert not outside, f"asked for {outside}"
    finally:
        context.close()


def sideways_scroll(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
