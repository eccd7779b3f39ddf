"""What checks a GPU (`tests/gpu`) at tiny sizes in Triton's interpreter: so that it works when there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from dual_policy_plugin.envs.arena_config import ArenaConfig
from tests.gpu import env_checks, kernel_checks, rollout_checks, run_checks
from tests.gpu.agreement import assert_as_near, assert_drawn, assert_greedy, assert_near_as_vectors
from tests.gpu.rollout_checks import Size

ROOT = Path(__file__).parents[2]
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
ARENA = ArenaConfig(num_agents=4, height=4, width=4, mines=1, altars=1, walls=0, episode_steps=3, freeze_steps=1,
                    attack_cooldown=1)  # fmt: skip
TINY = Size(num_envs=5, horizon=3, hidden=16, tile=16, num_npcs=3, pct=0.25, arena=ARENA)


def test_kernels() -> None:
    kernel_checks.check_policy_step(
        CPU, FP32, num_envs=40, num_learner=1, num_npc=2, num_npcs=3, hidden=16, tile=16, num_steps=1
    )
    kernel_checks.check_group_rows(CPU, num_envs=40, num_npcs=3, rows_per_env=2, tile=16)
    kernel_checks.check_lstm(CPU, FP32, horizon=3, num_rows=17, size=16)
    kernel_checks.check_window(CPU, FP32, num_rows=19, width=16)
    env_checks.check_gae(CPU, horizon=4, num_rows=130)
    env_checks.check_end_step(CPU, num_envs=35, num_agents=3, num_npcs=3, state_size=8, num_steps=2)


def test_the_arena() -> None:
    busy = ArenaConfig(num_agents=4, height=5, width=5, mines=2, altars=2, walls=0, altar_stock=2, freeze_steps=2,
                       attack_cooldown=3, episode_steps=12)  # fmt: skip
    env_checks.check_arena(CPU, busy, num_envs=6, num_steps=20, compare_every=4)


def test_fused_rollouts() -> None:
    rollout_checks.check_fused_rollout(CPU, FP32, TINY)


@pytest.mark.parametrize("agent", [pytest.param("fast", marks=pytest.mark.slow), "mlp"])
def test_replays(agent: str) -> None:
    rollout_checks.check_replays_are_calls(CPU, FP32, TINY, agent=agent, num_iterations=2)


def test_gradient() -> None:
    rollout_checks.check_update_gradient(CPU, FP32, TINY)


@pytest.mark.slow
def test_updates() -> None:
    rollout_checks.check_updates_are_calls(CPU, FP32, TINY)


@pytest.mark.slow
def test_restored_state() -> None:
    rollout_checks.check_restored_state(CPU, FP32, TINY, num_iterations=1)


def test_env_workers() -> None:
    run_checks.check_workers(CPU, num_envs=4, num_workers=1, horizon=12)


def test_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = run_checks.arena_run(tmp_path, "cpu", fused=True, num_envs=8, num_iterations=12, hidden=16, episodes=2)
    says = ("'device': 'cpu'", "'npc_agents': 4")
    run_checks.check_train(config, lambda: caplog.text, says=says, rise=-1.0, may_fall=1.0)
    again = replace(config, run="again")
    with pytest.raises(AssertionError, match="the log does not say fused kernels"):
        run_checks.check_train(again, lambda: caplog.text, says=["fused kernels"], rise=-1.0)


def test_timing() -> None:
    ratio = run_checks.cost_of_sixteen(CPU, FP32, num_envs=4, hidden=16, steps=1, num_turns=1, tile=16)
    assert ratio > 1.0  # seventeen tiles in the interpreter, instead of one


def test_a_row_that_is_wrong_is_found() -> None:
    exact = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    plain = exact + 1e-3
    assert_as_near("x", exact - 1.9e-3, plain, exact, FP32)
    assert_as_near("x", exact + 1e-6, exact, exact, FP32)
    wrong = exact + 1e-3
    wrong[5] = exact[6]
    for ours in (exact + 3e-3, wrong, exact * torch.nan):
        with pytest.raises(AssertionError, match="x: "):
            assert_as_near("x", ours, plain, exact, FP32)
    one = exact.clone()
    one[0, 0] += 0.05  # one number off is no great error in the mean
    with pytest.raises(AssertionError, match=r"largest error 5\.00e-02"):
        assert_as_near("x", one, exact + 3e-3, exact, FP32)
    with pytest.raises(AssertionError, match=r"y: differs by 1\.00e-02"):
        assert_near_as_vectors("y", exact * 1.01, exact, relative=1e-3)


def test_an_action_that_was_not_drawn_is_found() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(100, 3)
    uniforms = torch.linspace(0, 0.99, 100)
    actions = (uniforms >= 0.5).long() + (uniforms >= 0.75).long()
    assert_drawn("x", actions, logits, uniforms, FP32)
    one_off = actions.clone()
    one_off[49] = 1  # drawn with 0.49
    assert_drawn("x", one_off, logits, uniforms, BF16)
    with pytest.raises(AssertionError, match=r"lies 0\.010 outside"):
        assert_drawn("x", one_off, logits, uniforms, FP32)
    with pytest.raises(AssertionError, match=r"lies 0\.240 outside"):
        assert_drawn("x", torch.where(actions == 2, 1, actions), logits, uniforms, BF16)
    assert_greedy("x", torch.zeros(100, dtype=torch.int64), logits, FP32)
    with pytest.raises(AssertionError, match=r"lies 0\.693 below"):
        assert_greedy("x", torch.ones(100, dtype=torch.int64), logits, BF16)


def test_many_actions_that_are_nearly_right_are_found() -> None:
    logits = torch.tensor([0.001, 0.0]).expand(1000, 2)
    most_likely = torch.zeros(1000, dtype=torch.int64)
    most_likely[:55] = 1  # as good as the other, and five and a twentieth of the rows may take it
    assert_greedy("x", most_likely, logits, BF16)
    most_likely[55] = 1
    with pytest.raises(AssertionError, match="x: 56 of 1000 actions"):
        assert_greedy("x", most_likely, logits, BF16)


COMMAND = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu/gpu_checks.py"]


def test_a_machine_without_a_gpu_is_told() -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(COMMAND, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert "Exit: gpu_checks.py: torch sees no CUDA device here" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_interpreter_is_refused_and_all_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(pytest.exit.Exception, match="TRITON_INTERPRET is set"):
        from tests.gpu import gpu_checks
    monkeypatch.delenv("TRITON_INTERPRET")
    from tests.gpu import gpu_checks

    assert gpu_checks.size_of(128, num_npcs=3).num_npcs == 3
    source = Path(gpu_checks.__file__).read_text()
    for module in (env_checks, kernel_checks, rollout_checks, run_checks):
        checks = [name for name in vars(module) if name.startswith("check_")]
        assert checks
        assert all(f".{name}(" in source for name in checks)


def test_the_checks_hide_from_the_other_tests_and_gpus_too(pytestconfig: pytest.Config) -> None:
    """`tests/conftest.py` hides GPUs; a machine without one shows it by the variable."""
    assert not any(fnmatch("gpu_checks.py", pattern) for pattern in pytestconfig.getini("python_files"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0
