"""PPO in one file over a PettingZoo parallel env, in which three hunters chase a runner.

One net plays all seats that learn. At the end its weights are saved with torch.save, as trainers do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from gymnasium.spaces import Box
from mpe2 import simple_tag_v3
from torch import Tensor, nn
from torch.distributions import Categorical

ACTIONS = ("stay", "left", "right", "down", "up")
GAMMA, GAE_LAMBDA, CLIP, ENTROPY, VALUE, EPOCHS, MINIBATCHES = 0.95, 0.95, 0.2, 0.01, 0.5, 4, 4


class Net(nn.Module):
    """Actor and critic. obs (num_rows, size) -> logits (num_rows, num_actions), values (num_rows,)."""

    def __init__(self, space: Box, actions: Sequence[str]) -> None:
        super().__init__()
        size, num_actions = space.shape[0], len(actions)
        self.actor = nn.Sequential(
            nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, num_actions)
        )
        self.critic = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values."""
        return self.actor(obs), self.critic(obs).squeeze(1)


class Games:
    """Several copies of the env, stepped together; a game that ended begins anew at once."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.envs = [simple_tag_v3.parallel_env(max_cycles=25) for _ in range(num_envs)]
        self.agents = self.envs[0].possible_agents
        self.size = max(self.envs[0].observation_space(agent).shape[0] for agent in self.agents)
        self.space = Box(-np.inf, np.inf, (self.size,), np.float32)  # of the agent that sees most; others: zeros behind
        self.obs = np.stack([self.show(env.reset(seed + i)[0]) for i, env in enumerate(self.envs)])

    def show(self, observations: dict) -> np.ndarray:
        """(num_agents, size) of one env."""
        return np.stack([np.pad(o, (0, self.size - len(o))) for o in map(observations.get, self.agents)])

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observations, rewards (num_envs, num_agents) and dones (num_envs,) after actions (num_envs, num_agents)."""
        rewards, dones = np.zeros((len(self.envs), len(self.agents))), np.zeros(len(self.envs))
        for i, env in enumerate(self.envs):
            observations, paid, _, _, _ = env.step(dict(zip(self.agents, actions[i].tolist(), strict=True)))
            rewards[i], dones[i] = [paid[agent] for agent in self.agents], not env.agents
            self.obs[i] = self.show(observations if env.agents else env.reset()[0])
        return self.observe(), torch.tensor(rewards).float(), torch.tensor(dones).float()

    def observe(self) -> Tensor:
        """(num_envs, num_agents, size)."""
        return torch.tensor(self.obs).float()


def main() -> None:
    """Trains, prints a line an iteration, saves the net's weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=50, help="of each env, in an iteration")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", default="policy.pt")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    games = Games(args.num_envs, args.seed)
    seats = list(range(len(games.agents)))  # the seats that learn
    net = Net(games.space, ACTIONS)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.learning_rate, eps=1e-5)

    def rows(table: Tensor) -> Tensor:
        """(num_envs, num_agents, ...) -> (num_envs * len(seats), ...)."""
        return table[:, seats].flatten(0, 1)

    shape = (args.num_steps, args.num_envs * len(seats))
    obs, actions = torch.zeros(*shape, games.size), torch.zeros(shape, dtype=torch.int64)
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
    next_obs = games.observe()

    for iteration in range(1, args.iterations + 1):
        # play
        for step in range(args.num_steps):
            obs[step] = rows(next_obs)
            with torch.no_grad():
                logits, values[step] = net(obs[step])
            choice = Categorical(logits=logits)
            actions[step] = choice.sample()
            logprobs[step] = choice.log_prob(actions[step])
            table = actions[step].view(args.num_envs, -1)
            next_obs, reward, done = games.step(table)
            rewards[step], dones[step] = rows(reward), done.repeat_interleave(len(seats))

        # advantages: delta_t = r_t + gamma * V(s_{t+1}) - V(s_t), summed backwards with gamma * lambda
        with torch.no_grad():
            next_value = net(rows(next_obs))[1]
        advantages, last = torch.zeros(shape), torch.zeros(shape[1])
        for t in reversed(range(args.num_steps)):
            going_on = 1.0 - dones[t]
            delta = rewards[t] + GAMMA * going_on * next_value - values[t]
            advantages[t] = last = delta + GAMMA * GAE_LAMBDA * going_on * last
            next_value = values[t]
        returns = advantages + values

        # update
        batch = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns)]
        for _ in range(EPOCHS):
            for index in torch.randperm(len(batch[0])).chunk(MINIBATCHES):
                o, a, old_logprob, advantage, target = (x[index] for x in batch)
                logits, value = net(o)
                choice = Categorical(logits=logits)
                ratio = (choice.log_prob(a) - old_logprob).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = -torch.min(advantage * ratio, advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                value_loss = 0.5 * (value - target).square().mean()
                loss = policy_loss + VALUE * value_loss - ENTROPY * choice.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()

        print(f"iteration {iteration} reward {float(rewards.mean()):.3f}")

    torch.save(net.state_dict(), args.save)


if __name__ == "__main__":
    main()
