"""One torch thread a test process (two of them share a small machine), no GPU, and a policy cache of the tests' own."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.harness import logging_as_it_was

torch.set_num_threads(1)

GPU_CHECKS = "gpu_checks.py"


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs: kernels are interpreted on CPU tensors here, and subprocesses inherit the interpreter's switch.

    And takes SIGINT, which programs that tests start would else be born deaf to.

    The checks that need a GPU (`tests/gpu`) are run by their file's name, and see it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job is told to ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not any(Path(argument.partition("::")[0]).name == GPU_CHECKS for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when CUDA is first asked for


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Leaves no handler of a test's, nor of a fixture that was made for a whole module, in the root logger."""
    with logging_as_it_was():
        return (yield)


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
