"""Mutated policy files: no crash, no hang, little memory, and each refused for what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from typing import Any

import pytest

from tests.security.mutations import KINDS, make_policy_file, mutations, valid


def fuzz(*words: str) -> dict[str, Any]:
    """What a child process measured that loaded mutated files; it is red where it crashed or saw anything wrong."""
    command = [sys.executable, "-m", "tests.security.fuzz", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.mark.slow
def test_a_thousand_mutations_are_refused() -> None:
    figures = fuzz("--count", "1000")
    assert figures["count"] == 1000
    assert figures["problems"] == 0
    assert len(figures["kinds"]) == len(KINDS) + 1
    assert figures["kinds"]["truncations"] >= 90
    assert figures["most_mib_over_twice_the_file"] < 16
    assert figures["slowest_s"] < 5


@pytest.mark.slow
def test_large_files_take_no_more_than_twice_their_size() -> None:
    """A file of 27 MB: a copy too many would be seen."""
    figures = fuzz("--count", "23", "--hidden-size", "2304")
    assert figures["file_bytes"] > 20e6
    assert figures["problems"] == 0
    assert figures["most_mib_over_twice_the_file"] < 16


def test_the_mutations_are_the_same_every_time_and_all_different() -> None:
    first = [make() for _, make, _ in islice(mutations(3), 200)]
    assert first == [make() for _, make, _ in islice(mutations(3), 200)]
    assert len(set(first)) > 170
    assert valid() not in first
    assert len(make_policy_file().tensors) >= 6
