"""What a bench prints and writes: a table that is Markdown too, and the facts of machine and code."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def _number(key: str, spec: str, unit: int = 1) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else format(row[key] if unit == 1 else row[key] / unit, spec)


COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {
    "scheme": (11, lambda row: row["scheme"]),
    "P": (4, _number("pct", ".2f")),
    "K": (2, _number("num_npcs", "d")),
    "env-agent-steps/s": (17, _number("env_agent_steps_per_s", ",.0f")),
    "learner-steps/s": (15, _number("learner_steps_per_s", ",.0f")),
    "ns/step": (8, _number("ns_per_env_agent_step", ",.1f")),
    "env": (8, _number("env_ns", ",.1f")),
    "learner": (8, _number("learner_forward_ns", ",.1f")),
    "NPC": (8, _number("npc_forward_ns", ",.1f")),
    "stores": (8, _number("stores_ns", ",.1f")),
    "adv.": (7, _number("advantage_ns", ",.1f")),
    "update": (8, _number("update_ns", ",.1f")),
    "held MB": (8, _number("held_bytes", ",.1f", 10**6)),
    "peak MB": (8, _number("peak_bytes", ",.1f", 10**6)),
    "of floor": (8, _number("fraction_of_floor", ".1%")),
    "x ours": (6, _number("ratio", ".2f")),
    "env-free": (8, _number("ratio_env_free", ".2f")),
    "bound": (6, _number("bound", ".2f")),
    "share": (6, _number("share_of_bound", ".1%")),
    "learner rows": (12, _number("learner_forward_rows", ",d")),
    "NPC rows": (12, _number("npc_forward_rows", ",d")),
    "filler": (9, _number("npc_filler_rows", ",d")),
    "trained rows": (12, _number("trained_rows", ",d")),
}


def header() -> str:
    """The two lines above the rows."""
    names = " | ".join(name.rjust(width) for name, (width, _) in COLUMNS.items())
    return f"| {names} |\n| {' | '.join('-' * (width - 1) + ':' for width, _ in COLUMNS.values())} |"


def line(row: Row) -> str:
    """One row."""
    return f"| {' | '.join(show(row).rjust(width) for width, show in COLUMNS.values())} |"


def machine(device: torch.device) -> str:
    """Processor or GPU, cores, torch."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [text.partition(":")[2].strip() for text in info.read_text().splitlines() if "model name" in text]
        name = f"{len(models)} x {models[0]}" if models else name
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{name}, torch {torch.__version__}"


def commit() -> str:
    """The short hash of the code's commit, with "+" where files differ from it; "unknown" outside a repository."""

    def git(*args: str) -> str:
        root = Path(__file__).parent
        found = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command(module: str, arguments: Iterable[str] | None = None) -> str:
    """The command line that repeats this run."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])
