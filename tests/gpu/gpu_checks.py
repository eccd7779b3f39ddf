"""Agreement on a real GPU: kernels, captured graphs and whole runs, at real sizes. Not collected by a plain `pytest`.

    make test-gpu
    python -m pytest -p no:cacheprovider tests/gpu/gpu_checks.py

Both from the repository's root. The second needs no environment of ours: Python 3.11 or newer with torch >= 2.10 and
its triton (3.6 or newer), numpy, pytest, rich and safetensors; the tests of `train` also omegaconf, and say so where it
is missing. Without the pytest-timeout plugin add `-W ignore::pytest.PytestConfigWarning`. One test: append `-k name`.
Figures are printed with `-s`.

Run in a process of their own: Triton's interpreter, in which the other tests run kernels, must be off here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.exit("gpu_checks.py: TRITON_INTERPRET is set; run these checks alone and without it", returncode=2)
if not torch.cuda.is_available():
    pytest.exit("gpu_checks.py: torch sees no CUDA device here", returncode=2)

from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.errors import ConfigError
from tests.gpu import env_checks, kernel_checks, rollout_checks, run_checks
from tests.gpu.rollout_checks import Size

pytestmark = pytest.mark.filterwarnings("default")  # a warning of the machine's own libraries is no failure
BF16, FP32 = torch.bfloat16, torch.float32
# products in float32 run without tensor cores, and where the chip holds the weights: 64
DTYPES = [pytest.param(BF16, 128, id="bf16"), pytest.param(FP32, 64, id="fp32")]
BUSY = ArenaConfig(height=5, width=6, mines=1, altars=3, walls=1, altar_stock=1, freeze_steps=2, attack_cooldown=3,
                   episode_steps=24)  # fmt: skip
SHORT = ArenaConfig(episode_steps=24)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, as a run takes it."""
    chosen = choose_device("cuda")
    print(f"\n{torch.cuda.get_device_name(chosen)}, torch {torch.__version__}")
    return chosen


def size_of(hidden: int, **changes: object) -> Size:
    return Size(**{"num_envs": 301, "horizon": 32, "hidden": hidden, "arena": SHORT, **changes})  # type: ignore[arg-type]


def test_device_names(device: torch.device) -> None:
    assert device == torch.device("cuda", 0)
    assert choose_device("auto") == device
    with pytest.raises(ConfigError, match="is not there"):
        choose_device(f"cuda:{torch.cuda.device_count()}")


# seats of learner and NPCs; 1,301 envs leave tiles of 64 ragged
@pytest.mark.parametrize(("num_npcs", "num_learner", "num_npc"), [(0, 8, 0), (1, 4, 4), (3, 2, 6), (16, 5, 3)])
@pytest.mark.parametrize(("dtype", "hidden"), [*DTYPES, pytest.param(BF16, 256, id="bf16-256")])
def test_policy_step(
    device: torch.device, dtype: torch.dtype, hidden: int, num_npcs: int, num_learner: int, num_npc: int
) -> None:
    kernel_checks.check_policy_step(
        device, dtype, num_envs=1301, num_learner=num_learner, num_npc=num_npc, num_npcs=num_npcs, hidden=hidden,
        tile=64,
    )  # fmt: skip


@pytest.mark.parametrize(("num_npcs", "num_envs"), [(1, 33), (3, 1301), (16, 16384), (64, 65536)])
def test_group_rows(device: torch.device, num_npcs: int, num_envs: int) -> None:
    kernel_checks.check_group_rows(device, num_envs=num_envs, num_npcs=num_npcs, rows_per_env=4, tile=64)


@pytest.mark.parametrize("num_rows", [1, 1024, 4099])
@pytest.mark.parametrize(("dtype", "size"), [(BF16, 128), (BF16, 64), (BF16, 32), (BF16, 16), (FP32, 64), (FP32, 16)])
def test_lstm(device: torch.device, dtype: torch.dtype, size: int, num_rows: int) -> None:
    kernel_checks.check_lstm(device, dtype, horizon=64, num_rows=num_rows, size=size)


