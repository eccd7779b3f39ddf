"""Two ranks on gloo: one policy, global figures, and no start with two different NPCs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dual_policy_plugin.checkpoint import decode_policy
from dual_policy_plugin.distributed import Ranks
from tests.harness import MemoryTask, make_loop

WORKER = """
import json, sys, torch
torch.set_num_threads(1)
from dual_policy_plugin.distributed import join_ranks, leave_ranks
from dual_policy_plugin.rollout.assignment import assign
from tests.harness import MemoryTask, make_loop
ranks = join_ranks("cpu")
loop = make_loop(MemoryTask(8, 4, delay=2), split=assign(4, 0.5), ranks=ranks)
loop.env.reset(7 + ranks.rank, stagger=True)
figures = [loop.iterate(1e-2) for _ in range(3)]
out = {"grad": loop.ppo.parameters.grad.tolist(), "flat": loop.ppo.parameters.flat.tolist(), "figures": figures,
       "rewards": float(loop.experience.rewards.sum())}
json.dump(out, open(sys.argv[1] + f"/{ranks.rank}.json", "w"))
leave_ranks()
"""

TRAIN = """
import os, sys
from pathlib import Path
from dual_policy_plugin.config import *
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.train import train
path, same = Path(sys.argv[1]), sys.argv[2] == "same"
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 4096
script = "random" if same or os.environ["RANK"] == "0" else "forager"
dual = DualPolicyConfig(enabled=True, training_agents_pct=0.5, npc=PolicySource(uri=f"builtin://arena/{script}"))
config = Config(run="two", train_dir=path, device="cpu", env=EnvConfig(num_envs=8, args={"episode_steps": 16}),
                evals=EvalsConfig(episodes=16),
                trainer=TrainerConfig(total_timesteps=steps, horizon=16, threads=1, dual_policy=dual))
try:
    train(config, resolved_yaml="a: 1\\n")
    threads = [Path("/proc/self/task", task, "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads), threads
    print("rank", os.environ["RANK"], "is through")
except DualPolicyError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run_ranks(code: str, *args: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    processes = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root),
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", code, *args]
        processes.append(
            subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
        )
    done = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
def test_ranks_hold_one_policy_and_global_figures(tmp_path: Path) -> None:
    for done in run_ranks(WORKER, str(tmp_path)):
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["grad"] == second["grad"]
    assert first["flat"] == second["flat"]
    assert first["figures"] == second["figures"]
    alone = make_loop(MemoryTask(8, 4, delay=2))
    alone.env.reset(7, stagger=True)
    single = [alone.iterate(1e-2) for _ in range(3)]
    assert first["figures"][1]["dual_policy/episodes"] == 2 * single[1]["dual_policy/episodes"]
    assert first["rewards"] != second["rewards"]


@pytest.mark.slow
@pytest.mark.parametrize("npcs", ["same", "other"])
def test_one_rank_with_another_npc_stops_both(tmp_path: Path, npcs: str) -> None:
    done = run_ranks(TRAIN, str(tmp_path), npcs)
    metrics = tmp_path / "two" / "metrics.jsonl"
    if npcs == "same":
        assert [process.returncode for process in done] == [0, 0], done
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert lines[-1]["charts/agent_step"] == 4096
        assert len(lines) == 4096 // (2 * 8 * 4 * 16)
        file = decode_policy((tmp_path / "two/checkpoints/latest.safetensors").read_bytes(), "latest")
        assert all(torch.isfinite(tensor).all() for tensor in file.tensors.values())
        return
    assert [process.returncode for process in done] == [2, 2]
    assert all("rank 1 of 2 holds other NPC bytes than rank 0" in process.stderr for process in done)
    assert not metrics.exists()


CONTINUE = """
import json, sys
import torch
import dual_policy_plugin.train as program
share, share_counters = program.share_state, program.share_counters
noted = []
def note_counters(*args):
    counters = share_counters(*args)
    noted.append(counters.agent_step)
    return counters
def note(mixed, ppo, metrics, ranks):
    share(mixed, ppo, metrics, ranks)
    state = {"flat": ppo.parameters.flat.tolist(), "adam": float(ppo.adam_state()["step"]), "steps": noted[-1]}
    json.dump(state, open(sys.argv[1] + f"/{ranks.rank}.json", "w"))
program.share_state, program.share_counters = note, note_counters
"""


@pytest.mark.slow
def test_a_continued_run_has_one_policy_on_all_ranks(tmp_path: Path) -> None:
    for steps in ("2048", "4096"):
        done = run_ranks(CONTINUE + TRAIN, str(tmp_path), "same", steps)
        assert [process.returncode for process in done] == [0, 0], done
        assert all("is through" in process.stdout for process in done)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["steps"] == 2048
    assert first["adam"] > 0
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["charts/agent_step"] for line in lines] == [1024, 2048, 3072, 4096]


def test_machines_are_counted_by_their_ranks() -> None:
    assert Ranks().num_machines == 1
    assert Ranks(world_size=8, local_world_size=8).num_machines == 1
    assert Ranks(world_size=16, local_world_size=8).num_machines == 2
