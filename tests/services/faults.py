"""Decides which request meets which fault, the same way every time for one seed.

`FaultyHttpServer` asks `Faults.draw` once a request. A fault is matched by a substring of the request's label, which is
`METHOD /path?query operation` (`POST /graphql Runs`, `GET /storage/team/... `, `PUT /bucket/key`).

Kinds, `name` or `name:argument`:
    status:503      that status with a short body; the request has no effect
    reset           the connection is reset before the request has any effect
    lost            the request takes effect, then the connection is reset: a write whose answer never arrives
    truncate        the true Content-Length, half of the body, end of connection
    wrong_length    half of the body and a Content-Length that agrees with it: only a digest or a known size can tell
    bitflip         one bit of the body is flipped, chosen by the seed
    slow:0.2        0.2 s before the answer begins
    stall:0.2       half of the body, 0.2 s of silence, the rest
    redirect:URL    a 302 to that URL
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

KINDS = ("status", "reset", "lost", "truncate", "wrong_length", "bitflip", "slow", "stall", "redirect")
NEEDS_ARGUMENT = ("status", "slow", "stall", "redirect")


@dataclass(kw_only=True, slots=True)
class Fault:
    """One planted fault and how often it was met."""

    match: str
    kind: str
    argument: str
    times: int | None
    after: int
    probability: float
    num_seen: int = 0
    num_fired: int = 0


class Faults:
    """The faults of one server; thread-safe, in the order in which they were added."""

    def __init__(self, seed: int = 0) -> None:
        self.fired: list[tuple[str, str]] = []  # (kind, label of the request)
        self._faults: list[Fault] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def reseed(self, seed: int) -> None:
        """Start the draws of probabilities and bits anew."""
        self._random = random.Random(seed)

    def add(self, match: str, kind: str, *, times: int | None = 1, after: int = 0, probability: float = 1.0) -> Fault:
        """Plant a fault for requests whose label contains `match`.

        Args:
            match: substring of the label; "" matches every request.
            kind: see the module's list.
            times: how often it fires at most; None for ever.
            after: how many matching requests pass first.
            probability: of firing at each further match, drawn from the seed.
        """
        name, _, argument = kind.partition(":")
        if name not in KINDS or bool(argument) != (name in NEEDS_ARGUMENT):
            raise ValueError(f"fault kind {kind!r}: use one of {KINDS}, with an argument for {NEEDS_ARGUMENT}")
        fault = Fault(match=match, kind=name, argument=argument, times=times, after=after, probability=probability)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Take every fault away; `fired` stays."""
        with self._lock:
            self._faults.clear()

    def draw(self, label: str) -> Fault | None:
        """The fault that this request meets, at most one."""
        with self._lock:
            for fault in self._faults:
                if fault.match not in label or (fault.times is not None and fault.num_fired >= fault.times):
                    continue
                fault.num_seen += 1
                if fault.num_seen <= fault.after or self._random.random() >= fault.probability:
                    continue
                fault.num_fired += 1
                self.fired.append((fault.kind, label))
                return fault
        return None

    def flip_one_bit(self, body: bytes) -> bytes:
        """The body with one bit of it flipped."""
        with self._lock:
            bit = self._random.randrange(len(body) * 8)
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << (bit % 8)
        return bytes(flipped)
