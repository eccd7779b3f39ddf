"""A threaded HTTP/1.1 server on loopback that records every request and lets planted faults through.

`FaultyHttpServer(answer)` calls `answer(request) -> Response` for each request; the W&B stand-in and the proxy in front
of the S3 stand-in are both such functions. A client that is told to use this server as its HTTP proxy shows here every
other host that it tried to reach (`foreign_hosts`): those requests are refused and never leave the machine.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NoReturn
from urllib.parse import parse_qs, urlsplit

from tests.services.faults import Fault, Faults

KEPT_BODY_BYTES = 1 << 16
OPERATION = re.compile(
    r"(?:\\n|\b)(?:query|mutation) +(\w+)"
)  # in the JSON text, where a line starts with a literal \\n


@dataclass(kw_only=True, slots=True)
class Request:
    """What came; `operation` is the GraphQL operation's name, "" elsewhere."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        """The path, still percent-encoded, without the query."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query's last value for each key."""
        return {
            key: values[-1] for key, values in parse_qs(urlsplit(self.target).query, keep_blank_values=True).items()
        }

    @property
    def operation(self) -> str:
        """`Runs` for `{"query": "query Runs(...) ..."}`."""
        if not self.path.endswith("/graphql"):
            return ""
        found = OPERATION.search(self.body.decode("utf-8", "replace"))
        return found.group(1) if found else ""

    @property
    def label(self) -> str:
        """What faults are matched against."""
        return f"{self.method} {self.target} {self.operation}".rstrip()


@dataclass(kw_only=True, slots=True)
class Response:
    """What goes back; Content-Length is added."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class Exchange:
    """One recorded request and what was done with it. `body` holds its first 64 KiB."""

    method: str
    target: str
    operation: str
    host: str
    headers: Mapping[str, str]
    body: bytes
    num_bytes_received: int
    num_bytes_sent: int
    status: int
    fault: str

    @property
    def path(self) -> str:
        """The path without the query."""
        return urlsplit(self.target).path


class FaultyHttpServer:
    """Starts at once on a free port of 127.0.0.1; `close` ends its threads."""

    def __init__(self, answer: Callable[[Request], Response], faults: Faults | None = None) -> None:
        self.faults = faults if faults is not None else Faults()
        self.exchanges: list[Exchange] = []
        self.foreign_hosts: list[str] = []
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_class(self, answer))
        self._http.daemon_threads = True
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def record(self, exchange: Exchange) -> None:
        """Called by the connection threads."""
        with self._lock:
            self.exchanges.append(exchange)

    def close(self) -> None:
        """Stop listening; open connections end with their clients."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def _handler_class(server: FaultyHttpServer, answer: Callable[[Request], Response]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Quiet: `exchanges` is the log."""

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, TimeoutError):
                self.close_connection = True  # the client went away

        def serve(self) -> None:
            if self.command == "CONNECT" or not self.path.startswith("/"):
                server.foreign_hosts.append(urlsplit(self.path).netloc or self.path)
                self.write(Response(status=403, body=b"only loopback can be reached from here"))
                self.close_connection = True
                return
            request = Request(
                method=self.command, target=self.path, headers=dict(self.headers.items()), body=self.read_body()
            )
            fault = server.faults.draw(request.label)
            kind = fault.kind if fault else ""
            response = self.respond(fault, request)
            length = len(response.body) if response and request.method != "HEAD" else 0
            # Recorded before it is sent: a client that has its answer finds it counted.
            server.record(
                Exchange(
                    method=request.method,
                    target=request.target,
                    operation=request.operation,
                    host=request.headers.get("Host", ""),
                    headers=request.headers,
                    body=request.body[:KEPT_BODY_BYTES],
                    num_bytes_received=len(request.body),
                    num_bytes_sent=length // 2 if kind == "truncate" else length,
                    status=response.status if response else 0,
                    fault=kind,
                )
            )
            if response is None:
                self.reset()
            elif kind in ("truncate", "stall"):
                self.write_in_halves(response, pause_s=float(fault.argument or 0), stop=kind == "truncate")
            else:
                self.write(response)

        def respond(self, fault: Fault | None, request: Request) -> Response | None:
            """What the fault makes of the answer; None is a reset."""
            kind = fault.kind if fault else ""
            argument = fault.argument if fault else ""
            if kind == "status":
                return Response(status=int(argument), body=f"planted {argument}".encode())
            if kind == "redirect":
                return Response(status=302, headers={"Location": argument})
            if kind == "reset":
                return None
            if kind == "slow":
                time.sleep(float(argument))
            try:
                response = answer(request)
            except Exception as error:  # shown to the test by `close`, and to the client as a 500
                server.errors.append(error)
                return Response(status=500, body=repr(error).encode())
            if kind == "lost":
                return None
            if kind == "bitflip" and response.body:
                response.body = server.faults.flip_one_bit(response.body)
            if kind == "wrong_length":
                response.body = response.body[: len(response.body) // 2]
            return response

        def read_body(self) -> bytes:
            """The whole body: of a client that is killed within it nothing is kept, as no service would."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.read_whole(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0] or self.cut_off(), 16):
                chunks.append(self.read_whole(size))
                self.rfile.readline()
            while (line := self.rfile.readline()).strip():
                pass
            return b"".join(chunks) if line else self.cut_off()

        def read_whole(self, num_bytes: int) -> bytes:
            data = self.rfile.read(num_bytes)
            return data if len(data) == num_bytes else self.cut_off()

        def cut_off(self) -> NoReturn:
            raise ConnectionError("the client went away within its request")

        def write(self, response: Response) -> None:
            self.write_head(response)
            if self.command != "HEAD":
                self.wfile.write(response.body)

        def write_head(self, response: Response) -> None:
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in response.headers:
                self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()

        def write_in_halves(self, response: Response, *, pause_s: float, stop: bool) -> None:
            half = len(response.body) // 2
            self.write_head(response)
            self.wfile.write(response.body[:half])
            if stop:
                self.close_connection = True
                return
            self.wfile.flush()
            time.sleep(pause_s)
            self.wfile.write(response.body[half:])

        def reset(self) -> None:
            # Lingering for zero seconds turns the close into an RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            os.close(self.connection.detach())

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "CONNECT"):
        setattr(Handler, f"do_{method}", Handler.serve)
    return Handler
