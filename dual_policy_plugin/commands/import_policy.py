"""`dual-policy import`: turns a .pt file with a state dict into a policy file of ours.

dual-policy import OLD.pt NEW.safetensors [--agent NAME] [--env NAME] [key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from dual_policy_plugin.commands.words import make_parser, parse_words


def run(words: list[str]) -> int:
    """Reads the one file, writes the other and says so; returns the exit code."""
    parser = make_parser(
        "dual-policy import",
        "OLD.pt NEW.safetensors [options] [key=value ...]",
        "Turns a .pt file that holds a state dict into a policy file (.safetensors). Nothing in it is ever run.",
        note="Overrides describe env and net as in `dual-policy train`.",
        examples=(
            "dual-policy import old.pt new.safetensors",
            "dual-policy import old.pt new.safetensors --agent mlp env.num_agents=8",
        ),
    )
    parser.add_argument("old", type=Path, metavar="OLD.pt", help="the file to read")
    parser.add_argument("new", type=Path, metavar="NEW.safetensors", help="the file to write")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for `dual-policy train`")
    parser.add_argument("--agent", default="fast", help="architecture of the state dict (fast)")
    parser.add_argument("--env", default="arena", help="env whose observations and actions it was made for (arena)")
    args = parse_words(parser, words, is_mixed=True)

    import torch

    from dual_policy_plugin.envs.build import make_env
    from dual_policy_plugin.hydra_app.composition import compose_config
    from dual_policy_plugin.policies.loading import import_policy

    config, _ = compose_config([f"env={args.env}", f"agent={args.agent}", "env.num_envs=1", *args.overrides])
    env = make_env(config.env, device=torch.device("cpu"), num_workers=1)
    try:
        space, actions = env.spec.observation_space, env.spec.actions
    finally:
        env.close()
    import_policy(
        args.old, args.new, agent=config.agent.name, args=config.agent.args, observation_space=space, actions=actions
    )
    print(f"{args.new}: imported from {args.old} as agent {config.agent.name} for env {config.env.name}")
    return 0
