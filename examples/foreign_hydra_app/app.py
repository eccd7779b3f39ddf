"""Their app: a Hydra config, a small net, a policy-gradient loop over an env in numpy. The plugin adds who plays whom.

Without the plugin's node all four moths learn. With `+dual_policy=checkpoint` some of them are a frozen policy.
"""

from __future__ import annotations

from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lights import ACTIONS, FEATURES, STEPS, Lights
from omegaconf import DictConfig
from torch import Tensor, nn

from dual_policy_plugin import DualPolicy, ObservationSpace, save_policy

SPACE = ObservationSpace(kind="vector", shape=(len(FEATURES),), features=FEATURES)


class Net(nn.Module):
    """obs (num_rows, 3) -> logits (num_rows, 3). No value, no state."""

    def __init__(self, space: ObservationSpace, actions: tuple[str, ...], width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(space.shape[0], width), nn.Tanh(), nn.Linear(width, len(actions)))

    def forward(self, obs: Tensor) -> Tensor:
        """Logits."""
        return self.layers(obs)


def open_games(node: object, cfg: DictConfig, env: Lights, run_dir: Path | None = None) -> DualPolicy:
    """Who plays where: `node` is the plugin's, or the URI of one opponent, or None."""
    sizes = {"num_envs": env.shape[0], "num_agents": env.shape[1]}
    spaces = {"observation_space": SPACE, "actions": ACTIONS, "architectures": {"moth": Net}}
    return DualPolicy.open(node, **sizes, **spaces, seed=cfg.seed, run_dir=run_dir)


def play(net: Net, env: Lights, dual: DualPolicy) -> tuple[Tensor, np.ndarray]:
    """One episode of all games: log-probabilities and rewards of the learner's seats, (STEPS, num_rows) each."""
    log_probs, rewards, seats = [], [], dual.learner_seats
    for _ in range(STEPS):
        obs = env.observe()
        mine = torch.tensor(obs[:, seats].reshape(-1, len(FEATURES)), dtype=torch.float32)
        choice = torch.distributions.Categorical(logits=net(mine))
        actions = choice.sample()
        reward, done = env.step(dual.fill(actions.numpy(), obs))
        dual.end_step(reward, done)
        log_probs.append(choice.log_prob(actions))
        rewards.append(reward[:, seats].reshape(-1))
    return torch.stack(log_probs), np.stack(rewards)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Trains, saves the policy, and measures it where `rival` names somebody."""
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(1)
    env = Lights(cfg.num_envs, cfg.num_agents, cfg.seed)
    net = Net(SPACE, ACTIONS, cfg.trainer.width)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.trainer.learning_rate)
    folder = Path(HydraConfig.get().runtime.output_dir)

    with open_games(cfg.trainer.get("dual_policy"), cfg, env, run_dir=folder) as dual:
        for iteration in range(1, cfg.trainer.iterations + 1):
            log_probs, rewards = play(net, env, dual)
            to_come = np.cumsum(rewards[::-1], axis=0)[::-1].copy()
            gain = torch.tensor(to_come - to_come.mean(axis=1, keepdims=True), dtype=torch.float32)
            loss = -(log_probs * gain / STEPS).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            metrics = dual.take_metrics()
            if iteration % 10 == 0 or iteration == cfg.trainer.iterations:
                shown = {name: round(value, 3) for name, value in metrics.items() if name.endswith(("reward", "rate"))}
                print(f"iteration {iteration}", shown)
        metadata = {"step": iteration * rewards.size, "epoch": iteration, "npcs": dual.npcs}

    where = folder / cfg.save_as
    args = {"width": cfg.trainer.width}
    save_policy(where, net, agent="moth", args=args, observation_space=SPACE, actions=ACTIONS, metadata=metadata)
    print(f"saved {where}")
    if cfg.rival is not None:
        with open_games(cfg.rival, cfg, env) as dual, torch.no_grad():
            play(net, env, dual)
            print(f"win rate {dual.take_metrics()['dual_policy/win_rate']:.2f} against {cfg.rival}")


if __name__ == "__main__":
    main()
