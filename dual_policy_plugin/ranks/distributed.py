"""Several processes training one policy: who we are, and what all ranks do together.

Takes Ranks, as `ranks/variables.py` finds them; with one rank nothing is sent. All that is sent goes through here, so a
rank that cannot go on without another one ends with a RankLostError, not with what its backend says.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # as torch.distributed has them, with types

from dual_policy_plugin.errors import ConfigError, RankLostError
from dual_policy_plugin.ranks.watch import FirstRank, RankWatch, join_first, listen

JOIN_S = 300.0
"""How long the ranks wait for each other at the start: machines of one job do not come up at one moment."""
_COLLECTIVE_TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 evaluates; a rank that is gone ends them sooner


@dataclass(kw_only=True, slots=True, frozen=True)
class Ranks:
    """Which rank this process is, of how many."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    """The host on which rank 0 runs."""
    port: int = 0
    """There, where the ranks find each other."""
    is_port_served: bool = False
    """Whether the launcher listens there already; else rank 0 does."""
    is_port_ours: bool = False
    """Whether it was reckoned here, another one for the next start; else the user or the launcher has set it."""

    @property
    def is_first(self) -> bool:
        """Rank 0 owns the run directory, the panel and the loggers."""
        return self.rank == 0

    @property
    def num_machines(self) -> int:
        """How many machines the ranks are spread over, each with local_world_size of them."""
        return -(-self.world_size // self.local_world_size)


_watch: RankWatch | None = None  # of the process group, which is one for a process too
_store: Store | None = None  # in which that group is made
_num_joined = 0


@contextmanager
def join_ranks(ranks: Ranks, *, wait_s: float = JOIN_S) -> Iterator[None]:
    """Meets the other ranks while the context is open; it closes when all are through, or this one has failed.

    From here on each learns at once if another one ends. They send each other tensors after `open_group`.

    Args:
        ranks: who we are; nothing happens where that is one.
        wait_s: how long the others may take to come.

    Raises:
        RankLostError: some did not come, or were lost.
        ConfigError: the port is taken, and somebody has set it.
    """
    global _watch, _store, _num_joined
    if ranks.world_size == 1:
        yield
        return
    # Adam imports this at its first use, and it keeps a process group alive that exists by then: the group's
    # threads would outlive this context and now and then abort the interpreter's end. Now it has none to keep.
    from torch import _dynamo  # noqa: F401

    _store = PrefixStore(f"join{_num_joined}", _open_store(ranks, wait_s))
    _num_joined += 1
    _watch = _find_others(ranks, _store, wait_s)
    try:
        yield
        _watch.finish()
    except BaseException as error:
        _watch.tell(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _watch.close()
        _watch = _store = None


def open_group(ranks: Ranks, device_type: str) -> None:
    """Opens the process group of ranks that have met; `device_type`, cpu or cuda, is where tensors are sent from."""
    if _store is None:
        return
    _store.set_timeout(_COLLECTIVE_TIMEOUT)  # NCCL's first collective asks it, and rank 0 may be fetching a mirror
    with _sending():
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=PrefixStore("group", _store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )


def tell_error(kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    """An exit callback of a context: tells the other ranks at once why this one ends, before it closes what it has."""
    if _watch is not None and error is not None:
        _watch.tell(error)


@functools.cache  # a process that trains several times meets the same others in the same store
def _open_store(ranks: Ranks, wait_s: float) -> Store:
    """The key-value store in which the ranks find each other: the launcher's, else one that rank 0 serves."""
    where = f"MASTER_ADDR:MASTER_PORT={ranks.address}:{ranks.port}"
    connect = functools.partial(
        TCPStore, ranks.address, ranks.port, wait_for_workers=False, timeout=timedelta(seconds=wait_s)
    )
    if ranks.is_first and not ranks.is_port_served:
        try:
            server = listen(ranks.port, ranks.world_size)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if ranks.is_port_ours and error.errno == errno.EADDRINUSE:
                raise RankLostError(
                    f"{where} cannot be served ({reason}); the next start takes another port"
                ) from error
            raise ConfigError(f"{where} cannot be served ({reason}); set MASTER_PORT to a free port") from error
        return connect(is_master=True, master_listen_fd=server.detach())
    until = time.monotonic() + wait_s
    while True:  # torch would write pages about each attempt
        try:
            socket.create_connection((ranks.address, ranks.port), timeout=wait_s).close()
            return connect(is_master=False)
        except OSError as error:
            if time.monotonic() > until:
                raise RankLostError(
                    f"rank {ranks.rank} of {ranks.world_size}: {where} has not answered for {wait_s:g} s "
                    f"({error.strerror or error}); does rank 0 run there, and can its port be reached?"
                ) from error
            time.sleep(0.2)


