"""Run directories as a run leaves them, made without training: any length, any names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 512
"""Learner steps of an iteration."""


def make_run(
    folder: Path,
    num_iterations: int = 20,
    *,
    npcs: Sequence[str] = ("weak",),
    seed: int = 1,
    result: bool = True,
    config: str = "run: made\nseed: 1\n",
    more: dict[str, Any] | None = None,
) -> Path:
    """A run directory; in every iteration 10 episodes end, and the win rate rises from 0 to 1.

    Args:
        folder: that is made.
        num_iterations: lines of metrics.jsonl and timing.jsonl.
        npcs: names in the lock; several of them are a pool.
        seed: of the noise.
        result: whether there is a result.json.
        config: what config.yaml says.
        more: further metrics of every line.
    """
    folder.mkdir(parents=True)
    folder.joinpath("config.yaml").write_text(config, encoding="utf-8")
    noise = np.random.default_rng(seed).normal(size=(num_iterations, 12)).tolist()
    metrics = [_metrics(k + 1, num_iterations, npcs, noise[k]) | (more or {}) for k in range(num_iterations)]
    timing = [
        {
            "iteration": k + 1, "charts/learner_SPS": 1000.0, "charts/env_agent_SPS": 2000.0, "timing/rollout_s": 0.2,
            "timing/update_s": 0.3, "timing/elapsed_s": 0.5 * (k + 1), "cost/hourly_total": 2.0,
            "cost/accrued_total": 0.01 * (k + 1),
        }
        for k in range(num_iterations)
    ]  # fmt: skip
    for name, lines in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        folder.joinpath(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = [
        {"role": "npc", "requested": uri, "uri": uri, "sha256": "ab" * 32, "bytes": 4096, "name": name}
        | {"when": "2026-01-01T00:00:00+00:00", "metadata": {"epoch": 7}}
        for name, uri in ((name, f"builtin://arena/{name}") for name in npcs)
    ]
    folder.joinpath("npc.lock.json").write_text(json.dumps({"version": 1, "npcs": entries}))
    if result:
        evals = [
            {"opponent": name, "win_rate": 0.75, "low": 0.661, "high": 0.822, "episodes": 100, "wins": 75.0, "draws": 0}
            for name in npcs
        ]
        facts = {"objective": 0.75, "iterations": num_iterations, "agent_step": STEPS * num_iterations, "evals": evals}
        folder.joinpath("result.json").write_text(json.dumps(facts))
    return folder


def _metrics(iteration: int, num_iterations: int, npcs: Sequence[str], noise: list[float]) -> dict[str, Any]:
    """One line with all that a run of the arena logs."""
    line = {
        "iteration": iteration, "charts/agent_step": float(STEPS * iteration), "charts/epoch": float(iteration),
        "charts/env_agent_step": 2.0 * STEPS * iteration, "charts/learning_rate": 0.003,
        "dual_policy/policy_a_agent_count": 4.0, "dual_policy/npc_agent_count": 4.0, "dual_policy/episodes": 10.0,
        "dual_policy/win_rate": (iteration - 1) / max(num_iterations - 1, 1),
        **{f"dual_policy/{who}_reward": 2.0 + noise[0] for who in ("policy_a", "npc", "combined")},
        **{f"dual_policy/{who}_reward_total": 8.0 + noise[1] for who in ("policy_a", "npc", "combined")},
    }  # fmt: skip
    losses = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "grad_norm")
    line |= {f"losses/{name}": noise[2 + k] for k, name in enumerate(losses)}
    for name in ("hearts", "ore", "attacks", "times_frozen"):
        line |= {f"env/{who}/{name}": 3.0 + noise[10] for who in ("policy_a", "npc")}
    if len(npcs) > 1:
        for name in npcs:
            share = 1 / len(npcs)
            line |= {f"dual_policy/npc/{name}/{key}": value for key, value in
                     (("share", share), ("episodes", 10 * share), ("win_rate", 0.5))}  # fmt: skip
    return line
