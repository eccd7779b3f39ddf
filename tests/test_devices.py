"""Which device a run takes and when it gives its graphs back, on machines that this one only pretends to be."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dual_policy_plugin import parts
from dual_policy_plugin.cuda_graph import CapturedCall
from dual_policy_plugin.errors import ConfigError
from tests.harness import MemoryTask, make_loop


@pytest.mark.parametrize(
    ("count", "local_rank", "index"),
    [(1, 0, 0), (4, 0, 0), (4, 3, 3), (1, 3, 0)],  # the last: each process was given a GPU of its own
)
def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    asked: list[Any] = []
    monkeypatch.setattr(parts.torch, "zeros", lambda *_, device: asked.append(device))
    for name in ("auto", "cuda"):
        assert parts.choose_device(name, local_rank=local_rank) == torch.device("cuda", index)
    assert parts.choose_device("cuda:0", local_rank=local_rank) == torch.device("cuda", 0)
    assert len(asked) == 3


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parts.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda is not there, torch sees 0 CUDA devices"):
        parts.choose_device("cuda")


def test_a_released_update_holds_no_graph() -> None:
    """NCCL's communicator cannot be destroyed while a recorded all-reduce exists, and would wait for ever."""
    loop = make_loop(MemoryTask(4, 2))
    order: list[str] = []
    call: Any = CapturedCall.__new__(CapturedCall)
    call._graph, call._result = SimpleNamespace(reset=lambda: order.append("reset")), {}
    loop.ppo._captured = call
    with ExitStack() as stack:
        stack.callback(lambda: order.append("ranks part"))
        stack.callback(loop.ppo.release)
    assert order == ["reset", "ranks part"]
    assert loop.ppo._captured is None
    assert call._graph is None
    assert call._result is None
