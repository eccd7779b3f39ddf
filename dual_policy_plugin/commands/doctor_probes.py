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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OK, MISSING, WRONG = "ok", "missing", "wrong"
COMMAND_S = 1.5
"""How long a program of Slurm's may take to answer."""
NETWORK_S = 3
MIN_FREE_GB = 1.0
LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 10)
_WANDB_MODES = ("online", "offline", "disabled", "shared")


@dataclass(kw_only=True, slots=True, frozen=True)
class Finding:
    """One line of the answer."""

    what: str
    state: str
    """ok | missing | wrong."""
    fact: str
    mend: str = ""
    """What to do; empty where nothing is to be done."""
    is_needed: bool = False
    """Whether training needs it."""


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
    flags = set(re.findall(r"\w+", _read("/proc/cpuinfo").partition("flags")[2].partition("\n")[0]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kinds = [name for name, flag in (("bf16", "avx512_bf16"), ("AMX", "amx_bf16")) if flag in flags]
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f"OMP_NUM_THREADS={threads}" if threads else "threads as trainer.threads says"
    yield Finding(
        what="CPU", state=OK, fact=f"{cores} cores, {' and '.join(kinds) or 'no bf16'}, {limit}",
        mend="" if kinds else "trainer.precision=auto takes fp32 here, which is slower",
    )  # fmt: skip
    match = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
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


def probe_wandb(train_dir: Path) -> Iterator[Finding]:
    """The client, and where it is to be online, whether its login is taken; asks nothing at a terminal."""
    mode = os.environ.get("WANDB_MODE", "")
    os.environ["WANDB_HTTP_TIMEOUT"] = str(NETWORK_S)  # in place of minutes
    os.environ["WANDB__GRAPHQL_RETRY_MAX"] = "0"
    try:
        import wandb

        release = str(wandb.__version__)
    except (ImportError, AttributeError):  # a folder `wandb` beside us imports as an empty package
        mend = "pip install 'dual-policy-plugin[wandb]', if runs are to go to W&B"
        yield Finding(what="W&B", state=MISSING, fact="not installed; runs are logged here alone", mend=mend)
        return
    if mode in _WANDB_MODES[1:3]:
        yield Finding(what="W&B", state=OK, fact=f"{release}, WANDB_MODE={mode}: nothing is sent")
        return
    if mode and mode not in _WANDB_MODES:
        mend = f"use {', '.join(_WANDB_MODES)}, or unset it"
        yield Finding(what="W&B", state=WRONG, fact=f"{release}, WANDB_MODE={mode[:20]!a} is no mode", mend=mend)
        return
    from dual_policy_plugin.errors import NoLoginError, NoNetworkError, WandbError
    from dual_policy_plugin.wandb_runs import one_line_errors, open_api

    host = re.sub(r"^\w+://([^@/]*@)?", "", os.environ.get("WANDB_BASE_URL") or "api.wandb.ai").rstrip("/")
    try:
        with one_line_errors():
            entity = open_api().default_entity
        yield Finding(what="W&B", state=OK, fact=f"{release}, logged in at {host} as {entity or 'nobody by default'}")
    except NoNetworkError:
        mend = "see the network and WANDB_BASE_URL; wandb=offline keeps the figures here"
        yield Finding(what="W&B", state=WRONG, fact=f"{release}, {host} cannot be reached", mend=mend)
    except NoLoginError as error:
        absent = str(error).startswith("no W&B login; ")
        fact = f"{release}, " + ("no login" if absent else f"{host} refuses the login")
        mend = "wandb login, or set WANDB_API_KEY, if runs are to go to W&B"
        yield Finding(what="W&B", state=MISSING if absent else WRONG, fact=fact, mend=mend)
    except WandbError:
        yield Finding(
            what="W&B", state=WRONG, fact=f"{release}, {host} does not answer as W&B does", mend="see WANDB_BASE_URL"
        )


def probe_s3(train_dir: Path) -> Iterator[Finding]:
    """boto3, and whether its login is taken where one is found; a cloud's metadata are asked in that cloud only."""
    if "Amazon" not in _read("/sys/class/dmi/id/sys_vendor"):
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        mend = "pip install 'dual-policy-plugin[s3]', for s3:// policies and mirrors"
        yield Finding(what="S3", state=MISSING, fact="boto3 is not installed", mend=mend)
        return
    place = re.sub(r"^\w+://([^@/]*@)?", "", os.environ.get("AWS_ENDPOINT_URL", "")) or "AWS"
    try:
        session = boto3.session.Session()
        login = session.get_credentials()
        if login is None:
            mend = "aws configure, or set AWS_PROFILE, for s3:// policies and mirrors"
            yield Finding(what="S3", state=MISSING, fact=f"boto3 {boto3.__version__}, no login found", mend=mend)
            return
        config = Config(connect_timeout=NETWORK_S, read_timeout=NETWORK_S, retries={"total_max_attempts": 1})
        fact = f"boto3 {boto3.__version__}, login from {login.method}"
        session.client("s3", config=config).list_buckets()
        yield Finding(what="S3", state=OK, fact=f"{fact}, {place} takes it")
    except ClientError as error:
        code = re.sub(r"\W", "", str(error.response.get("Error", {}).get("Code", "")))[:40]
        if code == "AccessDenied":  # a login may well be for some buckets only
            yield Finding(what="S3", state=OK, fact=f"{fact}, {place} knows it; it may not list buckets")
            return
        yield Finding(
            what="S3", state=WRONG, fact=f"{fact}, {place} answers {code}", mend="renew the login (aws configure)"
        )
    except (BotoCoreError, ValueError) as error:
        mend = "see AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws and the network"
        yield Finding(what="S3", state=WRONG, fact=f"{place} cannot be used ({type(error).__name__})", mend=mend)


def probe_slurm(train_dir: Path) -> Iterator[Finding]:
    """Slurm's commands, whether its controller answers, and submitit."""
    if shutil.which("sbatch") is None:
        yield Finding(
            what="Slurm", state=MISSING, fact="no sbatch here", mend="start jobs from a login node of the cluster"
        )
        return
    listed, partitions = _answer("squeue", "--noheader", "--format=%i"), _answer("sinfo", "--noheader", "--format=%P")
    if listed is None or partitions is None:
        silent = "squeue" if listed is None else "sinfo"
        mend = "see that slurmctld runs and that this machine may ask it (scontrol ping)"
        yield Finding(what="Slurm", state=WRONG, fact=f"sbatch is here, {silent} does not answer", mend=mend)
        return
    names = ", ".join(sorted(set(partitions.split()))[:8]) or "none"
    fact = f"{len(listed.split())} jobs in the queue, partitions: {names}"
    try:
        is_there = bool(version("hydra-submitit-launcher"))
    except PackageNotFoundError:
        is_there = False
    mend = "" if is_there else "pip install 'dual-policy-plugin[slurm]'"
    yield Finding(
        what="Slurm", state=OK if is_there else MISSING, mend=mend,
        fact=fact if is_there else f"{fact}; hydra-submitit-launcher is not installed",
    )  # fmt: skip


def probe_sky(train_dir: Path) -> Iterator[Finding]:
    """SkyPilot, and the clouds that it found usable when it was last asked; asks nobody."""
    from dual_policy_plugin.errors import LaunchError
    from dual_policy_plugin.launch.sky_sdk import load_sky

    try:
        sky = load_sky()
    except LaunchError:
        mend = "pip install skypilot, if runs are to go to a cloud"
        yield Finding(what="SkyPilot", state=MISSING, fact="not installed", mend=mend)
        return
    release = getattr(sky, "__version__", "")
    clouds = _enabled_clouds()
    if not clouds:
        mend = "sky check says what each cloud wants, if runs are to go to one"
        yield Finding(what="SkyPilot", state=MISSING, fact=f"{release}, no cloud is enabled", mend=mend)
        return
    yield Finding(what="SkyPilot", state=OK, fact=f"{release}, enabled: {', '.join(clouds)}")


def _enabled_clouds() -> list[str]:
    """What `sky check` has written down, read from its database as it is; none where there is none."""
    import sqlite3

    path = Path("~/.sky/state.db").expanduser()
    if not path.is_file():
        return []
    names: set[str] = set()
    place = f"file:{path}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error, ValueError, TypeError),
        contextlib.closing(sqlite3.connect(place, uri=True, timeout=1)) as database,
    ):
        for (value,) in database.execute("SELECT value FROM config WHERE key LIKE 'enabled_clouds_%'"):
            names |= {str(name) for name in json.loads(value)}
    return sorted(names)


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


def _answer(*words: str) -> str | None:
    """What a program prints; None where it fails or is silent. A file takes it: what the program starts may hang on."""
    with tempfile.TemporaryFile("w+") as file:
        try:
            done = subprocess.run(words, stdout=file, stderr=subprocess.DEVNULL, timeout=COMMAND_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        file.seek(0)
        return file.read() if done.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
