"""A training process in small, for tests that kill it: prints its workers' ids, then steps or fails.

Usage: worker_parent.py step|hang|raise (hang: a worker never answers the third step)
"""

import sys

import psutil
import torch
from toy_envs import make_trouble

from dual_policy_plugin.config import EnvConfig
from dual_policy_plugin.envs.build import make_env


def main(mode):
    config = EnvConfig(name="toy", num_envs=4, args={"where": 0 if mode == "hang" else -1, "kind": "hang"})
    env = make_env(config, device="cpu", num_workers=2, make_host=make_trouble)
    env.reset(1)
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    if mode == "raise":
        raise RuntimeError("the training broke")
    while True:
        env.step(torch.zeros(4, 2, dtype=torch.int64))


if __name__ == "__main__":
    main(sys.argv[1])
