"""The program of one env worker: makes its slice of the envs, then steps them whenever it is told to.

`workers.py` starts it and talks to it over a socket pair: JSON messages while setting up, then one byte per command.
The worker waits in a blocking read, so it costs no core while idle, and leaves when its parent does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dual_policy_plugin.envs.adapt import as_host
from dual_policy_plugin.envs.host import EpisodeRunner, Host, HostSpec, first_cut
from dual_policy_plugin.envs.shared_rows import map_arrays, rows_of
from dual_policy_plugin.errors import DualPolicyError, EnvError
from dual_policy_plugin.types import ObservationSpace

RESET, QUIT = b"r", b"q"  # commands; a command that was carried out is also the answer
STEP = {(0, 1): b"s", (0,): b"0", (1,): b"1"}  # the halves of this worker's envs that are stepped
DONE, FAILED = b"k", b"e"  # other answers
PARENT_CHECK_S = 1.0


class Disconnected(Exception):  # noqa: N818 - it is the normal end of a worker, not an error
    """The process at the other end of the socket is gone."""


def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one JSON object, its length first."""
    data = json.dumps(message).encode()
    connection.sendall(struct.pack("<I", len(data)) + data)


def receive_message(connection: socket.socket) -> dict[str, Any]:
    """Receives one JSON object; Disconnected where the other side is gone."""
    (length,) = struct.unpack("<I", _receive_exactly(connection, 4))
    message: dict[str, Any] = json.loads(_receive_exactly(connection, length))
    return message


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise Disconnected
        data += part
    return data


def spec_from_json(data: dict[str, Any]) -> HostSpec:
    """The HostSpec that a worker sent."""
    space = ObservationSpace(**_tuples(data["observation_space"]))
    return HostSpec(**{**_tuples(data), "observation_space": space})


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON turned the tuples into lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def load_target(target: dict[str, str]) -> Callable[..., Any]:
    """The user's `make` function, from its module or, where it stands in the started script, from that file."""
    if target["file"]:
        value: Any = runpy.run_path(target["file"], run_name="__dual_policy_worker__")[target["qualname"]]
    else:
        value = importlib.import_module(target["module"])
        for part in target["qualname"].split("."):
            value = getattr(value, part)
    function: Callable[..., Any] = value
    return function


def watch_parent(lifeline_fd: int, parent: int) -> None:
    """Ends this process at once when the parent is gone, however it went and whatever this worker is doing."""

    def watch() -> None:
        while True:
            readable, _, _ = select.select([lifeline_fd], [], [], PARENT_CHECK_S)
            if readable or os.getppid() != parent:
                os._exit(0)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def make_hosts(setup: dict[str, Any]) -> list[Host]:
    """This worker's hosts, whose spaces must be equal."""
    make = load_target(setup["target"])
    hosts: list[Host] = []
    indices = [setup["first_index"] + env for envs in setup["halves"] for env in range(*envs)]
    for index in indices:
        hosts.append(as_host(make(index, **setup["args"]), setup["name"]))
        if hosts[-1].spec != hosts[0].spec:
            raise EnvError(
                f"env.name={setup['name']}: env {index} differs from env {indices[0]} in its agents, spaces or "
                f"length ({hosts[-1].spec} and {hosts[0].spec}); make every env alike"
            )
    return hosts


def serve(connection: socket.socket, memory_fd: int) -> None:
    """Sets up, then answers commands until told to quit or the parent is gone."""
    setup = receive_message(connection)
    hosts = make_hosts(setup)
    connection.sendall(DONE)
    send_message(connection, {"spec": asdict(hosts[0].spec)})
    if _receive_exactly(connection, 1) == QUIT:  # else the parent has given the memory its size
        return
    arrays = map_arrays(memory_fd, hosts[0].spec, setup["num_envs"], resize=False)
    os.close(memory_fd)
    unused = iter(hosts)
    halves = [
        {
            env: EpisodeRunner(next(unused), rows_of(arrays, env), number)
            for env, number in zip(range(*envs), numbers, strict=True)
        }
        for envs, numbers in zip(setup["halves"], setup["env_numbers"], strict=True)
    ]
    steps = {command: [runner for i in which for runner in halves[i].values()] for which, command in STEP.items()}
    while (command := connection.recv(1)) not in (QUIT, b""):
        if command in steps:
            for runner in steps[command]:
                runner.step()
        else:
            order = receive_message(connection)
            longest = hosts[0].spec.max_episode_steps
            for env, runner in ((env, runner) for i in order["halves"] for env, runner in halves[i].items()):
                cut = first_cut(env, setup["num_envs"], longest) if order["stagger"] else longest
                runner.reset(order["seed"], cut)
        connection.sendall(command)
    for host in hosts:
        host.close()


def main(connection_fd: int, memory_fd: int, lifeline_fd: int, crash_fd: int, parent: int) -> None:
    """Runs the worker; an exception is sent to the parent, a crash of native code is written to `crash_fd`.

    It leaves without the interpreter's teardown: that takes long after big imports, and everyone waits for it.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # a scheduler sends it to all processes: the parent decides what it means
    faulthandler.enable(os.fdopen(crash_fd, "wb", buffering=0), all_threads=False)
    watch_parent(lifeline_fd, parent)
    connection = socket.socket(fileno=connection_fd)
    code = 0
    try:
        serve(connection, memory_fd)
    except Disconnected:
        pass
    except BaseException as error:
        code = 1
        is_users = isinstance(error, DualPolicyError)
        text = str(error) if is_users else traceback.format_exc()
        with contextlib.suppress(OSError):
            connection.sendall(FAILED)
            send_message(connection, {"class": type(error).__name__ if is_users else "", "text": text})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
