"""What ranks do in the tests: a small arena run, with a rank that fails or takes long at a named moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import dual_policy_plugin.train as program
from dual_policy_plugin import heartbeat
from dual_policy_plugin.config import (
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
)
from dual_policy_plugin.errors import ConfigError, DualPolicyError
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.learning.ppo import PpoUpdate
from dual_policy_plugin.pool_config import MatchmakingConfig, SelfPlayConfig
from dual_policy_plugin.ranks import distributed
from dual_policy_plugin.ranks import watch as rank_watch
from dual_policy_plugin.ranks.distributed import join_ranks, open_group
from dual_policy_plugin.ranks.variables import find_ranks
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.share_schedule import ShareSchedule
from dual_policy_plugin.stop_signals import StopSignals
from tests.harness import MemoryTask, make_loop

MOMENTS: dict[str, tuple[Any, str]] = {
    "choosing a device": (program, "choose_device"),
    "building": (program, "build_parts"),
    "rollout": (MixedPolicy, "random_numbers"),
    "update": (PpoUpdate, "_step"),
    "asking": (StopSignals, "asked"),
    "evaluating": (program, "_evaluate"),
    "saving": (RunDirectory, "save_state"),
}
"""Where each moment is met: an object and the name of its function."""
ONCE = ("choosing a device", "building")
ITERATION = 8 * 4 * 8
"""Learner steps of an iteration: envs of all ranks, learners, horizon."""


def small_config(**changes: Any) -> Config:
    """A run on 8 envs of 8 agents, 4 of them learners; `changes` are of the trainer, or one of those popped here."""
    num_envs, episodes = changes.pop("num_envs", 4), changes.pop("episodes", 0)
    npc = PolicySource(uri=f"builtin://arena/{changes.pop('npc', 'medium')}")
    dual = DualPolicyConfig(enabled=True, training_agents_pct=0.5, npc=npc)
    if changes.pop("pool", False):  # of three kinds, with snapshots of the learner, and a share that changes on the way
        dual = replace(
            dual,
            pool=[PolicySource(name=name, uri=f"builtin://arena/{name}") for name in ("random", "forager")],
            matchmaking=MatchmakingConfig(type="pfsp"),
            self_play=SelfPlayConfig(snapshot_interval=2, window=2),
            pct_schedule=ShareSchedule(type="linear", end=0.75),
        )
    trainer = {
        "total_timesteps": 4 * ITERATION, "horizon": 8, "threads": 1, "num_minibatches": 1, "checkpoint_interval": 1,
        "precision": "fp32",
    }  # fmt: skip
    return Config(
        run="several",
        train_dir=Path("runs"),
        device="cpu",
        env=EnvConfig(num_envs=num_envs, args={"episode_steps": 16}),
        evals=EvalsConfig(episodes=episodes),
        report=False,
        trainer=TrainerConfig(**(trainer | changes), dual_policy=dual),
    )


def train(**changes: Any) -> None:
    """A whole run; its result, or an empty dict, on stdout. No thread of the job stays."""
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(program.train(small_config(**changes), resolved_yaml="several: true\n")))
    until = time.monotonic() + 2.0
    while "gloo" in " ".join(system_threads()) and time.monotonic() < until:
        time.sleep(0.01)  # the system lists a thread for a moment after it has been joined
    assert not any("gloo" in name for name in system_threads()), system_threads()
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]


def system_threads() -> list[str]:
    """The names of this process's threads, those of libraries included."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended since
            names.append(path.read_text().strip())
    return names


def loop() -> None:
    """Three iterations of a small env that differs by rank; what each rank has then, as JSON on stdout."""
    ranks = find_ranks()
    with join_ranks(ranks):
        open_group(ranks, "cpu")
        made = make_loop(MemoryTask(8, 4, delay=2), split=assign(4, 0.5), ranks=ranks)
        made.env.reset(7 + ranks.rank, stagger=True)
        figures = [made.iterate(1e-2) for _ in range(3)]
    parameters = made.ppo.parameters
    facts = {"grad": parameters.grad.tolist(), "flat": parameters.flat.tolist(), "figures": figures}
    print(json.dumps(facts | {"rewards": float(made.experience.rewards.sum())}))


