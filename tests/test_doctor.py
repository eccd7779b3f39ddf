"""`dual-policy doctor` on machines of every kind: one line for each finding, in time, whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import dual_policy_plugin
from dual_policy_plugin.cli import main
from dual_policy_plugin.commands import doctor
from dual_policy_plugin.commands.doctor import examine
from dual_policy_plugin.commands.doctor_findings import Finding
from dual_policy_plugin.commands.doctor_services import _enabled_clouds
from tests.security.canaries import CANARIES, found_in, plant
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

ROOT = Path(dual_policy_plugin.__file__).parent.parent
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without logins, in a folder of their own."""
    for name in list(os.environ):
        if name.startswith(("WANDB", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def ask(probe: str, train_dir: Path = Path("train_dir")) -> Finding:
    """The one finding of a probe."""
    (found,) = examine(train_dir, [probe])
    return found


def stub(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name that is found before the installed one."""
    (folder / "stubs" / name).mkdir(parents=True)
    (folder / "stubs" / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder / "stubs"))


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    if str(path.parent) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert main(["doctor", "--json"]) == 0
    assert time.monotonic() - begun < 10
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(found)[:5] == ["Python", "packages", "CPU", "memory", "train_dir"]
    assert found["Python"]["fact"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert f"{len(os.sched_getaffinity(0))} cores" in found["CPU"]["fact"]
    assert dual_policy_plugin.__version__ in found["packages"]["fact"]
    assert found["CUDA"]["state"] == "missing"  # the tests hide GPUs
    assert (found["W&B"]["state"], found["S3"]["state"]) == ("missing", "missing")
    assert list(Path().glob("train_dir*")) == []


def test_the_table_names_fact_and_mend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(doctor, "_ORDER", ("s3", "python"))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok      Python ") for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("missing S3"))
    assert "no login found" in lines[at]
    assert lines[at + 1].strip().startswith("-> aws configure")


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ("raise ImportError('libtorch.so: cannot open')", "cannot be imported (libtorch.so: cannot open)"),
        ("raise RuntimeError('x')", "its installation is broken (RuntimeError)"),
        ("import os; os.abort()", "its check ended with code -6"),
        ("raise ModuleNotFoundError(name='torch')", "not installed"),
    ],
)
def test_a_broken_torch_is_said_in_one_line(
    source: str, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(tmp_path, "torch", source, monkeypatch)
    found = ask("torch")
    assert (found.what, found.is_needed, found.fact) == ("torch", True, fact)
    assert found.state in ("wrong", "missing")
    assert "install" in found.mend


def test_an_old_torch_is_wrong_and_ends_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "class V: cuda = None\nclass C:\n    is_available = staticmethod(lambda: False)\nversion, cuda = V, C\n"
    old += "__version__ = '2.9.1'\ndef ones(*s):\n    import numpy\n    return numpy.ones(s)\n"
    stub(tmp_path, "torch", old, monkeypatch)
    monkeypatch.setattr(doctor, "_ORDER", ("torch",))
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: training cannot work here: torch: 2.9.1\n"
    assert "pip install 'torch>=2.10'" in captured.out


GPU = """
import numpy
from types import SimpleNamespace as N
__version__ = "2.13.0+cu129"
version = N(cuda="12.9")
facts = N(name="NVIDIA H200", total_memory=150e9, major=9)
cuda = N(is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: facts)
def ones(*shape, device="cpu"):
    TROUBLE
    return numpy.ones(shape)
"""


def test_a_gpu_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "torch", GPU.replace("TROUBLE", "pass"), monkeypatch)
    found = examine(Path("train_dir"), ["torch"])
    assert [(one.what, one.state) for one in found][:2] == [("torch", "ok"), ("cuda:0", "ok")]
    assert found[1].fact == "NVIDIA H200, 150 GB, CUDA 12.9, bf16"
    assert (found[2].what, found[2].is_needed) == ("Triton", found[2].state == "missing")


def test_a_gpu_that_is_there_and_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = "if device != 'cpu': raise RuntimeError('CUDA error: no kernel image\\nmore')"
    stub(tmp_path, "torch", GPU.replace("TROUBLE", trouble), monkeypatch)
    found = examine(Path("train_dir"), ["torch"])[1]
    assert (found.state, found.is_needed) == ("wrong", True)
    assert found.fact.endswith("; it does not work: CUDA error: no kernel image")
    assert "device=cpu" in found.mend


def test_nothing_that_is_optional_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "boto3", "sky"):
        stub(tmp_path, name, "raise RuntimeError('secret')", monkeypatch)
    found = examine(Path("train_dir"), ["wandb", "s3", "sky"])
    assert [(one.what, one.state, one.is_needed) for one in found] == [
        ("W&B", "wrong", False), ("S3", "wrong", False), ("SkyPilot", "wrong", False),
    ]  # fmt: skip
    assert "secret" not in str(found)


def test_what_is_not_installed_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "boto3", "sky"):
        stub(tmp_path, name, f"raise ModuleNotFoundError(name={name!r})", monkeypatch)
    found = examine(Path("train_dir"), ["wandb", "s3", "sky"])
    assert [(one.what, one.state) for one in found] == [("W&B", "missing"), ("S3", "missing"), ("SkyPilot", "missing")]
    assert all(one.mend.startswith("pip install") for one in found)


def test_a_folder_of_the_users_own_is_no_package() -> None:
    Path("torch").mkdir()
    Path("torch/__init__.py").write_text("raise RuntimeError")
    Path("json.py").write_text("raise RuntimeError")
    assert examine(Path("train_dir"), ["torch"])[0].state == "ok"


def test_a_disk_without_room_or_rights(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    found = [one for one in examine(tmp_path / "taken" / "train_dir", ["machine"]) if one.what == "train_dir"]
    assert [(one.state, one.is_needed) for one in found] == [("wrong", True)]
    assert "cannot be written" in found[0].fact
    assert "train_dir=" in found[0].mend


# Weights & Biases


def use(server: WandbServer, monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**server.env, **changes}.items():
        monkeypatch.setenv(name, value)


def test_a_login_that_works(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    use(wandb_server, monkeypatch)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = ask("wandb")
    assert found.state == "ok", found
    assert "logged in at 127.0.0.1" in found.fact


def test_a_login_that_is_refused(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    use(wandb_server, monkeypatch, WANDB_API_KEY="0" * 40)
    found = ask("wandb")
    assert found.state == "wrong"
    assert "0" * 8 not in str(found)


def test_a_server_that_is_not_there(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    use(wandb_server, monkeypatch, WANDB_BASE_URL=CLOSED)
    begun = time.monotonic()
    found = ask("wandb")
    assert found.state == "wrong"
    assert time.monotonic() - begun < 6


@pytest.mark.parametrize(
    ("mode", "state", "fact"),
    [("offline", "ok", "nothing is sent"), ("disabled", "ok", ""), ("onlin", "wrong", "no mode")],
)
def test_the_mode_of_wandb(mode: str, state: str, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)  # nobody is asked
    found = ask("wandb")
    assert found.state == state
    assert fact in found.fact


# S3


def test_an_s3_that_takes_the_login(s3_server: S3Server) -> None:  # noqa: F811
    found = ask("s3")
    assert found.state == "ok"
    assert "login from env" in found.fact
    assert "127.0.0.1" in found.fact


def test_an_s3_that_is_not_there(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", CLOSED)
    found = ask("s3")
    assert (found.state, found.fact) == ("wrong", "127.0.0.1:9 cannot be used (EndpointConnectionError)")


def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nope")
    assert ask("s3").state == "wrong"


# Slurm and SkyPilot


def test_a_slurm_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["sleep", f"98765.{os.getpid()}"]  # other tests' programs may hang too
    for name in ("sbatch", "squeue", "sinfo"):
        program(tmp_path, name, " ".join(own), monkeypatch)
    begun = time.monotonic()
    found = ask("slurm")
    assert (found.state, found.fact) == ("wrong", "sbatch is here, squeue does not answer")
    assert time.monotonic() - begun < 5
    while own in [one.info["cmdline"] for one in psutil.process_iter(["cmdline"])]:  # to die takes a moment
        assert time.monotonic() - begun < 10
        time.sleep(0.01)


def test_a_slurm_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sbatch", "exit 1", monkeypatch)
    program(tmp_path, "squeue", "echo 7; echo 8", monkeypatch)
    program(tmp_path, "sinfo", "echo 'main*'; echo gpu", monkeypatch)
    found = ask("slurm")
    assert found.fact.startswith("2 jobs in the queue, partitions: gpu, main*")


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (ask("slurm").state, ask("slurm").fact) == ("missing", "no sbatch here")


def test_the_clouds_that_skypilot_knows(tmp_path: Path) -> None:
    import sqlite3

    (tmp_path / ".sky").mkdir()
    database = sqlite3.connect(tmp_path / ".sky" / "state.db")
    database.execute("CREATE TABLE config (key TEXT, value TEXT)")
    database.execute("INSERT INTO config VALUES ('enabled_clouds_default_compute', '[\"AWS\", \"GCP\"]')")
    database.commit()
    database.close()
    assert _enabled_clouds() == ["AWS", "GCP"]
    (tmp_path / ".sky" / "state.db").write_bytes(b"no database")
    assert _enabled_clouds() == []


# All together


def test_a_probe_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "sky", "import time; time.sleep(1000)", monkeypatch)
    monkeypatch.setattr(doctor, "PROBE_S", 1.0)
    begun = time.monotonic()
    found = ask("sky")
    assert (found.state, found.fact, found.is_needed) == ("wrong", "no answer in 1 s", False)
    assert time.monotonic() - begun < 3


@pytest.mark.slow
def test_no_secret_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    variables = plant(home) | {
        "WANDB_BASE_URL": f"http://me:{CANARIES['HTTPS_PROXY']}@127.0.0.1:9/?key={CANARIES['FTP_PROXY']}",
        "AWS_ENDPOINT_URL": f"http://me:{CANARIES['ALL_PROXY']}@127.0.0.1:9/?key={CANARIES['FTP_PROXY']}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for words in (["doctor"], ["doctor", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "dual_policy_plugin", *words], capture_output=True, timeout=60,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"127.0.0.1:9" in done.stdout
        assert found_in(done.stdout + done.stderr) == []
        assert b"Traceback" not in done.stderr
