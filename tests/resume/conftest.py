"""The short run that is never killed, once for all tests here."""

from __future__ import annotations

import pytest

from tests.resume.reading import Peace
from tests.resume.runs import SHORT, note_run, peace_of


@pytest.fixture(scope="session")
def peace(tmp_path_factory: pytest.TempPathFactory) -> Peace:
    """What it left, and all that it wrote on its way."""
    work = tmp_path_factory.mktemp("peace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        return peace_of(work, note_run(work, SHORT, 0.0))
