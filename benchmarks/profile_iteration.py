"""Where an iteration spends its time, operator by operator or kernel by kernel.

    python -m benchmarks.profile_iteration --device cpu|cuda [--pct 0.5] [--num-npcs 1] [--num-envs N] [--json FILE]

Runs ours until everything is compiled and captured, then one iteration under torch's profiler. On CUDA the rows are
kernels with their time on the device; on the CPU operators with the time in themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_mixed import NUM_ENVS
from benchmarks.measure import iterate
from benchmarks.report_table import command, commit, machine
from benchmarks.schemes import Cell, make_ours
from dual_policy_plugin.cuda_graph import WARM_UPS
from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.memory import keep_freed_memory

_NAME_WIDTH = 90


def profiled_rows(cell: Cell, num_warm_ups: int) -> tuple[list[dict[str, Any]], float]:
    """Name, number of calls and microseconds of everything that ran in one iteration, longest first; its seconds."""
    scheme = make_ours(cell)
    for iteration in range(num_warm_ups):
        iterate(scheme, iteration)
    is_cuda = cell.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with profile(activities=activities) as profiler:
        seconds = iterate(scheme, num_warm_ups)["total"]
    rows = []
    for event in profiler.key_averages():
        if is_cuda:
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            time_us = event.self_device_time_total if is_kernel else 0.0
        else:
            time_us = event.self_cpu_time_total
        if time_us > 0:
            rows.append({"name": event.key, "calls": event.count, "us": time_us})
    return sorted(rows, key=lambda row: -row["us"]), seconds


def table(rows: list[dict[str, Any]], limit: int) -> str:
    """The first `limit` rows as Markdown, and what the others come to."""
    total = sum(row["us"] for row in rows) or 1.0
    lines = ["| us | share | calls | name |", "|---:|---:|---:|---|"]
    shown, rest = rows[:limit], rows[limit:]
    if rest:
        shown = [
            *shown,
            {"name": f"{len(rest)} others", "calls": sum(r["calls"] for r in rest), "us": sum(r["us"] for r in rest)},
        ]
    for row in shown:
        name = row["name"].replace("|", "/")[:_NAME_WIDTH]
        lines.append(f"| {row['us']:,.0f} | {row['us'] / total:.1%} | {row['calls']:,} | {name} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Profiles one iteration, prints the table and writes all rows to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--pct", type=float, default=0.5)
    parser.add_argument("--num-npcs", type=int, default=1)
    parser.add_argument("--num-envs", type=int, help="of 8 agents each; 512 on the CPU, 8192 on CUDA")
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--rows", type=int, default=40, help="how many to print")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if (options.pct == 1) != (options.num_npcs == 0):
        parser.error(f"--pct {options.pct} with --num-npcs {options.num_npcs}: 1 goes with 0 NPCs, less with 1 or more")
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    cell = Cell(
        pct=options.pct, num_npcs=options.num_npcs, num_envs=options.num_envs or NUM_ENVS[device.type],
        horizon=options.horizon, device=device, hidden_size=options.hidden_size,
    )  # fmt: skip
    rows, seconds = profiled_rows(cell, WARM_UPS + 2 if device.type == "cuda" else 1)
    facts = {
        "machine": machine(device),
        "commit": commit(),
        "command": command("benchmarks.profile_iteration", arguments),
        "seconds": seconds,
    }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"P={cell.pct}, {cell.num_npcs} NPCs, {cell.num_envs} envs of 8 agents, horizon {cell.horizon}\n")
    print(table(rows, options.rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except DualPolicyError as error:
        print(f"benchmarks.profile_iteration: {error}", file=sys.stderr)
        sys.exit(2)
