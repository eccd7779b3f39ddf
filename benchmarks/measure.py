"""Measures one cell of the table: all schemes in turns, their parts, their memory, the rows that they really ran.

Takes a Cell; gives one row (a dict) per scheme. The meaning of the keys stands in docs/performance.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Job, Rates, floor_s, row_step_flops
from benchmarks.memory_use import PeakMemory, tensors_of
from benchmarks.schemes import LEARNING_RATE, SCHEMES, SETTINGS, Cell, Scheme
from dual_policy_plugin.cuda_graph import WARM_UPS
from dual_policy_plugin.learning.ppo import prepare_targets
from dual_policy_plugin.policies.pool import TILE
from dual_policy_plugin.ranks.distributed import Ranks

PARTS = ("env", "learner_forward", "npc_forward", "stores", "advantage", "update")
Row = dict[str, Any]


class CountError(Exception):
    """A scheme ran other rows than it should have: its time could not be compared."""


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Has `owner.name(...)` go through `wrap(method)` for a while; an object's class is left as it is."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def wait_for(device: torch.device) -> None:
    """Returns once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def expected_rows(scheme: Scheme) -> dict[str, int]:
    """Rows that an iteration of the scheme should forward and train; the learner's include those of the last values."""
    cell, agents = scheme.cell, scheme.split.num_agents
    is_masked = scheme.name == "masked-both"
    learner = cell.num_envs * (agents if is_masked else scheme.split.num_learner)
    npc = cell.num_envs * (agents * cell.num_npcs if is_masked else scheme.split.num_npc)
    return {
        "learner_forward_rows": (cell.horizon + 1) * learner,
        "npc_forward_rows": cell.horizon * npc,
        "trained_rows": SETTINGS.epochs * cell.horizon * learner,
    }


