"""Foreign envs in worker processes behind the VecEnv protocol; everything a step reads or writes is shared memory.

Takes a function that makes one simulator; gives a `WorkerVecEnv`. Each of `num_workers` processes owns a contiguous
slice of the envs (`worker_process.py`). A step writes the actions into the shared block, sends every worker one byte
and waits for one byte from each: the kernel puts whoever waits to sleep, and tells either side when the other is gone.

Workers are fresh interpreters, not forks: a fork would copy CUDA handles and locked mutexes of torch's threads, and
`multiprocessing`'s spawn would run the user's script again and keep a helper process alive.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin import errors
from dual_policy_plugin.envs.host import HostSpec
from dual_policy_plugin.envs.shared_rows import create_memory, map_arrays
from dual_policy_plugin.envs.worker_process import (
    DONE,
    QUIT,
    RESET,
    STEP,
    Disconnected,
    receive_message,
    send_message,
    spec_from_json,
)
from dual_policy_plugin.errors import ConfigError, DualPolicyError, EnvError
from dual_policy_plugin.types import EnvSpec, StepResult

log = logging.getLogger(__name__)

STOP_S = 2.0  # how long a worker may take to leave before it is killed
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dual_policy_plugin.envs.worker_process import main; main(*map(int, sys.argv[2:]))"
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
QUIET = {  # unless the user's environment says otherwise
    "SDL_VIDEODRIVER": "dummy",
    "SDL_AUDIODRIVER": "dummy",
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    "METTAGRID_LOG_LEVEL": "WARNING",
}


def target_of(make: Callable[..., Any]) -> dict[str, str]:
    """How a worker finds the function `make` again: by module and name, or by the file of the started script."""
    module, qualname = getattr(make, "__module__", None), getattr(make, "__qualname__", "<none>")
    if module is None or "<" in qualname:
        raise ConfigError(f"make_host={make} is not a function at the top of a module; workers cannot import it")
    file = ""
    if module == "__main__":
        file = str(Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve())
        if not Path(file).is_file():
            raise ConfigError(f"make_host={qualname} was typed in; put it in a file, so that workers can import it")
    return {"module": module, "qualname": qualname, "file": file}


class WorkerVecEnv:
    """`num_envs` simulators in worker processes (a `types.VecEnv`).

    Where an env's first episode is staggered it is truncated at its phase, with a final observation, whatever the
    simulator knows of truncation: so `has_truncation` is always True here. Results do not depend on `num_workers`.
    """

    spec: EnvSpec

    def __init__(
        self,
        make: Callable[..., Any],
        args: dict[str, Any],
        *,
        name: str,
        num_envs: int,
        num_workers: int,
        device: torch.device | str = "cpu",
        first_env: int = 0,
    ) -> None:
        """Starts the workers and builds all envs.

        Args:
            make: `make(index, **args)`, at the top of a module; gives one env (see `adapt.as_host`).
            args: its keyword arguments, of JSON types.
            name: the env's name, for `spec` and messages.
            num_envs: how many envs.
            num_workers: how many processes; never more than envs.
            device: where observations are wanted and StepResult's tensors live.
            first_env: number of the first env here; seeds and `index` count from it.
        """
        target = target_of(make)
        num_workers = min(num_workers, num_envs)
        bounds = [num_envs * worker // num_workers for worker in range(num_workers + 1)]
        self._slices = list(itertools.pairwise(bounds))
        self._device = torch.device(device)
        self._workers: list[_Worker] = []
        memory_fd = create_memory()
        lifeline, self._lifeline_end = os.pipe()
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._lifeline_end, os.getpid())
        try:
            try:
                for start, end in self._slices:
                    self._workers.append(_start_worker(memory_fd, lifeline))
                    setup = {"target": target, "args": args, "name": name, "num_envs": num_envs, "start": start}
                    self._send_setup(setup | {"first_env": first_env + start, "count": end - start})
            finally:
                os.close(lifeline)
            host_spec = self._agreed_spec(name)
            arrays = map_arrays(memory_fd, host_spec, num_envs, resize=True)
            for worker in self._workers:
                worker.connection.sendall(DONE)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory_fd)
        self._shared = {key: torch.from_numpy(array) for key, array in arrays.items()}
        self.spec = _env_spec(host_spec, name, num_envs)
        self._local = self._shared if self._device.type == "cpu" else _copies(self._shared, self._device)
        self._result = self._make_result()
        self._known_seats: deque[tuple[Tensor, slice | Tensor]] = deque(maxlen=8)

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        """Starts episode 0 in every env; with `stagger` env i's is cut after (i + 1) / num_envs of the longest one."""
        self._order(RESET, {"seed": seed, "stagger": stagger})

    def step(self, actions: Tensor) -> StepResult:
        """Steps all envs with `actions` (num_envs, num_agents) int64; an env that ended begins its next episode."""
        self._shared["actions"].copy_(actions)
        self._order(STEP, None)
        if self._local is not self._shared:
            for key, tensor in self._local.items():
                tensor.copy_(self._shared[key])
        return self._result

    def observe(self, seats: Tensor, out: Tensor) -> None:
        """Writes the observations of `seats` (num_seats,) into `out` (num_envs * num_seats, *shape), env-major."""
        observations, columns = self._shared["observations"], self._columns(seats)
        shape = (self.spec.num_envs, seats.shape[0], *self.spec.observation_space.shape)
        if isinstance(columns, slice) or out.device.type != "cpu":
            out.view(shape).copy_(observations[:, columns])
        else:
            torch.index_select(observations, 1, columns, out=out.view(shape))

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        """Writes the final observations of rows that the last step truncated; other rows of `out` stay."""
        columns = self._columns(seats)
        is_truncated = self._shared["truncated"][:, columns]  # (num_envs, num_seats)
        if not is_truncated.any():
            return
        env, seat = is_truncated.nonzero(as_tuple=True)
        final = self._shared["final_observations"][:, columns][env, seat]
        out[(env * seats.shape[0] + seat).to(out.device)] = final.to(out.device)

    def _columns(self, seats: Tensor) -> slice | Tensor:
        """`seats` as an index of the shared block: a slice where they are a range. Remembered: callers keep theirs."""
        for known, columns in self._known_seats:
            if known is seats:
                return columns
        numbers = seats.tolist()
        first = numbers[0] if numbers else 0
        is_range = numbers == list(range(first, first + len(numbers)))
        columns = slice(first, first + len(numbers)) if is_range else seats.cpu().clone()
        self._known_seats.append((seats, columns))
        return columns

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        self._finalizer()

    def _order(self, command: bytes, message: dict[str, Any] | None) -> None:
        """Gives all workers a command and waits for all; whatever goes wrong here ends every worker."""
        if not self._finalizer.alive:
            raise EnvError(f"env.name={self.spec.name} is closed; make a new env to step on")
        try:
            for index, worker in enumerate(self._workers):
                try:
                    worker.connection.sendall(command)
                    if message is not None:
                        send_message(worker.connection, message)
                except OSError:
                    raise self._death(index) from None
            for index in range(len(self._workers)):
                self._expect_done(index)
        except BaseException:
            self.close()
            raise

    def _send_setup(self, setup: dict[str, Any]) -> None:
        try:
            send_message(self._workers[-1].connection, setup)
        except TypeError as error:
            raise ConfigError(
                f"env.args={setup['args']} cannot be sent to a worker ({error}); use numbers, text, lists"
            ) from None
        except OSError:
            raise self._death(len(self._workers) - 1) from None

    def _agreed_spec(self, name: str) -> HostSpec:
        specs = []
        for index, worker in enumerate(self._workers):
            self._expect_done(index)
            specs.append(spec_from_json(receive_message(worker.connection)["spec"]))
            if specs[-1] != specs[0]:
                raise EnvError(f"env.name={name}: envs differ ({specs[-1]} and {specs[0]}); make every env alike")
        return specs[0]

    def _expect_done(self, index: int) -> None:
        """Waits for the worker's answer; raises what it raised, or that it died."""
        connection = self._workers[index].connection
        try:
            answer = connection.recv(1)
            if answer == DONE:
                return
            failure = receive_message(connection) if answer else None
        except (OSError, Disconnected):
            failure = None
        raise self._death(index) if failure is None else self._failure(index, failure)

    def _failure(self, index: int, failure: dict[str, Any]) -> DualPolicyError:
        kind = getattr(errors, failure["class"], None) if failure["class"] else None
        if kind is not None:
            error: DualPolicyError = kind(failure["text"])
            return error
        return EnvError(f"env worker {self._label(index)} raised:\n{failure['text'].rstrip()}")

    def _death(self, index: int) -> EnvError:
        worker = self._workers[index]
        try:
            code = worker.process.wait(STOP_S)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        size = os.fstat(worker.crash_fd).st_size
        crash = os.pread(worker.crash_fd, size, 0).decode(errors="replace").rstrip()
        return EnvError(f"env worker {self._label(index)} {how}" + (f":\n{crash}" if crash else ""))

    def _label(self, index: int) -> str:
        start, end = self._slices[index]
        return f"{index} (envs {start} to {end - 1})"

    def _make_result(self) -> StepResult:
        local = self._local
        return StepResult(
            rewards=local["rewards"],
            dones=local["dones"],
            episode_ends=local["episode_ends"][:, 0],
            truncated=local["truncated"],
            weights=local["weights"] if self.spec.has_weights else None,
            counters=local["counters"] if self.spec.counters else None,
        )


