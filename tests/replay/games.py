"""Recorded games for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch

from dual_policy_plugin.checkpoint import PolicyFile, encode_policy
from dual_policy_plugin.config import Config
from dual_policy_plugin.evaluate import read_spec
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.replay.record import Recording, record

CPU = torch.device("cpu")
MEDIUM, WEAK, HUNTER = (f"builtin://arena/{name}" for name in ("medium", "weak", "hunter"))
SMALL = (
    "env.num_agents=4", "env.height=8", "env.width=9", "env.mines=3", "env.altars=2", "env.walls=4",
    "env.altar_stock=3", "env.episode_steps=40", "trainer.threads=1",
)  # fmt: skip
METTAGRID = (
    "env=mettagrid", "env.num_envs=2", "trainer.num_workers=1", "env.num_agents=4", "env.size=5", "env.mines=3",
    "env.altars=3", "env.walls=2", "env.hearts=4", "env.steps=48", "trainer.threads=1",
)  # fmt: skip


def config_of(*words: str) -> Config:
    return compose_config(["trainer.dual_policy.enabled=false", *words])[0]


def arena_games(*words: str, policy: str = MEDIUM, episodes: int = 3, seed: int = 5) -> Recording:
    config = config_of(*SMALL, *words)
    return record(resolve(policy), resolve(WEAK), config, episodes=episodes, seed=seed, device=CPU)[0]


def random_policies(config: Config, folder: Path) -> list[str]:
    """Two policies with random weights for the config's env, as files."""
    spec = read_spec(config)
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = build_policy("fast", {"hidden_size": 16}, spec.observation_space, spec.actions)
        file = PolicyFile(
            architecture="fast", args={"hidden_size": 16}, observation_space=spec.observation_space,
            actions=spec.actions, tensors=net.state_dict(), metadata={},
        )  # fmt: skip
        paths.append(folder / f"{seed}.safetensors")
        paths[-1].write_bytes(encode_policy(file))
    return [str(path) for path in paths]
