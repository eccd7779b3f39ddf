"""The site builds without a warning and without a network, and every page is in its table of contents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_site_builds_and_has_every_page(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*build, "-b", "html", str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "html" / "index.html").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        html = (tmp_path / "html" / f"{page.stem}.html").read_text("utf-8")
        assert f'href="{page.stem}.html"' in index or page.stem == "index", f"{page.name} is in no table of contents"
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', html)
        assert loaded == [], f"{page.name} loads {loaded}"
