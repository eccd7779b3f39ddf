"""What `dual-policy doctor` asks of W&B, S3, Slurm and SkyPilot: only what is configured, and each for seconds at most.

No value of a key, a token or a password is ever part of a finding, nor the text of an error that may hold one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from dual_policy_plugin.commands.doctor_findings import MISSING, OK, WRONG, Finding, read_text

COMMAND_S = 1.5
"""How long a program of Slurm's may take to answer."""
NETWORK_S = 3
_WANDB_MODES = ("online", "offline", "disabled", "shared")


def probe_wandb(train_dir: Path) -> Iterator[Finding]:
    """The client, and where it is to be online, whether its login is taken; asks nothing at a terminal."""
    mode = os.environ.get("WANDB_MODE", "")
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

    host = _host("WANDB_BASE_URL") or "api.wandb.ai"
    try:
        with one_line_errors():
            entity = open_api(attempt_s=NETWORK_S - 1).default_entity
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
    if "Amazon" not in read_text("/sys/class/dmi/id/sys_vendor"):
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        mend = "pip install 'dual-policy-plugin[s3]', for s3:// policies and mirrors"
        yield Finding(what="S3", state=MISSING, fact="boto3 is not installed", mend=mend)
        return
    place = _host("AWS_ENDPOINT_URL") or "AWS"
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


def _host(variable: str) -> str:
    """Host and port of the URL in a variable; empty without one. What else stands in it may be a secret."""
    try:
        url = urlsplit(os.environ.get(variable, ""))
        return "" if url.hostname is None else url.hostname + (f":{url.port}" if url.port else "")
    except ValueError:  # a password with a slash ends the host where it should not
        return f"the host of {variable}"


def _answer(*words: str) -> str | None:
    """What a program prints; None where it fails or is silent. A file takes it: what the program starts may hang on."""
    with tempfile.TemporaryFile("w+") as file:
        try:
            done = subprocess.run(words, stdout=file, stderr=subprocess.DEVNULL, timeout=COMMAND_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        file.seek(0)
        return file.read() if done.returncode == 0 else None
