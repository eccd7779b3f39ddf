"""A curriculum sweep that is told to stop in the middle of its jobs saves them and goes on in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dual_policy_plugin import train as program
from dual_policy_plugin.cli import main
from dual_policy_plugin.run_state import Counters, decode_state
from tests.curriculum.drill import differences
from tests.curriculum.sweeps import FORAGER, RANDOM, sweep_words
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were

NUM_ITERATIONS = 6
STOPS = ((signal.SIGTERM, 0, 2), (signal.SIGUSR1, 1, 5), (signal.SIGUSR2, 2, 1))
"""Signal, job and iteration in which it comes; no checkpoint is made between the first and the last iteration."""


class Stopped(BaseException):
    """Raised by the handler that was there before the run, as a launcher's that ends the process."""


@pytest.fixture
def stopping() -> Iterator[None]:
    """Each signal ends what runs."""
    before = {signum: signal.getsignal(signum) for signum, *_ in STOPS}

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    for signum in before:
        signal.signal(signum, stop)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.slow
def test_three_signals_leave_no_trace_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: None
) -> None:
    words = sweep_words(
        Path("train_dir"), f"[{RANDOM},{FORAGER}]", f"trainer.total_timesteps={NUM_ITERATIONS * 256}", "env.num_envs=8"
    )
    real = program.iteration_figures
    played: list[tuple[str, int]] = []

    def run(folder: Path, signum: int = 0, job: int = -1, at: int = 0) -> int:
        def noting(counters: Counters, *args: Any) -> Any:
            figures = real(counters, *args)
            now = max(folder.glob("train_dir/s/*/run.lock"), key=lambda path: int(path.parent.name)).parent.name
            played.append((now, counters.iteration))
            if (now, counters.iteration) == (str(job), at):
                os.kill(os.getpid(), signum)
            return figures

        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(program, "iteration_figures", noting)
        return main(words)

    peace, stopped = tmp_path / "peace", tmp_path / "stopped"
    assert run(stopped) == 1  # the second stage is not passed
    stopped.rename(peace)  # both run at one path, since paths stand in their files
    all_played = list(played)
    assert all_played == [(str(job), i) for job in range(3) for i in range(1, NUM_ITERATIONS + 1)]
    played.clear()
    for signum, job, at in STOPS:
        with pytest.raises(Stopped) as stop:
            run(stopped, signum, job, at)
        assert stop.value.args == (signum,)
        state = (stopped / f"train_dir/s/{job}/state/training.safetensors").read_bytes()
        assert decode_state(state, "state").counters.iteration == at
        assert not (stopped / f"train_dir/s/{job}/checkpoints/model_{at:04d}.safetensors").exists()
    assert run(stopped) == 1
    assert played == all_played  # nothing was done twice
    assert differences(peace / "train_dir/s", stopped / "train_dir/s") == []
