"""A run that is told to stop saves, lets the old handler answer, and goes on later without a trace of the stop.

    python -m tests.test_stop_signals FOLDER CASE

stops a run by each of the five signals in turn; processes are forked there, and not from the tests' own process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open

import dual_policy_plugin.stop_signals as stop_signals
import dual_policy_plugin.train as program
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.run_state import Counters
from dual_policy_plugin.stop_signals import SIGNALS, StopSignals
from dual_policy_plugin.train import train
from tests.ranks.scripts import TRAIN, run_ranks

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DUAL = "trainer.dual_policy"
NUM_ITERATIONS = 18
"""In the pool the last three see snapshot-12 leave, whose checkpoint stays until the end."""
SMALL = (
    "device=cpu", "wandb=off", "agent.hidden_size=16", "env.num_envs=8", "env.episode_steps=12", "evals.episodes=8",
    "trainer.horizon=8", "trainer.threads=1", "trainer.num_minibatches=2", "trainer.checkpoint_interval=5",
    "report=false",
    "trainer.keep_checkpoints=1", f"trainer.total_timesteps={NUM_ITERATIONS * 8 * 8 * 4}",
)  # fmt: skip
CASES = {
    "recurrent": ["+dual_policy=checkpoint", f"{DUAL}.checkpoint_npc.uri=builtin://arena/weak"],
    "pool": [
        "+dual_policy=self_play", f"{DUAL}.self_play.window=1", f"{DUAL}.self_play.snapshot_interval=3",
        f"{DUAL}.pool=[builtin://arena/weak,builtin://arena/random]", f"{DUAL}.matchmaking=pfsp",
    ],
    "schedule": [
        "+dual_policy=checkpoint", f"{DUAL}.checkpoint_npc.uri=builtin://arena/weak", f"{DUAL}.pct_schedule.type=steps",
        f"{DUAL}.pct_schedule.at=[1000,2000]", f"{DUAL}.pct_schedule.values=[0.25,0.75]",
    ],
}  # fmt: skip
"""A recurrent NPC; a pool that follows the payoffs, with snapshots that leave it; a share that changes twice."""


def run_until(folder: Path, case: str, at: int = 0, signums: tuple[int, ...] = ()) -> None:
    """Runs or continues folder/<case>; at the end of the rollout of iteration `at` the process gets the signals."""
    config, text = compose_config([*CASES[case], *SMALL, f"train_dir={folder}", f"run={case}"])
    whole = program.iteration_figures

    def noting(counters: Counters, *args: Any) -> Any:
        figures = whole(counters, *args)
        if counters.iteration == at:
            for signum in signums:
                os.kill(os.getpid(), signum)
        return figures

    program.iteration_figures = noting
    try:
        train(config, resolved_yaml=text)
    finally:
        program.iteration_figures = whole


def saved_iteration(run: Path) -> int:
    return state_of(run)["counters"]["iteration"]


def state_of(run: Path) -> dict[str, Any]:
    """All of a run's state: the digest of each tensor, counters, roster."""
    with safe_open(run / "state/training.safetensors", "np") as file:
        state: dict[str, Any] = json.loads(file.metadata()["run"])
        tensors = {key: hashlib.sha256(file.get_tensor(key).tobytes()).hexdigest() for key in file.keys()}  # noqa: SIM118
    return state | tensors


