"""What `dual-policy doctor` looks at, one function for each; run in a process of its own, which may hang or die.

    python -m dual_policy_plugin.commands.doctor_probes NAME TRAIN_DIR

prints its findings as a JSON list. Nothing here raises for what it finds: whatever is broken is a finding. No value of
a key, a token or a password is ever part of one, nor the text of an error that may hold one.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dual_policy_plugin.commands.doctor_findings import MISSING, OK, WRONG, Finding, read_text
from dual_policy_plugin.commands.doctor_services import probe_s3, probe_sky, probe_slurm, probe_wandb

MIN_FREE_GB = 1.0
LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 10)


def probe_python(train_dir: Path) -> Iterator[Finding]:
    """The interpreter, this package, and the packages that every command needs."""
    from dual_policy_plugin import __version__

    is_right = sys.version_info >= LEAST_PYTHON
    yield Finding(
        what="Python",
        state=OK if is_right else WRONG,
        fact=f"{platform.python_version()} at {sys.executable}",
        mend="" if is_right else "install Python 3.11 or newer and make the environment anew",
        is_needed=True,
    )
    found, absent = [f"dual-policy-plugin {__version__}"], []
    for name in ("hydra-core", "omegaconf", "numpy", "safetensors", "rich", "matplotlib"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    yield Finding(
        what="packages",
        state=MISSING if absent else OK,
        fact=", ".join(found) + (f"; without {', '.join(absent)}" if absent else ""),
        mend="pip install dual-policy-plugin" if absent else "",
        is_needed=True,
    )


def probe_machine(train_dir: Path) -> Iterator[Finding]:
    """CPU, memory and disks, as this process may use them; needs no torch."""
    flags = set(re.findall(r"\w+", read_text("/proc/cpuinfo").partition("flags")[2].partition("\n")[0]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kinds = [name for name, flag in (("bf16", "avx512_bf16"), ("AMX", "amx_bf16")) if flag in flags]
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f"OMP_NUM_THREADS={threads}" if threads else "threads as trainer.threads says"
    yield Finding(
        what="CPU", state=OK, fact=f"{cores} cores, {' and '.join(kinds) or 'no bf16'}, {limit}",
        mend="" if kinds else "trainer.precision=auto takes fp32 here, which is slower",
    )  # fmt: skip
    match = re.search(r"MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo"))
    if match:
        free = int(match[1]) / 1e6
        yield Finding(
            what="memory", state=OK if free >= 1 else WRONG, fact=f"{free:.1f} GB free",
            mend="" if free >= 1 else "lower env.num_envs, or end what uses it",
        )  # fmt: skip
    yield _disk("train_dir", train_dir, "free some, or set train_dir= to another disk", is_needed=True)
    cache = Path(os.environ.get("DUAL_POLICY_CACHE") or "~/.cache/dual-policy")
    yield _disk("cache", cache, "free some, or set DUAL_POLICY_CACHE to a folder with room", is_needed=False)


def probe_torch(train_dir: Path) -> Iterator[Finding]:
    """torch, and what GPUs it sees; each does one multiplication."""
    try:
        import torch
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        yield Finding(
            what="torch",
            state=MISSING if absent else WRONG,
            fact="not installed" if absent else f"cannot be imported ({_line(error)})",
            mend=f"pip install {'' if absent else '--force-reinstall '}'torch>=2.10'",
            is_needed=True,
        )
        return
    numbers = [int(part) for part in re.findall(r"\d+", str(torch.__version__))[:2]]
    is_right = tuple(numbers) >= LEAST_TORCH and float((torch.ones(2, 2) @ torch.ones(2, 2)).sum()) == 8.0
    yield Finding(
        what="torch", state=OK if is_right else WRONG, fact=str(torch.__version__),
        mend="" if is_right else "pip install 'torch>=2.10'", is_needed=True,
    )  # fmt: skip
    yield from _gpus(torch)


def _gpus(torch: Any) -> Iterator[Finding]:
    built = torch.version.cuda
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        if not driver:
            yield Finding(what="CUDA", state=MISSING, fact="no GPU here; training runs on the CPU")
            return
        mend = "update the driver, or unset CUDA_VISIBLE_DEVICES" if built else "install torch's build for CUDA"
        fact = "nvidia-smi is here, and torch sees no GPU" if built else "a GPU's driver is here, torch is without CUDA"
        yield Finding(what="CUDA", state=WRONG, fact=fact, mend=mend)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        has_bf16 = facts.major >= 8
        try:
            ones = torch.ones(2, 2, device=f"cuda:{index}")
            works = float((ones @ ones).sum()) == 8
            trouble = "" if works else "; it computes wrong"
        except RuntimeError as error:
            works, trouble = False, f"; it does not work: {_line(error)}"
        yield Finding(
            what=f"cuda:{index}", state=OK if works else WRONG, is_needed=True,
            fact=f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, CUDA {built}, "
            f"{'bf16' if has_bf16 else 'no bf16'}{trouble}",
            mend="" if works else "see nvidia-smi; device=cpu trains without it",
        )  # fmt: skip
    try:
        import triton

        yield Finding(what="Triton", state=OK, fact=str(triton.__version__))
    except ImportError:
        yield Finding(
            what="Triton", state=MISSING, fact="not installed; trainer.fused=true needs it on a GPU",
            mend="pip install triton, or trainer.fused=false", is_needed=True,
        )  # fmt: skip


PROBES: dict[str, Callable[[Path], Iterator[Finding]]] = {
    "python": probe_python,
    "machine": probe_machine,
    "torch": probe_torch,
    "wandb": probe_wandb,
    "s3": probe_s3,
    "slurm": probe_slurm,
    "sky": probe_sky,
}
TITLES = {
    "python": "Python", "machine": "machine", "torch": "torch", "wandb": "W&B", "s3": "S3", "slurm": "Slurm",
    "sky": "SkyPilot",
}  # fmt: skip
NEEDED = ("python", "machine", "torch")
"""Probes that training stands on; where one dies, so would a run."""


def findings_of(name: str, train_dir: Path) -> list[Finding]:
    """What a probe finds; that it broke, where it did, by the kind of error alone: a text may hold a secret."""
    found: list[Finding] = []
    try:
        found.extend(PROBES[name](train_dir))
    except Exception as error:
        fact = f"its installation is broken ({type(error).__name__})"
        mend = "install it again" if name not in NEEDED else "install dual-policy-plugin and torch again"
        found.append(Finding(what=TITLES[name], state=WRONG, fact=fact, mend=mend, is_needed=name in NEEDED))
    return found


def main(name: str, train_dir: str) -> None:
    """Prints the findings of a probe; whatever a library prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        found = findings_of(name, Path(train_dir))
    print(json.dumps([asdict(one) for one in found]), flush=True)
    os._exit(0)  # a library's threads may not want to end


def _disk(what: str, folder: Path, mend: str, *, is_needed: bool) -> Finding:
    """Whether a folder, or the nearest above it that is there, can be written and has room."""
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free / 1e9
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fact = f"{there} cannot be written: {error.strerror}"
        return Finding(what=what, state=WRONG, fact=fact, mend=mend, is_needed=is_needed)
    is_right = free >= MIN_FREE_GB
    return Finding(
        what=what, state=OK if is_right else WRONG, fact=f"{free:,.1f} GB free at {there}",
        mend="" if is_right else mend, is_needed=is_needed,
    )  # fmt: skip


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
