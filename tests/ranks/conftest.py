"""`run_ranks`: a program of `programs.py` on several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    out: str
    err: str
    at_s: float


RunRanks = Callable[..., list[Ended]]


@pytest.fixture(scope="session")
def nursery() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ranks.nursery"]
    with subprocess.Popen(
        command, cwd=root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def run_ranks(nursery: subprocess.Popen[str], tmp_path: Path) -> RunRanks:
    """Runs `program(**args)` on `world` ranks in tmp_path, and gives how each ended."""

    def run(
        program: str, world: int, limit_s: float = 60.0, env: dict[str, str] | None = None, **args: Any
    ) -> list[Ended]:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        request = {
            "program": program, "world": world, "args": args, "cwd": str(tmp_path), "limit_s": limit_s, "env": env or {}
        }  # fmt: skip
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        return [Ended(**facts) for facts in json.loads(nursery.stdout.readline())]

    return run
