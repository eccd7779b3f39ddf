from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.memory import available_bytes, available_ram, check_memory

GB = 10**9
MIB = 2**20


def write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(root: Path, cgroup: str, groups: dict[str, str]) -> int:
    write(root / "proc", {"meminfo": "MemTotal: 9999 kB\nMemAvailable:    1048576 kB\n", "self/cgroup": cgroup})
    write(root / "cgroup", groups)
    return available_ram(root / "proc", root / "cgroup")


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    groups = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 0\n"}
    assert machine(tmp_path, "0::/\n", groups) == 1024 * MIB


def test_a_cgroup_limit_counts_less_usage_plus_cache(tmp_path: Path) -> None:
    groups = {
        "job/memory.max": f"{600 * MIB}\n",
        "job/memory.current": f"{500 * MIB}\n",
        "job/memory.stat": f"anon {300 * MIB}\ninactive_file {150 * MIB}\n",
    }
    assert machine(tmp_path, "0::/job/step\n", groups) == 250 * MIB  # 600 - (500 - 150), the parent's limit


def test_the_smallest_of_nested_limits_counts(tmp_path: Path) -> None:
    groups = {}
    for group, limit in (("job", 400), ("job/step", 900)):
        groups |= {f"{group}/memory.max": f"{limit * MIB}", f"{group}/memory.current": f"{100 * MIB}"}
        groups[f"{group}/memory.stat"] = "inactive_file 0"
    assert machine(tmp_path, "0::/job/step\n", groups) == 300 * MIB


def test_cgroup_v1_and_a_container_whose_path_is_the_hosts(tmp_path: Path) -> None:
    groups = {
        "memory/memory.limit_in_bytes": f"{800 * MIB}\n",
        "memory/memory.usage_in_bytes": f"{700 * MIB}\n",
        "memory/memory.stat": f"cache 1\ntotal_inactive_file {100 * MIB}\n",
    }
    assert machine(tmp_path, "5:cpu:/\n4:memory:/docker/abc\n0::/\n", groups) == 200 * MIB


def test_a_limit_that_is_exceeded_leaves_nothing(tmp_path: Path) -> None:
    groups = {"memory.max": f"{MIB}\n", "memory.current": f"{2 * MIB}\n", "memory.stat": "inactive_file 0\n"}
    assert machine(tmp_path, "0::/\n", groups) == 0


def test_the_free_memory_of_this_machine_is_plausible() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 50 * MIB < available_bytes("cpu") < total
    assert available_bytes(torch.device("cpu")) < total


def test_what_fits_passes() -> None:
    check_memory({"experience": 94}, 100, "cpu", num_envs=1, horizon=8)
    with pytest.raises(ConfigError):
        check_memory({"experience": 96}, 100, "cpu", num_envs=1, horizon=8)


def test_what_does_not_fit_is_listed_with_values_that_would() -> None:
    needs = {"env": 5 * GB, "experience": 30 * GB, "policies": GB // 10}
    with pytest.raises(ConfigError) as caught:
        check_memory(needs, 20 * GB, "cpu", num_envs=65536, horizon=64)
    assert str(caught.value) == (
        "env.num_envs=65536 with trainer.horizon=64 needs 35.1 GB on cpu "
        "(experience 30 GB, env 5 GB, policies 0.1 GB), but 19 GB can be used; "
        "lower env.num_envs to 35389 or trainer.horizon to 29"
    )
    # 65536 * (19 - 0.1) / 35 = 35389.4 and 64 * (19 - 5.1) / 30 = 29.65
    lower = {"env": 5 * GB * 35389 // 65536, "experience": 30 * GB * 35389 // 65536, "policies": GB // 10}
    check_memory(lower, 20 * GB, "cpu", num_envs=35389, horizon=64)
    check_memory({**needs, "experience": 30 * GB * 29 // 64}, 20 * GB, "cpu", num_envs=65536, horizon=29)


def test_only_mends_that_can_work_are_named() -> None:
    with pytest.raises(ConfigError, match=r"can be used; lower env.num_envs to 10$"):
        check_memory({"env": 90 * GB, "experience": GB}, 10 * GB, "cuda:0", num_envs=100, horizon=64)
    with pytest.raises(ConfigError, match=r"use a smaller agent, fewer NPCs, or a device with more memory$"):
        check_memory({"policies": 90 * GB, "experience": GB}, 10 * GB, "cuda:0", num_envs=100, horizon=64)


FETCHED = """
import resource, torch
from dual_policy_plugin.memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4 * 2**20) for _ in range(4)]  # 64 MiB: more than glibc keeps by default
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del blocks
print(pages * resource.getpagesize())
"""


def test_freed_memory_is_not_fetched_anew() -> None:
    done = subprocess.run([sys.executable, "-c", FETCHED], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 4 * MIB
