"""Which device a run takes and when it gives its graphs back, on machines that this one only pretends to be."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dual_policy_plugin import devices
from dual_policy_plugin.cuda_graph import WARM_UPS, CapturedCall
from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.rollout.captured import choose_play
from tests.harness import MemoryTask, make_loop


@pytest.mark.parametrize(
    ("count", "local_rank", "index"),
    [(1, 0, 0), (4, 0, 0), (4, 3, 3), (1, 3, 0)],  # the last: each process was given a GPU of its own
)
def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    asked: list[Any] = []
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(devices.torch, "zeros", lambda *_, device: asked.append(device))
    for name in ("auto", "cuda"):
        assert devices.choose_device(name, local_rank=local_rank) == torch.device("cuda", index)
    assert devices.choose_device("cuda:0", local_rank=local_rank) == torch.device("cuda", 0)
    assert len(asked) == 3
    assert current == [index, index, 0]  # kernels are launched on the current one


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda is not there, torch sees 0 CUDA devices"):
        devices.choose_device("cuda")


def test_a_released_update_holds_no_graph() -> None:
    """NCCL's communicator cannot be destroyed while a recorded all-reduce exists, and would wait for ever."""
    loop = make_loop(MemoryTask(4, 2))
    order: list[str] = []
    calls: list[Any] = [CapturedCall.__new__(CapturedCall) for _ in range(2)]  # one for each share of learners
    for call in calls:
        call._graph, call._result = SimpleNamespace(reset=lambda: order.append("reset")), {}
    loop.ppo._captured = [(loop.experience, call) for call in calls]
    with ExitStack() as stack:
        stack.callback(lambda: order.append("ranks part"))
        stack.callback(loop.ppo.release)
    assert order == ["reset", "reset", "ranks part"]
    assert loop.ppo._captured == []
    assert [(call._graph, call._result) for call in calls] == [(None, None)] * 2


def test_a_gpu_without_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        ConfigError, match=r"trainer\.fused=true needs the package triton.*; pip install triton, or use"
    ):
        devices.check_triton()


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        """Refuses as CUDA does where the recorded code asks the device."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    fakes = {"Stream": SimpleNamespace, "CUDAGraph": SimpleNamespace, "graph": lambda *_, **__: Graph()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    call = CapturedCall(lambda: None, "the rollout")
    call._num_calls = WARM_UPS
    with pytest.raises(RunError, match=r"trainer\.fused=true: the rollout cannot be recorded .*capturing\); use false"):
        call()


def test_the_log_says_how_a_rollout_is_played() -> None:
    loop = make_loop(MemoryTask(2, 2))
    play, how = choose_play(loop.env, loop.mixed, loop.experience, loop.metrics, fused=True)
    assert how == "plain torch"
    play(loop.mixed.random_numbers(1, 0, loop.experience.horizon))
    assert loop.experience.dones.any()