def counted_iteration(scheme: Scheme) -> dict[str, int]:
    """Plays and trains iteration 0 with every forward call counted by its rows.

    Where a pool sorts rows by NPC, what fills up its tiles is counted apart, as `npc_filler_rows`.

    Raises:
        CountError: not the rows that the scheme stands for.
    """
    rows = dict.fromkeys(("learner_forward_rows", "npc_forward_rows", "npc_asked_rows", "trained_rows"), 0)

    def counting(key: str, axes: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(obs: Tensor, *args: Any, **kwargs: Any) -> Any:
                rows[key] += obs.shape[:axes].numel()
                return call(obs, *args, **kwargs)

            return counted

        return wrap

    def counting_kernel(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(policies: Any, learner: Any, npc: Any, *args: Any, **kwargs: Any) -> Any:
            rows["learner_forward_rows"] += len(learner.obs)
            rows["npc_forward_rows"] += 0 if npc is None else len(npc.obs)
            rows["npc_asked_rows"] += 0 if npc is None else len(npc.obs)
            return call(policies, learner, npc, *args, **kwargs)

        return counted

    def counting_stack(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            outputs, states = call(*args)
            rows["npc_forward_rows"] += outputs.shape[1]  # (num_actions + 1, slots), the fillers' too
            return outputs, states

        return counted

    pool = scheme.mixed.pool
    with ExitStack() as stack:
        if scheme.cell.device.type == "cuda":  # the fused rollout: one kernel for a step of all rows
            from dual_policy_plugin.kernels import policy_step

            stack.enter_context(wrapped(policy_step, "policy_step", counting_kernel))
        stack.enter_context(wrapped(scheme.learner, "forward_step", counting("learner_forward_rows")))
        stack.enter_context(wrapped(scheme.learner, "forward_segment", counting("trained_rows", 2)))
        for npc in scheme.npcs:
            stack.enter_context(wrapped(npc, "forward_step", counting("npc_forward_rows")))
        if pool is not None:
            stack.enter_context(wrapped(pool, "act", counting("npc_asked_rows")))
            if pool._stack is not None:  # its NPCs run as one, without calls of their own
                stack.enter_context(wrapped(pool._stack, "step", counting_stack))
        iterate(scheme, 0)
    asked = rows.pop("npc_asked_rows")
    filler = rows["npc_forward_rows"] - asked if pool is not None else 0
    rows["npc_forward_rows"] -= filler
    most_filler = scheme.cell.horizon * scheme.cell.num_npcs * (TILE - 1)
    if rows != (expected := expected_rows(scheme)) or not 0 <= filler <= most_filler:
        raise CountError(
            f"{scheme.name} at P={scheme.cell.pct}: ran {rows} and {filler} fillers, its work is {expected}"
        )
    return rows | {"npc_filler_rows": filler}


def iterate(scheme: Scheme, iteration: int, *, plainly: bool = False) -> dict[str, float]:
    """Plays, trains and reads the numbers that a run reads; gives the seconds of all, and of the update."""
    device = scheme.cell.device
    wait_for(device)
    start = time.perf_counter()
    (scheme.play_plainly if plainly else scheme.play)(iteration)
    if plainly:
        wait_for(device)
    middle = time.perf_counter()
    losses = scheme.ppo.update(scheme.experience, LEARNING_RATE)
    if plainly:
        wait_for(device)
    updated = time.perf_counter()
    torch.stack(list(losses.values())).tolist()
    scheme.metrics.take(Ranks())
    return {"total": time.perf_counter() - start, "update": updated - middle}


def timed_iteration(scheme: Scheme, iteration: int) -> dict[str, float]:
    """An iteration of plain calls, with the seconds of its parts.

    On CUDA the device is waited for around each part and nothing is captured or fused, so the parts add up to more than
    an iteration that runs freely: they say where plain torch spends its time.
    """
    device = scheme.cell.device
    seconds = dict.fromkeys(("env", "learner_forward", "npc_forward"), 0.0)

    def timing(part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any) -> Any:
                wait_for(device)
                start = time.perf_counter()
                result = call(*args)
                wait_for(device)
                seconds[part] += time.perf_counter() - start
                return result

            return timed

        return wrap

    with ExitStack() as stack:
        for name in ("observe", "step"):
            stack.enter_context(wrapped(scheme.env, name, timing("env")))
        stack.enter_context(wrapped(scheme.learner, "forward_step", timing("learner_forward")))
        if scheme.npc_forward is not None:
            stack.enter_context(wrapped(*scheme.npc_forward, timing("npc_forward")))
        whole = iterate(scheme, iteration, plainly=True)
    wait_for(device)
    start = time.perf_counter()  # once more, beside the iteration: the update keeps no clock inside
    prepare_targets(scheme.experience, SETTINGS, Ranks(), use_kernels=scheme.ppo.use_kernels)
    wait_for(device)
    advantage = time.perf_counter() - start
    stores = whole["total"] - whole["update"] - sum(seconds.values())
    return whole | seconds | {"stores": stores, "advantage": advantage, "update": whole["update"] - advantage}


def job_of(scheme: Scheme) -> Job:
    """The work that a cell needs, whatever the scheme."""
    cell, spec = scheme.cell, scheme.env.spec
    space = spec.observation_space
    return Job(
        num_learner_rows=cell.num_envs * scheme.split.num_learner,
        num_npc_rows=cell.num_envs * scheme.split.num_npc,
        horizon=cell.horizon,
        num_minibatches=SETTINGS.num_minibatches,
        epochs=SETTINGS.epochs,
        hidden_size=cell.hidden_size,
        num_actions=len(spec.actions),
        num_cells=space.window[0] * space.window[1],
        num_codes=len(space.features),
        num_own=len(space.own),
        obs_bytes=space.shape[0],
        dtype=scheme.learner.compute_dtype,
        device=cell.device,
    )


def bound_of(name: str, pct: float, num_npcs: int) -> float:
    """A scheme's counted work over ours, with F a row's forward and 3F its update: ours F + 3PF, masked-both
    (1 + K)F + 3F; policy-loop as ours.
    """
    return (4 + num_npcs) / (1 + 3 * pct) if name == "masked-both" else 1.0


def measure_cell(cell: Cell, pairs: int, rates: Rates) -> list[Row]:
    """One row per scheme. The schemes take turns, A B C C B A ...; figures are medians, ratios those of each turn."""
    schemes: dict[str, Scheme] = {}
    facts: dict[str, Row] = {}
    for name, make in SCHEMES.items():
        peak = PeakMemory(cell.device)
        scheme = schemes[name] = make(cell)
        facts[name] = dict(counted_iteration(scheme))
        count = 1
        while cell.device.type == "cuda" and count < WARM_UPS + 2:  # until both graphs are captured
            iterate(scheme, count)
            count += 1
        facts[name]["peak_bytes"] = peak.growth()
        facts[name]["held_bytes"] = sum(tensors_of(scheme.experience, scheme.mixed).values())
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in schemes}
    splits: dict[str, list[dict[str, float]]] = {name: [] for name in schemes}
    for turn in range(pairs):
        for name in list(schemes) if turn % 2 == 0 else list(schemes)[::-1]:
            scheme, iteration = schemes[name], 2 * (WARM_UPS + turn)
            if cell.device.type == "cuda":
                turns[name].append(iterate(scheme, iteration))
            splits[name].append(timed_iteration(scheme, iteration + 1))
    if cell.device.type != "cuda":  # there the clocks cost nothing: the iterations that are split are the measured ones
        turns = splits
    job = job_of(schemes["ours"])
    floor = floor_s(job, rates)
    return [
        facts[name]
        | _figures(scheme, turns, splits[name], floor["total"])
        | {"flops_per_row_step": row_step_flops(job), "floor_s": floor}
        for name, scheme in schemes.items()
    ]


def _figures(
    scheme: Scheme, turns: dict[str, list[dict[str, float]]], splits: list[dict[str, float]], floor: float
) -> Row:
    """What the measured seconds of a scheme come to."""
    cell, name = scheme.cell, scheme.name
    steps = cell.horizon * cell.num_envs * scheme.split.num_agents
    total = statistics.median(turn["total"] for turn in turns[name])
    bound = bound_of(name, cell.pct, cell.num_npcs)
    both = list(zip(turns[name], turns["ours"], strict=True))
    ratio = statistics.median(one["total"] / ours["total"] for one, ours in both)
    env_free = None
    if "env" in turns[name][0]:
        env_free = statistics.median((one["total"] - one["env"]) / (ours["total"] - ours["env"]) for one, ours in both)
    return {
        "scheme": name,
        "pct": cell.pct,
        "num_npcs": cell.num_npcs,
        "threads": torch.get_num_threads(),
        "num_envs": cell.num_envs,
        "horizon": cell.horizon,
        "env_agent_steps_per_s": steps / total,
        "learner_steps_per_s": steps / total * scheme.split.num_learner / scheme.split.num_agents,
        "ns_per_env_agent_step": total / steps * 1e9,
        **{f"{part}_ns": statistics.median(split[part] for split in splits) / steps * 1e9 for part in PARTS},
        "floor_ns": floor / steps * 1e9,
        "fraction_of_floor": floor / total,
        "ratio": ratio,
        "ratio_env_free": env_free,
        "bound": bound,
        "share_of_bound": (ratio if env_free is None else env_free) / bound,
    }
