"""Notices that another rank is gone, and ends this process where it would wait for that rank in vain.

A collective does not tell: NCCL waits in a kernel for as long as its timeout says, and a rank that is in a rollout, or
waits while rank 0 evaluates, asks nobody. So each rank holds one TCP connection to rank 0, looked after by a thread. A
process that dies, however it dies, has its connections closed by the operating system, and a machine that is gone says
nothing for SILENT_S: rank 0 tells the others. A rank that ends with an error of its own says so before it closes.

On the wire are lines: `.` every BEAT_S, which is `beat` where rank 0 has given a sign of life (`heartbeat.py`), `lost
CODE TEXT`, `done` to rank 0, `end` from it. It needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from dual_policy_plugin.errors import EXIT_AGAIN, DualPolicyError, RankLostError, RunError
from dual_policy_plugin.heartbeat import beat, last_beat

BEAT_S = 1.0
SILENT_S = 15.0
"""A rank that has said nothing for this long is gone. Processes that die are noticed at once; this is for machines."""
GRACE_S = 8.0
"""How long a rank that knows of a loss has to end by itself: it runs into the loss at its next collective, or never."""
_HELLO_S = 5.0
_MAX_LINE = 4096
_AGAIN = "the same command continues the run"


class RankWatch:
    """The connections of one rank: to all others on rank 0, to rank 0 on the others.

    Attributes:
        lost: (text, exit code) once a rank is known to be gone; None until then.
    """

    def __init__(self, rank: int, world_size: int, peers: dict[int, socket.socket], names: dict[int, str]) -> None:
        """Starts the thread.

        Args:
            rank, world_size: who we are.
            peers: a connection to each rank that we watch, greeted.
            names: of those ranks, for messages: where each one runs.
        """
        self.rank, self.world_size = rank, world_size
        self.lost: tuple[str, int] | None = None
        self._peers, self._names = peers, names
        self._received = dict.fromkeys(peers, b"")
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._done: set[int] = set()  # ranks that are through; kept by rank 0
        self._lock = threading.RLock()  # `_done`, and who writes into a connection
        self._is_lost, self._is_over, self._is_closed = threading.Event(), threading.Event(), threading.Event()
        self._is_leaving = False
        self._end_at = float("inf")
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._selector = selectors.DefaultSelector()
        for peer, connection in peers.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, peer)
        self._wake, wakened = socket.socketpair()
        self._selector.register(wakened, selectors.EVENT_READ, None)
        self._wakened = wakened
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def error(self) -> RankLostError:
        """The error of this rank where another one is lost; its exit code is that of the other's own error."""
        assert self.lost is not None
        error = RankLostError(self.lost[0])
        error.exit_code = self.lost[1]
        return error

    def wait_for_loss(self) -> bool:
        """Whether a rank is gone, known at the latest when a lost machine is; called where a collective failed."""
        return self._is_lost.wait(SILENT_S + 2 * BEAT_S)

    def tell(self, error: BaseException) -> None:
        """Tells the others why this rank ends; from now on its own error is what it ends with."""
        if isinstance(error, RankLostError) or self._is_leaving:
            return  # a loss is known to all, and the thread still ends this process if it does not do so itself
        self._is_leaving = True
        line = (str(error).splitlines() or [""])[0]
        code = 1
        if isinstance(error, DualPolicyError):
            code = error.exit_code
        else:
            line = f"{type(error).__name__}: {line}".removesuffix(": ")
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        elif isinstance(error, KeyboardInterrupt):
            code = 130
        where = _where(self.rank, self.world_size, _own_name())
        self._send(f"lost {code} {where} has ended: {line[:1000]}")

    def finish(self) -> None:
        """Waits until all ranks are through; so none is missed while another still works.

        Raises:
            RankLostError: one will never be.
        """
        if self.rank == 0:
            self._add_done(0)
        else:
            self._send("done")
        while not self._is_over.wait(0.02 if self._is_lost.is_set() else BEAT_S):
            if self.lost is not None:
                raise self.error()

    def close(self) -> None:
        """Ends the thread and the connections."""
        self._is_closed.set()
        self._wake.send(b"x")
        self._thread.join()
        for connection in (*self._peers.values(), self._wake, self._wakened):
            connection.close()
        self._selector.close()

    def _run(self) -> None:
        beat_at = woke = time.monotonic()
        while not self._is_closed.is_set():
            for key, _ in self._selector.select(max(beat_at - time.monotonic(), 0.0)):
                if key.data is not None:
                    self._receive(key.data)
            now = time.monotonic()
            if now - woke > 3 * BEAT_S:  # it is this process that was not run: the others had no chance to be heard
                self._heard = dict.fromkeys(self._heard, now)
            woke = now
            if now >= beat_at:
                beat_at = now + BEAT_S
                self._stop_without_parent()
                self._send("beat" if self.rank == 0 and now - last_beat() < 2 * BEAT_S else ".")
                for peer, heard in list(self._heard.items()):
                    if now - heard > SILENT_S:
                        self._drop(
                            peer, f"has not been heard of for {SILENT_S:g} s; its machine or the network is gone"
                        )
            if now > self._end_at and not self._is_leaving:
                self._end_process()

    def _stop_without_parent(self) -> None:
        """Where torchrun itself was killed, nobody else ends its ranks: they would hold the run for ever."""
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            print("torchrun, which started this rank, is gone; the run saves and ends", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, peer: int) -> None:
        try:
            data = self._peers[peer].recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer, "has ended without a word; killed, or out of memory")
            return
        self._heard[peer] = time.monotonic()
        *lines, self._received[peer] = (self._received[peer] + data).split(b"\n")
        for line in lines:
            kind, _, rest = line.decode(errors="replace").partition(" ")
            if kind == "lost":
                code, _, text = rest.partition(" ")
                self._note_loss(text, int(code))
            elif kind == "done":
                self._add_done(peer)
            elif kind == "beat":
                with contextlib.suppress(RunError):  # the main thread's own beat says so
                    beat()
            elif kind == "end":
                self._is_over.set()

    def _drop(self, peer: int, how: str) -> None:
        """Stops listening to a rank; a loss, unless everything is over."""
        self._selector.unregister(self._peers[peer])
        del self._heard[peer]
        if not self._is_over.is_set():
            self._note_loss(f"{_where(peer, self.world_size, self._names[peer])} {how}; {_AGAIN}", EXIT_AGAIN)

    def _note_loss(self, text: str, code: int) -> None:
        if self.lost is not None:
            return  # what comes after the first is its consequence
        self.lost = (text, code)
        self._end_at = time.monotonic() + GRACE_S
        self._is_lost.set()
        if self.rank == 0:
            self._send(f"lost {code} {text}")

    def _add_done(self, rank: int) -> None:
        with self._lock:
            self._done.add(rank)
            if len(self._done) == self.world_size and not self._is_over.is_set():
                self._send("end")
                self._is_over.set()

    def _send(self, line: str) -> None:
        """To everyone that we watch. Who does not read any more is noticed by the thread."""
        data = line.replace("\n", " ").encode()[: _MAX_LINE - 1] + b"\n"
        with self._lock:
            for connection in self._peers.values():
                try:
                    connection.send(data)
                except OSError:
                    continue

    def _end_process(self) -> NoReturn:
        """The main thread waits in a collective, or is deep in work that is of no more use."""
        error = self.error()
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def _own_name() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _where(rank: int, world_size: int, name: str) -> str:
    return f"rank {rank} of {world_size} ({name})"