class _Worker:
    """A worker process, the socket to it, and the anonymous file its crash report goes to."""

    __slots__ = ("connection", "crash_fd", "process")

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, crash_fd: int) -> None:
        self.process, self.connection, self.crash_fd = process, connection, crash_fd


def _start_worker(memory_fd: int, lifeline: int) -> _Worker:
    connection, theirs = socket.socketpair()
    crash_fd = create_memory()
    fds = (theirs.fileno(), memory_fd, lifeline, crash_fd)
    command = [sys.executable, "-c", BOOT, json.dumps(sys.path), *map(str, fds), str(os.getpid())]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what an env prints must not run into the run's own output
            pass_fds=fds,
            env=QUIET | os.environ | ONE_THREAD,
            process_group=0,  # Ctrl-C reaches the parent only
        )
    except BaseException:
        connection.close()
        os.close(crash_fd)
        raise
    finally:
        theirs.close()
    return _Worker(process, connection, crash_fd)


def _stop(workers: list[_Worker], lifeline_end: int, owner: int) -> None:
    """Asks all workers to leave, then makes them; leaves no process and no descriptor. Not in a fork of the owner."""
    if os.getpid() != owner:
        return
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.connection.sendall(QUIT)
            worker.connection.shutdown(socket.SHUT_WR)  # also ends a worker that waits for its setup
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(STOP_S)
    os.close(lifeline_end)
    for worker in workers:
        try:
            worker.process.wait(STOP_S / 4)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.connection.close()
        os.close(worker.crash_fd)


def _env_spec(host: HostSpec, name: str, num_envs: int) -> EnvSpec:
    return EnvSpec(
        name=name,
        num_envs=num_envs,
        num_agents=host.num_agents,
        observation_space=host.observation_space,
        actions=host.actions,
        max_episode_steps=host.max_episode_steps,
        has_truncation=True,
        has_weights=host.has_weights,
        counters=host.counters,
    )


def _copies(shared: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Device copies of what StepResult shows."""
    keys = ("rewards", "dones", "truncated", "weights", "counters", "episode_ends")
    return {key: torch.empty_like(shared[key], device=device) for key in keys}
