"""Several processes training one policy: who we are, and what all ranks do together.

Takes the environment variables that torchrun sets; without them there is one rank and nothing is sent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(kw_only=True, slots=True, frozen=True)
class Ranks:
    """Which rank this process is, of how many."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Rank 0 owns the run directory, the panel and the loggers."""
        return self.rank == 0

    @property
    def num_machines(self) -> int:
        """How many machines the ranks are spread over, each with local_world_size of them."""
        return -(-self.world_size // self.local_world_size)


def join_ranks(device_type: str) -> Ranks:
    """Joins the process group that torchrun's variables describe; one rank where there are none."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if ranks.world_size > 1 and not dist.is_initialized():
        # Adam imports this at its first use, and it keeps a process group alive that exists by then: the group's
        # threads would outlive leave_ranks and now and then abort the interpreter's end. Now it has none to keep.
        from torch import _dynamo  # noqa: F401

        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            timeout=timedelta(hours=1),  # the others wait while rank 0 evaluates
        )
    return ranks


def leave_ranks() -> None:
    """Ends the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Adds the tensor up over all ranks, in place; the same tensor where there is one rank."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensor: Tensor, ranks: Ranks) -> None:
    """Overwrites the tensor by rank 0's, in place."""
    if ranks.world_size > 1:
        dist.broadcast(tensor, 0)


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
    dist.broadcast(size, 0)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if len(buffer) > 0:
        dist.broadcast(buffer, 0)
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
    dist.all_gather(everyone, mine)
    texts = [bytes(theirs.tolist()).rstrip(b"\0").decode(errors="ignore") for theirs in everyone]
    return next(((rank, text) for rank, text in enumerate(texts) if text), None)
