"""The processes behind a `WorkerVecEnv`: starts them, gives orders, waits for answers, and ends them, however it ends.

An order is one byte to a worker (and a JSON message where it needs one), the answer is that byte back: the kernel puts
whoever waits to sleep, and tells either side when the other is gone.

The envs have two halves, and every worker has envs of both: an order may be for one half. So no worker is idle as long
as one half is being stepped and the other one's actions come in time.

Workers are fresh interpreters, not forks: a fork would copy CUDA handles and locked mutexes of torch's threads, and
`multiprocessing`'s spawn would run the user's script again and keep a helper process alive.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dual_policy_plugin import errors
from dual_policy_plugin.envs.host import HostSpec
from dual_policy_plugin.envs.shared_rows import Arrays, create_memory, map_arrays
from dual_policy_plugin.envs.worker_process import (
    DONE,
    FAILED,
    QUIT,
    Disconnected,
    receive_message,
    send_message,
    spec_from_json,
)
from dual_policy_plugin.errors import ConfigError, DualPolicyError, EnvError

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


def split_envs(num_envs: int, num_workers: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Per worker, (start, end) of its share of the first and of the second half of the envs.

    What is over in the first half goes to the first workers, in the second half to the last ones: so the shares of a
    half differ by at most one env, and so do their sums.
    """
    middle = num_envs // 2
    over = middle % num_workers, (num_envs - middle) % num_workers  # so many workers have one env more
    first = [middle // num_workers + (worker < over[0]) for worker in range(num_workers)]
    second = [(num_envs - middle) // num_workers + (worker >= num_workers - over[1]) for worker in range(num_workers)]
    bounds = list(itertools.accumulate(first, initial=0)), list(itertools.accumulate(second, initial=middle))
    return list(zip(*map(itertools.pairwise, bounds), strict=True))


class Crew:
    """Worker processes, each with some of the envs, and the memory that they share with this process.

    Attributes:
        halves: per worker, (start, end) of its envs in the first half of all and in the second; may be empty.
        spec: of every env.
        arrays: (num_envs, *shape per env) by field name; see `shared_rows`.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        args: dict[str, Any],
        *,
        name: str,
        env_numbers: Sequence[int],
        num_workers: int,
    ) -> None:
        """Starts the workers and builds all envs; arguments as for `WorkerVecEnv`."""
        target, num_envs = target_of(make), len(env_numbers)
        self.halves = split_envs(num_envs, num_workers)
        self._name = name
        self._workers: list[_Worker] = []
        self._messenger: ThreadPoolExecutor | None = None
        memory_fd = create_memory()
        lifeline, lifeline_end = os.pipe()
        self._endings: list[Callable[[], None]] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._endings, lifeline_end, os.getpid())
        try:
            try:
                setup = {"target": target, "args": args, "name": name, "num_envs": num_envs}
                setup["first_index"] = env_numbers[0]
                for halves in self.halves:
                    self._workers.append(_start_worker(memory_fd, lifeline))
                    numbers = [env_numbers[start:end] for start, end in halves]
                    self._send_setup(setup | {"halves": halves, "env_numbers": numbers})
            finally:
                os.close(lifeline)
            self.spec = self._agreed_spec()
            self.arrays: Arrays = map_arrays(memory_fd, self.spec, num_envs, resize=True)
            for worker in self._workers:
                worker.connection.sendall(DONE)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory_fd)

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        self._finalizer()
        if self._messenger is not None:
            self._messenger.shutdown(wait=False)

    def at_end(self, function: Callable[[], None]) -> None:
        """Has a function called when the workers are gone."""
        self._endings.append(function)

    def order(
        self,
        indices: list[int],
        command: bytes,
        message: dict[str, Any] | None = None,
        *,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Gives some workers a command; `wait` must follow before it is given again.

        Args:
            indices: of the workers.
            command: one of `worker_process`'s.
            message: what goes with it.
            after: if given, a thread gives the command once this returns, and the caller goes on at once.
        """
        if not self._finalizer.alive:
            raise EnvError(f"env.name={self._name} is closed; make a new env to step on")
        workers = [self._workers[index] for index in indices]
        assert not any(command in worker.orders for worker in workers), "a worker has not answered this command yet"
        told: Future[None] | None = None
        try:
            if after is None:
                _tell(workers, command, message)
            else:
                self._messenger = self._messenger or ThreadPoolExecutor(1, "env-orders")
                told = self._messenger.submit(_tell, workers, command, message, after)
            for worker in workers:
                worker.orders[command] = told
        except BaseException:
            self.close()
            raise

    def wait(self, indices: list[int], command: bytes) -> None:
        """Waits until these workers have carried out a command; whatever goes wrong here ends every worker."""
        try:
            for index in indices:
                worker = self._workers[index]
                if (told := worker.orders.pop(command)) is not None:
                    told.result()
                while command not in worker.answers:  # it may answer to another one first
                    worker.answers.add(self._answer(index))
                worker.answers.remove(command)
        except BaseException:
            self.close()
            raise

    def settle(self) -> None:
        """Waits for what an interrupted rollout has left under way."""
        for index, worker in enumerate(self._workers):
            for command in list(worker.orders):
                self.wait([index], command)

    def _send_setup(self, setup: dict[str, Any]) -> None:
        try:
            send_message(self._workers[-1].connection, setup)
        except TypeError as error:
            raise ConfigError(
                f"env.args={setup['args']} cannot be sent to a worker ({error}); use numbers, text, lists"
            ) from None
        except OSError:
            raise self._death(len(self._workers) - 1) from None

    def _agreed_spec(self) -> HostSpec:
        specs = []
        for index, worker in enumerate(self._workers):
            self._answer(index)
            specs.append(spec_from_json(receive_message(worker.connection)["spec"]))
            if specs[-1] != specs[0]:
                raise EnvError(f"env.name={self._name}: envs differ ({specs[-1]} and {specs[0]}); make every env alike")
        return specs[0]

    def _answer(self, index: int) -> bytes:
        """Waits for the worker's answer; raises what it raised, or that it died."""
        connection = self._workers[index].connection
        try:
            answer = connection.recv(1)
            if answer and answer != FAILED:
                return answer
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
        first, second = self.halves[index]
        spans = [(first[0], second[1])] if first[1] == second[0] else [first, second]
        envs = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in spans if end > start]
        return f"{index} (envs {', '.join(envs)})"


class _Worker:
    """A worker process, the socket to it, the anonymous file its crash report goes to, and what it was told to do."""

    __slots__ = ("answers", "connection", "crash_fd", "orders", "process")

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, crash_fd: int) -> None:
        self.process, self.connection, self.crash_fd = process, connection, crash_fd
        self.orders: dict[bytes, Future[None] | None] = {}  # nobody has waited for these; a thread gives some of them
        self.answers: set[bytes] = set()


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


def _tell(
    workers: list[_Worker], command: bytes, message: dict[str, Any] | None, after: Callable[[], None] | None = None
) -> None:
    """Sends a command to each worker; one that is gone is noticed by whoever waits for its answer."""
    if after is not None:
        after()
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.connection.sendall(command)
            if message is not None:
                send_message(worker.connection, message)


def _stop(workers: list[_Worker], endings: list[Callable[[], None]], lifeline_end: int, owner: int) -> None:
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
    for ending in endings:
        ending()