def traces(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for times: names and digests of its files, state, result."""
    left: dict[str, Any] = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*run.glob("checkpoints/*"), run / "metrics.jsonl", run / "state/checkpoints.json"]
    }
    result = json.loads((run / "result.json").read_bytes())
    del result["elapsed_s"]
    return left | state_of(run) | result


def stop_in_turn(folder: Path, case: str) -> None:
    """Prints, for each of the five signals: its number, the iteration it came in, how the process ended, what it saved;
    then a run that was never stopped."""
    order = random.Random(case)
    signums = order.sample([*SIGNALS, signal.SIGKILL], 5)
    moments = sorted(order.sample(range(2, NUM_ITERATIONS), 5))
    for signum, at in zip(signums, moments, strict=True):
        child = os.fork()
        if child == 0:
            try:
                run_until(folder / "stopped", case, at, (signum,))
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("STOP", int(signum), at, code, saved_iteration(folder / "stopped" / case), flush=True)
    run_until(folder / "stopped", case)
    run_until(folder / "whole", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_five_stops_leave_no_trace(tmp_path: Path, case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_stop_signals", tmp_path, case],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    stops = [[int(word) for word in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("STOP")]
    assert {signum for signum, *_ in stops} == {*SIGNALS, signal.SIGKILL}
    before = 0
    for signum, at, code, saved in stops:
        assert code == (130 if signum == signal.SIGINT else -signum)
        if signum == signal.SIGKILL:
            assert before <= saved < at
        else:
            assert saved == at
        before = saved
    assert any(at % 5 and signum != signal.SIGKILL for signum, at, *_ in stops)
    whole, stopped = (traces(tmp_path / folder / case) for folder in ("whole", "stopped"))
    assert stopped == whole
    assert len((tmp_path / "stopped" / case / "metrics.jsonl").read_text().splitlines()) == whole["iterations"]


class Answered(Exception):  # noqa: N818
    """Raised by a handler that a test put there before the run."""


@pytest.fixture
def handlers() -> Iterator[Callable[[Callable[[int, FrameType | None], None]], None]]:
    """Sets one handler for all signals; afterwards those are back that there were."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def put(handler: Callable[[int, FrameType | None], None]) -> None:
        for signum in SIGNALS:
            signal.signal(signum, handler)

    yield put
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_stop_between_checkpoints_leaves_no_trace(tmp_path: Path, handlers: Any) -> None:
    seen: list[tuple[int, int]] = []

    def raising(signum: int, frame: FrameType | None) -> None:
        seen.append((signum, saved_iteration(tmp_path / "stopped/pool")))
        assert signal.getsignal(signum) is raising
        raise Answered

    handlers(raising)
    for signum, at in ((signal.SIGUSR2, 2), (signal.SIGTERM, 7), (signal.SIGUSR1, 17)):
        with pytest.raises(Answered):
            run_until(tmp_path / "stopped", "pool", at, (signum,))
        assert seen[-1] == (signum, at)
        names = {path.name for path in (tmp_path / "stopped/pool/checkpoints").iterdir()}
        assert f"model_{at:04d}.safetensors" not in names
    run_until(tmp_path / "stopped", "pool")
    run_until(tmp_path / "whole", "pool")
    assert traces(tmp_path / "stopped/pool") == traces(tmp_path / "whole/pool")
    assert all(signal.getsignal(signum) is raising for signum in SIGNALS)


def test_a_handler_that_returns_lets_the_run_go_on(tmp_path: Path, handlers: Any) -> None:
    seen: list[int] = []

    def bypass(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)

    handlers(bypass)
    run_until(tmp_path / "asked", "recurrent", 3, (signal.SIGTERM, signal.SIGUSR2))
    assert seen == [signal.SIGUSR2, signal.SIGTERM]  # the scheduler's warning first
    assert all(signal.getsignal(signum) is bypass for signum in SIGNALS)
    run_until(tmp_path / "whole", "recurrent")
    assert traces(tmp_path / "asked/recurrent") == traces(tmp_path / "whole/recurrent")


def test_a_stop_in_the_last_iteration_comes_before_the_evaluation(tmp_path: Path, handlers: Any) -> None:
    def raising(signum: int, frame: FrameType | None) -> None:
        raise Answered

    handlers(raising)
    run = tmp_path / "recurrent"
    with pytest.raises(Answered):
        run_until(tmp_path, "recurrent", NUM_ITERATIONS, (signal.SIGUSR1,))
    assert saved_iteration(run) == NUM_ITERATIONS
    assert not (run / "result.json").exists()
    run_until(tmp_path, "recurrent")
    assert json.loads((run / "result.json").read_bytes())["evals"][0]["episodes"] == 8


@pytest.fixture
def listening(handlers: Any) -> Iterator[tuple[StopSignals, list[int]]]:
    """Signals that are listened to, and those that the old handler got."""
    seen: list[int] = []
    handlers(lambda signum, frame: seen.append(signum))
    with StopSignals(30.0) as signals:
        signals.listen()
        yield signals, seen


def test_a_signal_waits_for_the_iterations_end(listening: tuple[StopSignals, list[int]]) -> None:
    signals, seen = listening
    signal.raise_signal(signal.SIGTERM)
    assert (seen, signals.asked(Ranks(), CPU)[0]) == ([], [signal.SIGTERM])
    signals.answer([signal.SIGTERM], 1, Ranks(), CPU)
    assert (seen, signals.asked(Ranks(), CPU)[0]) == ([signal.SIGTERM], [])
    signal.raise_signal(signal.SIGTERM)  # it listens again
    assert seen == [signal.SIGTERM]


def test_what_comes_too_late_for_the_loop_is_not_lost(listening: tuple[StopSignals, list[int]]) -> None:
    signals, seen = listening
    signal.raise_signal(signal.SIGINT)
    signals.release()
    assert seen == [signal.SIGINT]
    signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT] * 2