def _find_others(ranks: Ranks, store: Store, wait_s: float) -> RankWatch:
    """The watch over all ranks, once they are here."""
    if ranks.is_first:
        first = FirstRank(ranks.world_size)
        store.set("watch", first.ticket)
        return first.gather(wait_s)

    def find_ticket() -> str | None:
        try:
            return store.get("watch").decode() if store.check(["watch"]) else None
        except RuntimeError as error:  # of the store, whose server is gone
            raise RankLostError(
                f"rank {ranks.rank} of {ranks.world_size}: rank 0 at {ranks.address}:{ranks.port} has ended before all "
                "had come; its own output says why"
            ) from error

    return join_first(ranks.rank, ranks.world_size, ranks.address, find_ticket, wait_s)


@contextmanager
def _sending() -> Iterator[None]:
    """Around whatever waits for other ranks.

    Raises:
        RankLostError: one of them is gone, or hangs. A backend only says that a connection was closed, if it says
            anything.
    """
    if _watch is not None and _watch.lost is not None:
        raise _watch.error()
    begun = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited_s, limit_s = time.monotonic() - begun, _COLLECTIVE_TIMEOUT.total_seconds()
        if _watch is not None and waited_s >= 0.99 * limit_s:
            raise RankLostError(
                f"rank {_watch.rank} of {_watch.world_size} has waited {limit_s:g} s for another rank, which lives and "
                "does not come; the same command continues the run"
            ) from error
        if _watch is not None and _watch.wait_for_loss():
            raise _watch.error() from error
        raise


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Adds the tensor up over all ranks, in place; the same tensor where there is one rank."""
    if ranks.world_size > 1:
        with _sending():
            dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensor: Tensor, ranks: Ranks) -> None:
    """Overwrites the tensor by rank 0's, in place."""
    if ranks.world_size > 1:
        with _sending():
            dist.broadcast(tensor, 0)


def gather_tensors(tensors: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> list[dict[str, Tensor]]:
    """Every rank's tensors on the host of rank 0, by rank; an empty list on the others. All must call this together.

    Args:
        tensors: of the same names, shapes and types on all ranks.
        ranks: who we are.
        device: where the process group sends from.
    """
    own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    if ranks.world_size == 1:
        return [own]
    gathered: list[dict[str, Tensor]] = [{} for _ in range(ranks.world_size if ranks.is_first else 0)]
    for name, tensor in own.items():
        mine = _as_bytes(tensors[name], device)
        everyone = [torch.empty_like(mine) for _ in gathered]
        if len(mine) > 0:
            with _sending():
                dist.gather(mine, everyone if ranks.is_first else None)
        for one, theirs in zip(gathered, everyone, strict=True):
            one[name] = theirs.cpu().view(tensor.dtype).view(tensor.shape)
    return gathered


def scatter_tensors(
    gathered: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor], ranks: Ranks, device: torch.device
) -> dict[str, Tensor]:
    """What `gather_tensors` gave: on each rank its own tensors, on `device`. All must call this together.

    Args:
        gathered: on rank 0 for every rank; not looked at on the others.
        like: tensors of the same names, shapes and types.
        ranks: who we are.
        device: where the process group sends from.
    """
    if ranks.world_size == 1:
        return {name: gathered[0][name].to(device) for name in like}
    scattered = {}
    for name, tensor in like.items():
        mine = torch.empty_like(_as_bytes(tensor, device))
        everyone = [_as_bytes(one[name], device) for one in gathered] if ranks.is_first else None
        if len(mine) > 0:
            with _sending():
                dist.scatter(mine, everyone)
        scattered[name] = mine.view(tensor.dtype).view(tensor.shape)
    return scattered


def _as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """(num_bytes,) uint8: backends do not send every type."""
    return tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)


def share_text(text: str, ranks: Ranks, device: torch.device) -> str:
    """Rank 0's text, on every rank; all ranks must call this together.

    Args:
        text: of rank 0; the others' is not looked at.
        ranks: who we are.
        device: where the process group sends from.
    """
    if ranks.world_size == 1:
        return text
    data = text.encode() if ranks.is_first else b""
    size = torch.tensor([len(data)], device=device)
    copy_from_first(size, ranks)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if len(buffer) > 0:
        copy_from_first(buffer, ranks)
    return bytes(buffer.tolist()).decode()


def first_trouble(trouble: str, ranks: Ranks, device: torch.device) -> tuple[int, str] | None:
    """The first rank that has a trouble to tell (an empty text is none), and its text; None if no rank has one.

    All ranks must call this together: so none is left waiting for one that has stopped.
    """
    if ranks.world_size == 1:
        return (0, trouble) if trouble else None
    mine = torch.zeros(1024, dtype=torch.uint8, device=device)
    data = trouble.encode()[: len(mine)]
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else mine[:0]
    everyone = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    with _sending():
        dist.all_gather(everyone, mine)
    texts = [bytes(theirs.tolist()).rstrip(b"\0").decode(errors="ignore") for theirs in everyone]
    return next(((rank, text) for rank, text in enumerate(texts) if text), None)
