"""Scripts on two ranks that start from nothing, each a Python of its own; `conftest.run_ranks` is the faster way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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
    """Runs a script on two ranks, each a Python of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
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
