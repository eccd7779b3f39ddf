"""A frozen policy against a new one in MettaGrid: first a policy learns alone, then another one learns against it.

The same as two commands: dual-policy train env=mettagrid run=hearts_1
                          dual-policy train env=mettagrid run=hearts_2 +dual_policy=checkpoint \
                              trainer.dual_policy.checkpoint_npc.uri=train_dir/hearts_1
"""

from __future__ import annotations

import argparse

from dual_policy_plugin.config import Config, DualPolicyConfig, EnvConfig, EvalsConfig, PolicySource, TrainerConfig
from dual_policy_plugin.train import train


def main() -> None:
    """Two runs under train_dir/, and who gathered more hearts in the games at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=60_000, help="learner steps of each run")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--episode-steps", type=int, default=128)
    parser.add_argument("--episodes", type=int, default=64, help="games at the end")
    args = parser.parse_args()

    env = EnvConfig(name="mettagrid", num_envs=args.num_envs, args={"num_agents": 8, "steps": args.episode_steps})
    evals = EvalsConfig(episodes=args.episodes)
    alone = TrainerConfig(total_timesteps=args.timesteps)
    train(Config(run="hearts_1", env=env, evals=evals, trainer=alone))

    frozen = DualPolicyConfig(enabled=True, training_agents_pct=0.5, npc=PolicySource(uri="train_dir/hearts_1"))
    against = TrainerConfig(total_timesteps=args.timesteps, dual_policy=frozen)
    result = train(Config(run="hearts_2", env=env, evals=evals, trainer=against))

    (match,) = result["evals"]
    hearts = {team: result["metrics"].get(f"env/{team}/hearts") for team in ("policy_a", "npc")}
    print(f"win rate {match['win_rate']:.2f} ({match['low']:.2f} to {match['high']:.2f}) in {match['episodes']} games")
    print(f"hearts per agent in training: new {hearts['policy_a']}, frozen {hearts['npc']}")


if __name__ == "__main__":  # worker processes import this file
    main()