def other_npc(**changes: Any) -> None:
    """A run in which the second rank's config names another NPC."""
    train(npc="random" if os.environ["RANK"] == "0" else "forager", **changes)


def note_start(**changes: Any) -> None:
    """A run that says what its policy and optimizer are when its first update begins."""
    inner, noted = PpoUpdate.update, []

    def update(self: PpoUpdate, *args: Any) -> Any:
        if not noted:
            state = {"flat": self.parameters.flat.data, **self.adam_state()}
            noted.append({name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()})
            print("start:", json.dumps(noted[0] | {"step": float(state["step"])}), flush=True)
        return inner(self, *args)

    PpoUpdate.update = update  # type: ignore[method-assign]
    train(**changes)


def twice(**changes: Any) -> None:
    """Two runs of one process, as in a sweep: the ranks part and meet again; the second run continues the first."""
    train(total_timesteps=2 * ITERATION, **changes)
    train(total_timesteps=4 * ITERATION, **changes)


def poison(**changes: Any) -> None:
    """A run in which the second rank is paid something that is no number, in the second iteration."""
    inner, met = PpoUpdate.update, []

    def update(self: PpoUpdate, experience: Experience, *args: Any) -> Any:
        met.append(1)
        if os.environ["RANK"] == "1" and len(met) == 2:
            experience.rewards[0, 0] = float("nan")
        return inner(self, experience, *args)

    PpoUpdate.update = update  # type: ignore[method-assign, assignment]
    train(**changes)


def fail(
    how: str,
    moment: str,
    rank: int,
    at: int = 2,
    hold: str = "",
    limits: dict[str, float] | None = None,
    **changes: Any,
) -> None:
    """A run in which a rank ends when it meets `moment` for the `at`-th time.

    Rank 0 takes 60 s at the moment `hold`; `limits` are other times than those of ranks/watch.py.
    """
    for name, seconds in (limits or {}).items():
        assert hasattr(rank_watch, name)
        setattr(rank_watch, name, seconds)
    if int(os.environ["RANK"]) == rank:
        at_time(at, moment, ENDS[how])
    elif hold and os.environ["RANK"] == "0":
        at_time(2, hold, lambda: time.sleep(60.0))
    train(**changes)


def at_time(number: int, moment: str, action: Callable[[], None]) -> None:
    """Has `action` called when the process meets `moment` for that time, before what it does there."""
    owner, name = MOMENTS[moment]
    inner, met = getattr(owner, name), 0

    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        met += 1
        if met == (1 if moment in ONCE else number):
            action()
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def _raise_value() -> None:
    raise ValueError("a defect")


def _raise_mistake() -> None:
    raise ConfigError("trainer.colour=blue is no colour; use red")


ENDS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(9),
    "raises": _raise_value,
    "mistaken": _raise_mistake,
    "asked to stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def hang(rank: int, wait_s: float, **changes: Any) -> None:
    """A run in which a rank lives on and never comes to an update; the others wait `wait_s` for it."""
    distributed._COLLECTIVE_TIMEOUT = timedelta(seconds=wait_s)
    if int(os.environ["RANK"]) == rank:
        at_time(2, "update", lambda: time.sleep(60.0))
    train(**changes)


def evaluate_long(seconds: float, **changes: Any) -> None:
    """A run whose first evaluation takes that long; prints the longest time in which this rank gave no sign of life."""
    os.environ[heartbeat.VARIABLE] += os.environ["RANK"]
    begun, touch, touched = time.monotonic(), os.utime, []

    def note(path: str) -> None:
        touched.append(time.monotonic())
        touch(path)

    def evaluate() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            heartbeat.beat()
            time.sleep(0.05)

    os.utime = note  # type: ignore[assignment]
    at_time(1, "evaluating", evaluate)
    train(**changes)
    print(max(second - first for first, second in pairwise([begun, *touched, time.monotonic()])))


def come_late(rank: int, wait_s: float) -> None:
    """All ranks but one, which never comes, wait for it for `wait_s`."""
    ranks = find_ranks()
    if ranks.rank != rank:
        with join_ranks(ranks, wait_s=wait_s):
            print("joined")


if __name__ == "__main__":  # of a real torchrun: the program's name and its arguments as JSON
    try:
        globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    except DualPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