def listen(port: int, num_ranks: int) -> socket.socket:
    """A socket that listens on all addresses of this machine; port 0: any that is free."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=num_ranks)
    return socket.create_server(("", port), backlog=num_ranks)


class FirstRank:
    """Where rank 0 waits for the others."""

    def __init__(self, world_size: int) -> None:
        """Args: world_size: how many are to come, rank 0 included."""
        self._server = listen(0, world_size)
        self._token = secrets.token_hex(16)
        self._world_size = world_size

    @property
    def ticket(self) -> str:
        """What another rank needs to come in: the port, and a word that only this job's processes know."""
        return f"{self._server.getsockname()[1]} {self._token}"

    def gather(self, wait_s: float) -> RankWatch:
        """The watch, once all others are here.

        Raises:
            RankLostError: some did not come in `wait_s`.
        """
        peers: dict[int, socket.socket] = {}
        names: dict[int, str] = {}
        until = time.monotonic() + wait_s
        with self._server:
            while len(peers) < self._world_size - 1:
                self._server.settimeout(max(until - time.monotonic(), 0.001))
                try:
                    connection, _ = self._server.accept()
                except TimeoutError:
                    missing = [str(rank) for rank in range(1, self._world_size) if rank not in peers]
                    raise RankLostError(
                        f"rank 0 of {self._world_size} has waited {wait_s:g} s for rank {', '.join(missing)}; "
                        "their own output says why they did not come"
                    ) from None
                token, rank, name = _read_hello(connection)
                if token == self._token and rank.isdecimal() and int(rank) not in peers:
                    peers[int(rank)], names[int(rank)] = connection, name
                else:
                    connection.close()
        for connection in peers.values():
            connection.sendall(f"{self._token} 0 {_own_name()}\n".encode())
        return RankWatch(0, self._world_size, peers, names)


def join_first(
    rank: int, world_size: int, host: str, find_ticket: Callable[[], str | None], wait_s: float
) -> RankWatch:
    """The watch of a rank other than 0, once all are here.

    Args:
        rank, world_size: who we are.
        host: on which rank 0 runs.
        find_ticket: gives that of `FirstRank`, once there is one.
        wait_s: how long the others may take.

    Raises:
        RankLostError: rank 0 cannot be reached, or not all came in time.
    """
    until, who = time.monotonic() + wait_s, f"rank {rank} of {world_size}"
    while True:
        ticket, reason = find_ticket(), f"rank 0 has not come in {wait_s:g} s"
        if ticket is not None:
            port, token = ticket.split(" ")
            try:
                connection = socket.create_connection((host, int(port)), timeout=wait_s)
                break
            except OSError as error:  # the ticket may be of an earlier start
                reason = f"rank 0 at {host}:{port} cannot be reached ({error.strerror or error})"
        if time.monotonic() > until:
            raise RankLostError(f"{who}: {reason}; its own output, or a firewall between the machines, says why")
        time.sleep(0.1)
    connection.sendall(f"{token} {rank} {_own_name()}\n".encode())
    got, _, name = _read_hello(connection, wait_s + 2 * _HELLO_S)  # rank 0 knows who is missing: it gives up first
    if got != token:
        connection.close()
        raise RankLostError(f"{who}: rank 0 has ended while it waited for the others; {_AGAIN}")
    return RankWatch(rank, world_size, {0: connection}, {0: name})


def _read_hello(connection: socket.socket, wait_s: float = _HELLO_S) -> tuple[str, str, str]:
    """Token, rank and name of who is at the other end; empty where nothing sensible came."""
    connection.settimeout(wait_s)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _MAX_LINE:
            part = connection.recv(1)  # not more: what follows the first line is for the watch
            if not part:
                break
            data += part
    except OSError:
        pass
    token, _, rest = data.decode(errors="replace").strip().partition(" ")
    rank, _, name = rest.partition(" ")
    return token, rank, name
