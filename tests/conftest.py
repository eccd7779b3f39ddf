"""One torch thread a test process (two of them share a small machine), and a policy cache of the tests' own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what tests fetch out of the user's cache."""
    before = os.environ.get("DUAL_POLICY_CACHE")
    os.environ["DUAL_POLICY_CACHE"] = str(tmp_path_factory.mktemp("policy-cache"))
    yield
    if before is None:
        del os.environ["DUAL_POLICY_CACHE"]
    else:
        os.environ["DUAL_POLICY_CACHE"] = before