def test_an_impatient_second_signal_is_answered_at_once_and_a_copy_is_not(
    listening: tuple[StopSignals, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, seen = listening
    for _ in range(3):  # of a process group and its launcher
        signal.raise_signal(signal.SIGINT)
    assert seen == []
    monkeypatch.setattr(stop_signals, "_AGAIN_S", 0.0)
    time.sleep(0.001)
    signal.raise_signal(signal.SIGUSR1)  # another kind waits
    assert seen == []
    signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT]
    assert signals.asked(Ranks(), CPU)[0] == [signal.SIGUSR1, signal.SIGINT]


def test_ignored_signals_stay_ignored(handlers: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals(30.0) as signals:
        signals.listen()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signals._note
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_thread_hears_nothing() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    found: list[Any] = []

    def work() -> None:
        with StopSignals(30.0) as signals:
            signals.listen()
            found.append([signal.getsignal(signum) for signum in SIGNALS])
            signals.release()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_default_action_follows_when_all_is_closed_and_may_be_void(handlers: Any) -> None:
    """The first process of a container is spared by it; here the signal is blocked."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    pending: list[bool] = []

    def stop() -> None:
        with StopSignals(30.0) as signals:
            signals.listen()
            try:
                signals.answer([signal.SIGUSR1], 1, Ranks(), CPU)
            finally:
                pending.append(signal.SIGUSR1 in signal.sigpending())

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with pytest.raises(SystemExit) as leaving:
            stop()
        assert leaving.value.code == 128 + signal.SIGUSR1
        assert pending == [False]
        assert signal.SIGUSR1 in signal.sigpending()
    finally:
        if signal.SIGUSR1 in signal.sigpending():
            signal.sigwait({signal.SIGUSR1})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


@pytest.mark.parametrize("grace_s", [0.01, 30.0])
def test_a_stop_that_took_longer_than_its_grace_says_so(
    handlers: Any, caplog: pytest.LogCaptureFixture, grace_s: float
) -> None:
    handlers(lambda signum, frame: None)
    with StopSignals(grace_s) as signals, caplog.at_level(logging.WARNING):
        signals.listen()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.02)
        signals.answer([signal.SIGTERM], 1, Ranks(), CPU)
    lines = [record.getMessage() for record in caplog.records]
    if grace_s == 30.0:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith("SIGTERM: the iteration and its save took 0.0 s, trainer.grace_s=0.01; lower env.num_")


def test_a_grace_that_is_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.grace_s=-1.0 is not possible; use a value from 0 to 86400"):
        compose_config([*CASES["recurrent"], "trainer.grace_s=-1"])


RANKS = """
import os, signal
import dual_policy_plugin.train as program
whole, rank = program.iteration_figures, os.environ["RANK"]
def noting(counters, *args):
    figures = whole(counters, *args)
    if counters.iteration == 3 and rank == "1":
        os.kill(os.getpid(), signal.{name})
    return figures
program.iteration_figures = noting
def master(signum, frame):
    raise SystemExit(75)
if {has_handlers}:  # of a launcher which requeues on the first rank, and waits on the others
    signal.signal(signal.{name}, master if rank == "0" else lambda signum, frame: None)
"""


@pytest.mark.slow
def test_all_ranks_stop_in_one_iteration_though_one_was_told(tmp_path: Path) -> None:
    told = RANKS.format(name="SIGTERM", has_handlers=False)
    done = run_ranks(told + TRAIN, str(tmp_path), "same", "8192")
    assert [process.returncode for process in done] == [-signal.SIGTERM] * 2, done
    assert saved_iteration(tmp_path / "two") == 3
    assert len((tmp_path / "two/metrics.jsonl").read_text().splitlines()) == 3
    told = RANKS.format(name="SIGUSR2", has_handlers=True).replace("== 3", "== 5")
    done = run_ranks(told + TRAIN, str(tmp_path), "same", "8192")
    assert [process.returncode for process in done] == [75, 128 + signal.SIGUSR2], done
    assert saved_iteration(tmp_path / "two") == 5
    done = run_ranks(TRAIN, str(tmp_path), "same", "8192")
    assert [process.returncode for process in done] == [0, 0], done
    steps = [
        json.loads(line)["charts/agent_step"] for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1024.0 * i for i in range(1, 9)]


WORKERS = """
import sys
from pathlib import Path
from dual_policy_plugin.config import *
from dual_policy_plugin.train import train
from tests.envs.toy_envs import make_sleepy
config = Config(run="walk", train_dir=Path(sys.argv[1]), device="cpu",
                env=EnvConfig(name="toy", num_envs=4, args={"seconds": 0.01}),
                trainer=TrainerConfig(total_timesteps=10**9, horizon=8, threads=1, num_minibatches=2,
                                      checkpoint_interval=1000, dual_policy=DualPolicyConfig()))
train(config, make_host=make_sleepy)
"""


def test_a_signal_to_all_processes_leaves_the_env_workers_to_the_run(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKERS, tmp_path],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        await_iterations(tmp_path / "walk", 3, program)
        whole = [*psutil.Process(program.pid).children(recursive=True), program]
        assert len(whole) == 3  # two workers
        for process in whole:  # as a cluster's scheduler does
            process.send_signal(signal.SIGTERM)
        _, stderr = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == -signal.SIGTERM, stderr
    num_lines = len((tmp_path / "walk/metrics.jsonl").read_text().splitlines())
    assert saved_iteration(tmp_path / "walk") == num_lines >= 3


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_the_command_ends_as_the_signal_wants_it(tmp_path: Path, signum: int, code: int) -> None:
    words = [*CASES["recurrent"], *SMALL, "run=live", f"train_dir={tmp_path}", "trainer.checkpoint_interval=1000"]
    program = subprocess.Popen(
        [sys.executable, "-m", "dual_policy_plugin", "train", *words, "trainer.total_timesteps=1000000000"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        await_iterations(tmp_path / "live", 3, program)
        program.send_signal(signum)
        _, stderr = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == code, stderr
    saved = saved_iteration(tmp_path / "live")
    assert f"{signal.Signals(signum).name}: saved after iteration {saved}\n" in stderr
    last = stderr.splitlines()[-1]
    if signum == signal.SIGINT:
        assert last == "interrupted; the same command continues the run from where it was stopped"
    assert "Traceback" not in stderr
    assert len((tmp_path / "live/metrics.jsonl").read_text().splitlines()) == saved >= 3


def await_iterations(run: Path, num_iterations: int, program: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < num_iterations:
        assert program.poll() is None, program.stderr and program.stderr.read()
        assert time.monotonic() < deadline, f"{run} did not come to iteration {num_iterations}"
        time.sleep(0.01)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is told to ignore it
    stop_in_turn(Path(sys.argv[1]), sys.argv[2])
