"""Fixtures with the loopback services. A conftest.py takes them by
`from tests.services.fixtures import s3_server, wandb_server  # noqa: F401`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer


@pytest.fixture
def wandb_server(tmp_path: Path) -> Iterator[WandbServer]:
    """An empty W&B service."""
    with WandbServer(tmp_path) as server:
        yield server


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An empty S3, to which this process's environment points."""
    with S3Server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
            monkeypatch.delenv(name.lower(), raising=False)
        yield server
