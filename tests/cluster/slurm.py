"""A real Slurm on this machine, for the tests: munged, slurmctld and two slurmd on loopback, in a folder of their own.

    python -m tests.cluster.slurm FOLDER

holds the cluster up until its stdin ends, then ends jobs and daemons. So nothing stays behind where the process that
asked for it is killed. Two nodes of four cores each are claimed, whatever the machine has.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SBIN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"))
NODES = ("node1", "node2")
CONF = """\
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 CoresPerSocket=4 RealMemory=2000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 CoresPerSocket=4 RealMemory=2000
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=5
PartitionName=short Nodes=node[1-2] MaxTime=5 PriorityTier=1
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
"""cred_expire: a requeued job waits that long and no shorter. config_overrides: the cores are believed, not counted."""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    needed = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
    absent = [name for name in needed if not shutil.which(name, path=SBIN)]
    if absent:
        return f"Slurm is not installed here ({', '.join(absent)}); `make setup-cluster` installs it on Debian"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root here"


@dataclass(kw_only=True, frozen=True)
class Cluster:
    """A running Slurm: where its files are, and what its commands say."""

    folder: Path
    conf: Path

    def ask(self, *words: str) -> str:
        """What a command of Slurm's prints."""
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """The state of each job that is waiting or running, by its id."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def wait_for(self, state: str, name: str, timeout_s: float = 40.0) -> str:
        """Waits until the job of that name has the state; gives its id."""
        deadline = time.monotonic() + timeout_s
        while not (line := self.ask("squeue", "--noheader", f"--name={name}", "--format=%i %T")).endswith(f" {state}"):
            assert time.monotonic() < deadline, f"job {name} is {line}, not {state}"
            time.sleep(0.1)
        return line.split()[0]

    def clear(self) -> None:
        """Ends all jobs at once, and waits until they are gone."""
        while self.states():
            self.ask("scancel", "--quiet", "--signal=KILL", "--full", "--user=root")
            self.ask("scancel", "--quiet", "--user=root")
            time.sleep(0.2)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """A cluster with its files in `folder`, up for as long as the context is."""
    command = [sys.executable, "-m", "tests.cluster.slurm", str(folder)]
    keeper = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        line = keeper.stdout.readline().strip()
        assert line == "up", f"Slurm did not start: {line}; logs in {folder}"
        yield Cluster(folder=folder, conf=folder / "slurm.conf")
    finally:
        keeper.stdin.close()
        keeper.stdout.close()
        keeper.wait(timeout=60)


def keep(folder: Path) -> None:
    """Starts the daemons, says `up`, and ends them when stdin ends."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # munged refuses a folder that others can write to
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], folder=folder, ports=_free_ports(3)))
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    os.environ |= {"SLURM_CONF": str(conf), "PATH": SBIN}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _start(folder, daemons)
        print("up", flush=True)
        sys.stdin.read()
    finally:
        _stop(daemons)


def _start(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"))]
    files += [f"--key-file={key}", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
    with (folder / "daemons.log").open("wb") as log:
        for command in (
            ["munged", "--foreground", "--force", *files],
            ["slurmctld", "-D"],
            *(["slurmd", "-D", "-N", node] for node in NODES),
        ):
            # inherits no pipe of ours: whoever waits for the end of our output would wait for the daemons' too
            daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.sock").exists(), daemons, log.name)
    _wait(lambda: _say("sinfo", "-h", "-p", "main", "-o", "%T %D") == f"idle {len(NODES)}", daemons, log.name)


def _wait(is_there: object, daemons: Sequence[subprocess.Popen[bytes]], log: str) -> None:
    assert callable(is_there)
    deadline = time.monotonic() + 30
    while not is_there():
        ended = [str(one.args) for one in daemons if one.poll() is not None]
        if ended or time.monotonic() > deadline:
            sys.exit(f"not up; ended: {ended}; see {log} and the logs beside it")
        time.sleep(0.05)


def _say(*words: str) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(words, capture_output=True, text=True, timeout=3, check=False).stdout.strip()
    return ""


def _stop(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    if _say("squeue", "-h"):
        _say("scancel", "--signal=KILL", "--full", "--user=root")
        _say("scancel", "--user=root")
        deadline = time.monotonic() + 15
        while _say("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.1)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
