"""What an NPC costs: our scheme beside the two that people use, in one process, in turns.

    python -m benchmarks.bench_mixed --device cpu|cuda [--threads 1] [--num-envs N] [--pairs 5] [--full] [--json FILE]

Prints one row per scheme (ours, masked-both, policy-loop: `schemes.py`) and cell: every share P of learners with one
NPC, and 4 and 16 NPCs at P = .5; with --full all shares with 1, 4 and 16. Columns and keys: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.floor import Rates
from benchmarks.measure import Row, measure_cell
from benchmarks.report_table import command, commit, header, line, machine
from benchmarks.schemes import Cell
from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.memory import keep_freed_memory
from dual_policy_plugin.policies.build import compute_dtype

CELLS = ((1.0, 0), (0.75, 1), (0.5, 1), (0.25, 1), (0.5, 4), (0.5, 16))
ALL_CELLS = ((1.0, 0), *((pct, num_npcs) for pct in (0.75, 0.5, 0.25) for num_npcs in (1, 4, 16)))
NUM_ENVS = {"cpu": 512, "cuda": 8192}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--num-envs", type=int, help="of 8 agents each; 512 on the CPU, 8192 on CUDA")
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5, help="turns of each scheme in a cell")
    parser.add_argument("--full", action="store_true", help="all shares with 1, 4 and 16 NPCs")
    parser.add_argument("--json", type=Path, help="where to write the rows too")
    options = parser.parse_args(arguments)
    for name in ("threads", "num_envs", "horizon", "hidden_size", "pairs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: use 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all cells, prints the table as it grows, and writes the JSON."""
    options = parse(arguments)
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `train` does
    num_envs = options.num_envs or NUM_ENVS[device.type]
    rates = Rates(device, compute_dtype("auto", device))
    facts = {
        "machine": machine(device),
        "commit": commit(),
        "command": command("benchmarks.bench_mixed", arguments),
        "dtype": str(rates.dtype),
    }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(
        f"{num_envs} envs of 8 agents, horizon {options.horizon}, {options.threads} thread(s), {options.pairs} turns\n"
    )
    print(header(), flush=True)
    rows: list[Row] = []
    for pct, num_npcs in ALL_CELLS if options.full else CELLS:
        cell = Cell(
            pct=pct, num_npcs=num_npcs, num_envs=num_envs, horizon=options.horizon, device=device,
            hidden_size=options.hidden_size,
        )  # fmt: skip
        for row in measure_cell(cell, options.pairs, rates):
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "rates": rates.as_dict(), "rows": rows}, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    try:
        main()
    except DualPolicyError as error:
        print(f"benchmarks.bench_mixed: {error}", file=sys.stderr)
        sys.exit(2)