@pytest.mark.parametrize("num_rows", [1, 1024, 65537])
@pytest.mark.parametrize("width", [128, 48])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_window(device: torch.device, dtype: torch.dtype, width: int, num_rows: int) -> None:
    kernel_checks.check_window(device, dtype, num_rows=num_rows, width=width)


@pytest.mark.parametrize(("horizon", "num_rows"), [(1, 1), (64, 32768), (128, 1027)])
def test_gae(device: torch.device, horizon: int, num_rows: int) -> None:
    env_checks.check_gae(device, horizon=horizon, num_rows=num_rows)


@pytest.mark.parametrize("num_npcs", [0, 1, 3, 16])
def test_end_step(device: torch.device, num_npcs: int) -> None:
    env_checks.check_end_step(device, num_envs=5003, num_agents=8, num_npcs=num_npcs, state_size=256)


@pytest.mark.parametrize(
    ("config", "num_envs"),
    [(ArenaConfig(), 1024), (BUSY, 2051), (ArenaConfig(num_agents=33, height=40, width=37, episode_steps=64), 67)],
    ids=["default", "busy", "large"],
)
def test_arena(device: torch.device, config: ArenaConfig, num_envs: int) -> None:
    env_checks.check_arena(device, config, num_envs=num_envs, num_steps=300, compare_every=25)


@pytest.mark.parametrize(("num_npcs", "pct"), [(0, 1.0), (1, 0.5), (3, 0.25), (16, 0.5)])
@pytest.mark.parametrize(("dtype", "hidden"), DTYPES)
def test_fused_rollout(device: torch.device, dtype: torch.dtype, hidden: int, num_npcs: int, pct: float) -> None:
    rollout_checks.check_fused_rollout(device, dtype, size_of(hidden, num_npcs=num_npcs, pct=pct))


@pytest.mark.parametrize(("agent", "num_npcs"), [("fast", 0), ("fast", 1), ("fast", 3), ("mlp", 1), ("mlp", 3)])
def test_replays_are_calls(device: torch.device, agent: str, num_npcs: int) -> None:
    size = size_of(128, num_npcs=num_npcs, pct=0.5 if num_npcs else 1.0)
    rollout_checks.check_replays_are_calls(device, BF16, size, agent=agent)


@pytest.mark.parametrize(("dtype", "hidden"), DTYPES)
def test_update_gradient(device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    rollout_checks.check_update_gradient(device, dtype, size_of(hidden))


def test_updates_are_calls(device: torch.device) -> None:
    rollout_checks.check_updates_are_calls(device, BF16, size_of(128))


@pytest.mark.parametrize("num_npcs", [1, 3])
def test_restored_state(device: torch.device, num_npcs: int) -> None:
    rollout_checks.check_restored_state(device, BF16, size_of(128, num_npcs=num_npcs))


def test_env_workers(device: torch.device) -> None:
    run_checks.check_workers(device, num_envs=8, num_workers=2, horizon=24)


def test_memory_stays(device: torch.device) -> None:
    run_checks.check_memory_stays(device, BF16, size_of(128, num_npcs=3), num_iterations=50)


def test_sixteen_npcs_cost_as_one(device: torch.device) -> None:
    # 16,384 envs with 4 NPC seats: 65,536 NPC rows
    ratio = run_checks.cost_of_sixteen(device, BF16, num_envs=16384, hidden=128, steps=20, num_turns=11)
    print(f"\nforward step, 65,536 NPC rows: K=16 takes {ratio:.3f} of the time of K=1")
    assert ratio <= 1.15


FUSED = ("'rollout': 'fused kernels in one CUDA graph'", "'update': 'fused kernels in one CUDA graph'")
PLAIN = ("'rollout': 'plain torch, for trainer.fused=false'", "'update': 'plain torch'")


@pytest.mark.parametrize(("fused", "says"), [(True, FUSED), (False, PLAIN)], ids=["fused", "plain"])
def test_train(tmp_path: Path, caplog: pytest.LogCaptureFixture, fused: bool, says: tuple[str, str]) -> None:
    caplog.set_level("INFO")
    config = run_checks.arena_run(
        tmp_path, "cuda", fused=fused, num_envs=256, num_iterations=64, hidden=128, episodes=256
    )
    run_checks.check_train(config, lambda: caplog.text, says=says, rise=0.3)
