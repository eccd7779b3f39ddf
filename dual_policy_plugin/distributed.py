"""Several processes training one policy: who we are, and the two things that all ranks do together.

Takes the environment variables that torchrun sets; without them there is one rank and nothing is sent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dual_policy_plugin.errors import DigestError


@dataclass(kw_only=True, slots=True, frozen=True)
class Ranks:
    """Which rank this process is, of how many."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Rank 0 owns the run directory, the panel and the loggers."""
        return self.rank == 0


def join_ranks(device_type: str) -> Ranks:
    """Joins the process group that torchrun's variables describe; one rank where there are none."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    if ranks.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=10))
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


def require_same_digests(digests: list[str], ranks: Ranks, device: torch.device) -> None:
    """Stops every rank unless all of them hold the same NPCs.

    Args:
        digests: sha256 hex digests of this rank's NPC files, in the pool's order.
        ranks: who we are.
        device: where the process group sends from.

    Raises:
        DigestError: on every rank, naming the ranks that differ from rank 0.
    """
    if ranks.world_size == 1:
        return
    num_npcs = torch.tensor([len(digests)], device=device)
    dist.all_reduce(num_npcs, dist.ReduceOp.MAX)
    mine = torch.zeros(int(num_npcs) * 32 + 1, dtype=torch.uint8, device=device)
    raw = b"".join(bytes.fromhex(digest) for digest in digests)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device) if raw else mine[:0]
    mine[-1] = len(digests) % 256
    everyone = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(everyone, mine)
    others = [str(rank) for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if others:
        raise DigestError(
            f"rank {', '.join(others)} of {ranks.world_size} holds other NPC bytes than rank 0; "
            "every rank must read the same checkpoint: use a shared path or a pinned URI"
        )
