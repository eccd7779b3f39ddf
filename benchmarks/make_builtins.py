"""Trains the three policies that come with the package, and measures that each is clearly stronger than the one before.

    python -m benchmarks.make_builtins [--out dual_policy_plugin/builtin/arena] [--only-measure]

weak and medium learn with all seats, for a short and a longer while; strong learns with all seats for long and then
against the hunter. Weights are stored in bfloat16. Takes about six minutes on one core; another machine gives
policies of the same strength, not the same bytes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch

from dual_policy_plugin.checkpoint import decode_policy, encode_policy
from dual_policy_plugin.config import Config, DualPolicyConfig, EnvConfig, EvalsConfig, PolicySource, TrainerConfig
from dual_policy_plugin.evaluate import cross_play
from dual_policy_plugin.files import publish
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.train import train

OUT = Path(__file__).parents[1] / "dual_policy_plugin" / "builtin" / "arena"
MAX_BYTES = 500_000
SCRIPTS = ("random", "forager", "hunter")


def train_policy(
    name: str, steps: int, folder: Path, *, num_envs: int = 64, npc: str | None = None, initial: Path | None = None
) -> Path:
    """Trains with all seats, or with half of them against `npc`; gives the last checkpoint's path."""
    dual = DualPolicyConfig()
    if npc is not None:
        dual = DualPolicyConfig(enabled=True, training_agents_pct=0.5, npc=PolicySource(uri=npc))
    trainer = TrainerConfig(
        total_timesteps=steps,
        threads=1,
        checkpoint_interval=10**6,
        initial_policy=None if initial is None else PolicySource(uri=str(initial)),
        dual_policy=dual,
    )
    config = Config(
        run=name, train_dir=folder, trainer=trainer, env=EnvConfig(num_envs=num_envs), evals=EvalsConfig(episodes=0)
    )
    train(config, resolved_yaml=f"run: {name}\n")
    return folder / name / "checkpoints" / "latest.safetensors"


def shrink(checkpoint: Path, name: str) -> bytes:
    """The policy file with weights in bfloat16 and without the run's own particulars."""
    file = decode_policy(checkpoint.read_bytes(), str(checkpoint))
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in file.tensors.items()}
    metadata = {"run": f"builtin/{name}", "step": file.metadata["step"], "epoch": file.metadata["epoch"], "npcs": []}
    data = encode_policy(replace(file, tensors=tensors, metadata=metadata))
    assert len(data) < MAX_BYTES, f"{name} takes {len(data)} bytes"
    return data


def make(out: Path) -> None:
    """Trains and writes all three."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = train_policy("strong_base", 12_000_000, folder, num_envs=128)
        made = {
            "weak": train_policy("weak", 1_000_000, folder),
            "medium": train_policy("medium", 2_000_000, folder),
            "strong": train_policy(
                "strong", 12_000_000, folder, num_envs=128, npc="builtin://arena/hunter", initial=base
            ),
        }
        out.mkdir(parents=True, exist_ok=True)
        for name, checkpoint in made.items():
            publish(out / f"{name}.safetensors", shrink(checkpoint, name))


def measure(out: Path, episodes: int) -> None:
    """Plays every pair, both seatings, and prints the table."""
    policies = {name: str(out / f"{name}.safetensors") for name in ("weak", "medium", "strong")}
    policies |= {name: f"builtin://arena/{name}" for name in SCRIPTS}
    pinned = [resolve(uri, name=name) for name, uri in policies.items()]
    result = cross_play(pinned, Config(), episodes=episodes, seed=1, device=torch.device("cpu"))
    print("| policy | against | win rate | 95 % interval | episodes |\n|---|---|---|---|---|")
    for i, j in combinations(range(len(pinned)), 2):
        rate, low, high = (float(table[j][i]) for table in (result.win_rate, result.low, result.high))
        print(f"| {result.names[j]} | {result.names[i]} | {rate:.3f} | {low:.3f} to {high:.3f} | {result.episodes} |")


def main() -> None:
    """Makes and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--episodes", type=int, default=2048, help="per pair")
    parser.add_argument("--only-measure", action="store_true")
    args = parser.parse_args()
    if not args.only_measure:
        make(args.out)
    measure(args.out, args.episodes)


if __name__ == "__main__":
    main()
