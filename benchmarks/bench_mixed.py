"""What an NPC costs: our scheme beside masked-both, in one process, in turns.

    python -m benchmarks.bench_mixed [--num-envs 256] [--threads 1] [--pairs 5] [--json FILE]

ours: each policy runs on its own rows; only learner rows are stored and trained on.
masked-both: both policies run on all rows, one result is thrown away; all rows are stored; NPC rows are masked in the
loss. Same env, nets, sampler, horizon, minibatches, optimizer steps and update code.

The bound is the ratio of the counted work. With F the work of one forward pass of a row and 3F that of its update
(forward, and backward for inputs and weights), one step of all agents costs ours F + 3PF and masked-both 2F + 3F: at
P = .5 twice as much, at P = .25 2.86 times. The env does the same for both; its time is measured and taken out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from dual_policy_plugin.distributed import Ranks
from dual_policy_plugin.envs.arena import make_arena
from dual_policy_plugin.experience import allocate_experience
from dual_policy_plugin.learning.ppo import PpoSettings, PpoUpdate
from dual_policy_plugin.policies.build import build_policy, compute_dtype
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.policies.sampling import sample_actions
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import StepResult, VecEnv

SHARES = (1.0, 0.75, 0.5, 0.25)
SETTINGS = PpoSettings(
    epochs=1, num_minibatches=4, gamma=0.99, gae_lambda=0.95, clip_coef=0.2, clip_vloss=True, vf_clip_coef=0.2,
    vf_coef=0.5, ent_coef=0.01, max_grad_norm=0.5, norm_adv=True, target_kl=None,
)  # fmt: skip
CPU = torch.device("cpu")


class TimedEnv:
    """Adds up the time that is spent inside the env."""

    def __init__(self, env: VecEnv) -> None:
        self.env, self.spec, self.seconds = env, env.spec, 0.0

    def observe(self, seats: Tensor, out: Tensor) -> None:
        """As VecEnv.observe."""
        start = time.perf_counter()
        self.env.observe(seats, out)
        self.seconds += time.perf_counter() - start

    def step(self, actions: Tensor) -> StepResult:
        """As VecEnv.step."""
        start = time.perf_counter()
        result = self.env.step(actions)
        self.seconds += time.perf_counter() - start
        return result

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        """As VecEnv.reset."""
        self.env.reset(seed, stagger=stagger)


class MaskedBoth(MixedPolicy):
    """The scheme to beat: the NPC runs on the learner's buffer of all rows too, and a mask picks the action."""

    def use(self, npc: torch.nn.Module, is_learner_row: Tensor) -> None:
        """Names the NPC and the rows (num_envs * num_agents,) bool that the learner acts for."""
        self.npc, self.is_learner_row = npc, is_learner_row
        self.npc_state = torch.zeros_like(self.learner_state)

    @torch.no_grad()
    def act(self, learner_obs: Tensor, u_learner: Tensor, u_npc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As MixedPolicy.act, both policies on all rows."""
        logits, values, self.learner_state = self.learner.forward_step(learner_obs, self.learner_state)
        npc_logits, _, self.npc_state = self.npc.forward_step(learner_obs, self.npc_state)
        actions = torch.where(
            self.is_learner_row, sample_actions(logits, u_learner), sample_actions(npc_logits, u_learner)
        )
        self.actions.copy_(actions.view(self.num_envs, -1))
        return actions, logits, values

    def end_step(self, result: StepResult, learner_dones: Tensor, u_draw: Tensor) -> None:
        """As MixedPolicy.end_step, for both states."""
        super().end_step(result, learner_dones, u_draw)
        self.npc_state = self.npc_state.masked_fill(learner_dones.unsqueeze(1), 0.0)


class Scheme:
    """One scheme at one share: an iteration at a time."""

    def __init__(self, name: str, pct: float, num_envs: int, horizon: int) -> None:
        self.name, self.pct = name, pct
        env = TimedEnv(make_arena(num_envs, {}, CPU))
        spec, split = env.spec, assign(env.spec.num_agents, pct)
        dtype = compute_dtype("auto", CPU)
        nets = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            net = build_policy("fast", {}, spec.observation_space, spec.actions)
            net.compute_dtype = dtype
            nets.append(net)
        learner, npc = nets
        npc.eval().requires_grad_(False)
        npc.pack()
        everyone = assign(spec.num_agents, 1.0)
        pool = None
        if name == "ours":
            if split.num_npc:
                pool = NpcPool([Npc(name="npc", policy=npc)], num_envs=num_envs, num_npc=split.num_npc, device=CPU)
            self.mixed = MixedPolicy(learner, pool, split, spec, CPU)
        else:
            self.mixed = MaskedBoth(learner, None, everyone, spec, CPU)
            is_learner = torch.zeros(spec.num_agents, dtype=torch.bool)
            is_learner[list(split.learner_seats)] = True
            self.mixed.use(npc, is_learner.repeat(num_envs))
        self.env = env
        self.experience = allocate_experience(
            spec, horizon=horizon, num_rows=self.mixed.num_learner_rows, state_size=learner.state_size, device=CPU
        )
        if name == "masked-both":
            self.experience.weights = self.mixed.is_learner_row.float().expand(horizon, -1).contiguous()
        self.metrics = EpisodeMetrics(
            spec, split if name == "ours" else everyone, pool, CPU, count_first=False, count_later=True
        )
        self.ppo = PpoUpdate(learner, SETTINGS, betas=(0.9, 0.999), eps=1e-5, ranks=Ranks())
        self.env_agent_steps = horizon * num_envs * spec.num_agents
        self.learner_steps = horizon * num_envs * split.num_learner
        self.count = 0
        env.reset(1, stagger=True)
        start_rollouts(env, self.mixed, self.experience)

    def iterate(self) -> dict[str, float]:
        """Plays and trains one iteration; gives its seconds."""
        horizon = self.experience.horizon
        self.env.seconds = 0.0
        start = time.perf_counter()
        numbers = self.mixed.random_numbers(1, self.count * horizon, horizon)
        collect_rollout(self.env, self.mixed, self.experience, self.metrics, numbers)
        middle = time.perf_counter()
        self.ppo.update(self.experience, 1e-4)
        end = time.perf_counter()
        self.count += 1
        return {"total": end - start, "env": self.env.seconds, "update": end - middle}


def measure(pct: float, num_envs: int, horizon: int, pairs: int) -> list[dict[str, float | str]]:
    """Both schemes at one share, A B B A ..., the median of each; the ratio is the median over pairs."""
    schemes = {name: Scheme(name, pct, num_envs, horizon) for name in ("ours", "masked-both")}
    for scheme in schemes.values():
        scheme.iterate()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in schemes}
    for pair in range(pairs):
        order = list(schemes) if pair % 2 == 0 else list(schemes)[::-1]
        for name in order:
            seconds[name].append(schemes[name].iterate())
    bound = 5.0 / (1.0 + 3.0 * pct)
    raw = [b["total"] / a["total"] for a, b in zip(seconds["ours"], seconds["masked-both"], strict=True)]
    free = [
        (b["total"] - b["env"]) / (a["total"] - a["env"])
        for a, b in zip(seconds["ours"], seconds["masked-both"], strict=True)
    ]
    rows: list[dict[str, float | str]] = []
    for name, scheme in schemes.items():
        medians = {key: statistics.median(s[key] for s in seconds[name]) for key in ("total", "env", "update")}
        steps = scheme.env_agent_steps
        rows.append(
            {
                "scheme": name,
                "pct": pct,
                "num_npcs": 0 if pct == 1 else 1,
                "threads": torch.get_num_threads(),
                "env_agent_steps_per_s": steps / medians["total"],
                "learner_steps_per_s": scheme.learner_steps / medians["total"],
                "ns_per_env_agent_step": medians["total"] / steps * 1e9,
                "env_ns": medians["env"] / steps * 1e9,
                "rollout_ns": (medians["total"] - medians["update"] - medians["env"]) / steps * 1e9,
                "update_ns": medians["update"] / steps * 1e9,
                "ratio": statistics.median(raw) if name == "ours" else 1.0,
                "ratio_env_free": statistics.median(free) if name == "ours" else 1.0,
                "bound": bound if name == "ours" else 1.0,
                "share_of_bound": statistics.median(free) / bound if name == "ours" else 1.0,
            }
        )
    return rows


def main() -> None:
    """Measures all shares and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} thread(s)"
    print(f"{machine}; {args.num_envs} envs of 8 agents, horizon {args.horizon}")
    print(
        f"{'scheme':12} {'P':>5} {'env-agent-steps/s':>18} {'learner-steps/s':>16} {'ns/step':>8} "
        f"{'env':>6} {'rollout':>8} {'update':>7} {'ratio':>6} {'env-free':>9} {'bound':>6} {'share':>6}"
    )
    rows = []
    for pct in SHARES:
        for row in measure(pct, args.num_envs, args.horizon, args.pairs):
            rows.append(row)
            print(
                f"{row['scheme']:12} {row['pct']:5.2f} {row['env_agent_steps_per_s']:18,.0f} "
                f"{row['learner_steps_per_s']:16,.0f} {row['ns_per_env_agent_step']:8,.0f} {row['env_ns']:6,.0f} "
                f"{row['rollout_ns']:8,.0f} {row['update_ns']:7,.0f} {row['ratio']:6.2f} {row['ratio_env_free']:9.2f} "
                f"{row['bound']:6.2f} {row['share_of_bound']:6.0%}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
