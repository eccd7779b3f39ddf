"""The least time that an iteration can take on this machine: counted work at rates measured in the same run.

    floor = sum over matrix products of (count * time of one such product, alone, at its own shape)
          + sum over streams of bytes of (bytes / bandwidth of a copy as large as the stream's working set)

Counted are what the job needs, whatever the scheme: the learner on its rows in rollout and update, one NPC forward on
each NPC row (all NPCs in one product), observations, states, experience. Not counted: the env, activations that the
update keeps, everything elementwise. With H hidden units, A actions and F features of the first layer a row-step costs

    rollout forward   2 * (2H * 4H + H * (A + 1))                         floating-point operations, and the encoder
    update            3 * 2 * (2H * 4H + H * (A + 1)) + 2 * F * H         and the encoder's forward

The encoder's forward is 2 * F * H operations on CUDA (one-hot in registers). On the CPU it reads table rows: one for
every window cell, or for every two or three neighbours from a larger table, whichever is least time here. Its backward
is dense on both, for weights only. Products and sums run one after the other, so a product
that hides a stream of bytes could go below this floor; nothing here does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_ROWS = 65_536
"""Products with more rows are measured with so many and scaled."""
MAX_COPY_BYTES = 2**28
_MEASURE_S = 0.02


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """What one iteration has to do."""

    num_learner_rows: int
    num_npc_rows: int
    horizon: int
    num_minibatches: int
    epochs: int
    hidden_size: int
    num_actions: int
    num_cells: int
    num_codes: int
    num_own: int
    obs_bytes: int
    dtype: torch.dtype
    device: torch.device

    @property
    def is_dense(self) -> bool:
        """Whether the encoder's forward is a product (CUDA) instead of table reads."""
        return self.device.type == "cuda"

    @property
    def num_features(self) -> int:
        """Rows of the encoder's weight: all codes but the empty one of all cells, own-state bytes, bias; rounded up to
        64 on CUDA."""
        features = self.num_cells * (self.num_codes - 1) + self.num_own + 1
        return -(-features // 64) * 64 if self.is_dense else features


@dataclass(kw_only=True, slots=True, frozen=True)
class Stream:
    """Bytes that pass between memory and the processor in one iteration."""

    num_bytes: int
    working_set: int
    """Bytes of the buffer they live in: what fits into a cache moves at the cache's rate."""


def row_step_flops(job: Job) -> dict[str, int]:
    """Floating-point operations in matrix products, per learner row-step in rollout and update, per NPC row-step."""
    hidden = job.hidden_size
    body = 2 * (2 * hidden * 4 * hidden + hidden * (job.num_actions + 1))
    encoder = 2 * job.num_features * hidden
    forward = body + (encoder if job.is_dense else 0)
    return {
        "learner_rollout": forward,
        "learner_update": job.epochs * (forward + 2 * body + encoder),
        "npc_rollout": forward,
    }


def products(job: Job) -> dict[tuple[int, int, int], int]:
    """The iteration's matrix products: (m, k, n) -> how many times (m, k) @ (k, n) is done."""
    hidden, outputs, horizon = job.hidden_size, job.num_actions + 1, job.horizon
    counts: dict[tuple[int, int, int], int] = defaultdict(int)
    for rows in (job.num_learner_rows, job.num_npc_rows):
        if rows:
            counts[rows, 2 * hidden, 4 * hidden] += horizon  # x and h of a step
            counts[rows, hidden, outputs] += horizon
            if job.is_dense:
                counts[rows, job.num_features, hidden] += horizon
    rows = max(1, job.num_learner_rows // job.num_minibatches)
    steps, times = rows * horizon, job.epochs * job.num_minibatches
    if job.is_dense:
        counts[steps, job.num_features, hidden] += times
    counts[steps, hidden, 4 * hidden] += times  # x of all steps
    counts[rows, hidden, 4 * hidden] += times * horizon  # h, step by step
    counts[steps, hidden, outputs] += times
    counts[hidden, steps, outputs] += times  # gradients: heads' weights and inputs
    counts[steps, outputs, hidden] += times
    counts[rows, 4 * hidden, hidden] += times * horizon  # of h, step by step
    counts[hidden, steps, 4 * hidden] += 2 * times  # of the two LSTM weights
    counts[steps, 4 * hidden, hidden] += times  # of x
    counts[job.num_features, steps, hidden] += times  # of the encoder's weights
    return dict(counts)


def streams(job: Job) -> list[Stream]:
    """The iteration's bytes but for the encoder's table: observations, experience, recurrent states."""
    learner_steps, npc_steps = job.num_learner_rows * job.horizon, job.num_npc_rows * job.horizon
    rows = job.num_learner_rows + job.num_npc_rows
    stored = job.obs_bytes + 8 + 3 * 4 + 1  # observation, action, log-prob, value, reward, done
    experience = learner_steps * stored
    # written once, the observation read by the rollout's forward, all of it read by each pass of the update
    moved = learner_steps * (stored + job.obs_bytes + job.epochs * stored)
    state_bytes = 2 * job.hidden_size * 4
    found = [
        Stream(num_bytes=moved, working_set=experience),
        Stream(num_bytes=npc_steps * 2 * job.obs_bytes, working_set=job.num_npc_rows * job.obs_bytes),
        Stream(num_bytes=(learner_steps + npc_steps) * 2 * state_bytes, working_set=rows * state_bytes),
    ]
    return [stream for stream in found if stream.num_bytes]


def table_reads(job: Job) -> list[Stream]:
    """The encoder's forward passes on the CPU, one Stream for each way to do them; empty where they are products."""
    if job.is_dense:
        return []
    width = job.hidden_size * torch.empty((), dtype=job.dtype).element_size()
    steps = job.horizon * ((1 + job.epochs) * job.num_learner_rows + job.num_npc_rows)
    ways = []
    for neighbours in (1, 2, 3):
        lookups = -(-job.num_cells // neighbours)
        table = lookups * job.num_codes**neighbours * width
        ways.append(Stream(num_bytes=steps * lookups * width, working_set=table))
    return ways


class Rates:
    """Rates of this machine, measured when first asked for and kept."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._products: dict[tuple[int, int, int], float] = {}
        self._copies: dict[int, float] = {}

    def product_s(self, m: int, k: int, n: int) -> float:
        """Seconds of one product (m, k) @ (k, n)."""
        if (m, k, n) not in self._products:
            scale = max(m, k) / min(max(m, k), MAX_ROWS)
            a = torch.ones(min(m, MAX_ROWS), min(k, MAX_ROWS), dtype=self.dtype, device=self.device)
            b = torch.ones(min(k, MAX_ROWS), n, dtype=self.dtype, device=self.device)
            out = torch.empty(min(m, MAX_ROWS), n, dtype=self.dtype, device=self.device)
            self._products[m, k, n] = scale * self._best_s(lambda: torch.mm(a, b, out=out))
        return self._products[m, k, n]

    def bandwidth(self, working_set: int) -> float:
        """Bytes per second, read and written together, of a copy whose two buffers are `working_set` bytes in all."""
        size = max(2**12, min(2 ** (working_set - 1).bit_length(), MAX_COPY_BYTES) // 2)
        if size not in self._copies:
            source = torch.ones(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copies[size] = 2 * size / self._best_s(lambda: target.copy_(source))
        return self._copies[size]

    def _best_s(self, call: Callable[[], object]) -> float:
        """Seconds of one call: the best of three rounds that each last about `_MEASURE_S` (the calls run unsynced)."""
        wait: Callable[[], None] = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None

        def round_s(times: int) -> float:
            wait()
            start = time.perf_counter()
            for _ in range(times):
                call()
            wait()
            return (time.perf_counter() - start) / times

        round_s(1)
        times = max(1, min(10_000, int(_MEASURE_S / 3 / max(round_s(1), 1e-7))))
        return min(round_s(times) for _ in range(3))

    def as_dict(self) -> dict[str, float]:
        """What was measured: TFLOP/s by shape of the product, GB/s by bytes of the copy."""
        tflops = {
            f"product_{m}x{k}x{n}_tflop_per_s": 2e-12 * m * k * n / seconds
            for (m, k, n), seconds in self._products.items()
        }
        return tflops | {f"copy_{size}_gb_per_s": rate / 1e9 for size, rate in self._copies.items()}


def floor_s(job: Job, rates: Rates) -> dict[str, float]:
    """Seconds of an iteration at its floor: `products`, `bytes`, `table_reads` and their `total`."""
    parts = {
        "products": sum(count * rates.product_s(*shape) for shape, count in products(job).items()),
        "bytes": sum(_seconds(stream, rates) for stream in streams(job)),
        "table_reads": min((_seconds(way, rates) for way in table_reads(job)), default=0.0),
    }
    return parts | {"total": sum(parts.values())}


def _seconds(stream: Stream, rates: Rates) -> float:
    return stream.num_bytes / rates.bandwidth(stream.working_set)
