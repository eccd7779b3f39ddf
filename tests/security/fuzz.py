"""Loads mutated policy files one after the other and measures each: `python -m tests.security.fuzz --count 10000`.

Runs in a process of its own, so that a crash or a hang of the loader is seen, and so that the memory of one load can
be told from everything else: the kernel's high-water mark is reset before each.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from dual_policy_plugin.errors import CheckpointError
from tests.security.doors import complaints, load_for_run
from tests.security.hostile_files import all_files, write_scratch
from tests.security.mutations import ARGS, Mutation, huge_header, mutations, valid

MIB = 2**20
MAX_SECONDS = 5.0
"""Of one load; a sound file takes a few hundredths of a second."""


def peak_bytes() -> int:
    """The most memory that this process had since `resident_bytes`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def resident_bytes() -> int:
    """What this process has now, after it gave back what it had freed; the high-water mark begins there."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def judge(path: Path, mutation: Mutation) -> tuple[str | None, int, float]:
    """(what is wrong with how the mutation was met, or None; bytes that the load took; its seconds)."""
    kind, make, reason = mutation
    path.write_bytes(make())
    before = resident_bytes()
    begin = time.perf_counter()
    try:
        load_for_run(path)
        verdict: str | None = "it was loaded"
    except CheckpointError as error:
        message = str(error)
        is_good = str(path) in message and "\n" not in message and len(message) < 600 and re.search(reason, message)
        verdict = None if is_good else f"poor message, expected /{reason}/: {message[:300]!r}"
    except Exception as error:  # any other kind is a defect
        verdict = f"{type(error).__name__}: {error}"[:300]
    seconds, taken, size = time.perf_counter() - begin, peak_bytes() - before, path.stat().st_size
    if seconds > MAX_SECONDS:
        verdict = f"it took {seconds:.1f} s"
    if taken > 2 * size + 16 * MIB:
        verdict = f"it took {taken / MIB:.1f} MiB for a file of {size / MIB:.1f} MiB"
    return (None if verdict is None else f"{kind}: {verdict}"), taken, seconds


def refuse_hostile_files() -> int:
    """Every hostile file by one of the doors; prints one JSON line, gives 1 where one was met badly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canary = folder / "canaries" / "canary"
        canary.parent.mkdir()
        write_scratch(folder / "scratch", canary)
        files = list(all_files(canary, folder / "scratch", valid()))
        found = complaints(files, canary, folder)
    print(json.dumps({"hostile_files": len(files), "problems": len(found)}))
    print(*found[:20], sep="\n", end="", file=sys.stderr)
    return 1 if found else 0


def main() -> int:
    """Prints one JSON line of figures; exit code 1 where a mutation was met badly."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=ARGS["hidden_size"], help="2304 makes a file of 27 MB")
    parser.add_argument("--hostile", action="store_true", help="the hostile files instead, all of them")
    options = parser.parse_args()
    ARGS["hidden_size"] = options.hidden_size
    torch.set_num_threads(1)
    if options.hostile:
        return refuse_hostile_files()
    problems: list[str] = []
    kinds: Counter[str] = Counter()
    most, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(valid())
        load_for_run(path)  # so that what the loader imports is part of the baseline
        huge: Mutation = ("huge header", huge_header, r"claims 209715200 bytes, the bound is")
        stream = itertools.chain([huge], mutations(options.seed))
        for index, mutation in enumerate(itertools.islice(stream, options.count)):
            problem, taken, seconds = judge(path, mutation)
            kinds[mutation[0]] += 1
            most = max(most, taken - 2 * path.stat().st_size)
            slowest = max(slowest, seconds)
            if problem is not None:
                problems.append(f"number {index}, {problem}")
    figures = {
        "count": sum(kinds.values()),
        "problems": len(problems),
        "kinds": kinds,
        "most_mib_over_twice_the_file": round(most / MIB, 2),
        "slowest_s": round(slowest, 3),
        "file_bytes": len(valid()),
    }
    print(json.dumps(figures))
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
