"""Trains against a frozen poker player and measures, exactly, how much of the best response the learner found.

`make oracle` runs this: five seeds for each table and each of the learner's seats there. It fails unless every run
reaches REACHED of the gain over the NPC's own value within LIMIT_S of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
)
from dual_policy_plugin.pool_config import MatchmakingConfig
from dual_policy_plugin.train import train
from tests.oracle.best_response import best_response, mean_value, npc_value
from tests.oracle.kuhn import make_kuhn
from tests.oracle.npcs import TABLES, read_strategy, write_npc

REACHED = 0.95
"""Fraction of the gain (best response - NPC's own value) that a learner must find."""
LIMIT_S = 120
"""Seconds of processor time that a run may take, trainer and env worker together: one core's two minutes."""
TIMESTEPS = {2: 500_000, 3: 1_500_000}
"""Number of players -> the learner's steps, of which about every second is a decision."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Outcome:
    """Exact values of one seat: chips a hand."""

    npc_value: float
    """When the NPC sits there too."""
    best_value: float
    """Of the best response."""
    value: float
    """Of the trained policy, as it samples its actions."""
    core_s: float
    """Processor time of the whole training, its worker's too."""

    @property
    def gain_fraction(self) -> float:
        """How much of the possible gain was found; 1 is the best response."""
        return (self.value - self.npc_value) / (self.best_value - self.npc_value)


def oracle_config(folder: Path, table: str, seat: int, seed: int) -> Config:
    """One run on one core; the NPCs' files stand in `folder`."""
    num_players = TABLES[table].num_players
    npcs = [
        PolicySource(uri=str(_npc_file(folder, k)), weight=share) for k, (share, _) in enumerate(TABLES[table].npcs)
    ]
    trainer = TrainerConfig(
        total_timesteps=TIMESTEPS[num_players],
        horizon=64,
        epochs=4,
        num_minibatches=4,
        learning_rate=3e-3,
        # between a decision and its reward the learner waits and sees nothing: the value of such a step must not count
        gamma=1.0,
        gae_lambda=1.0,
        ent_coef=0.01,
        clip_vloss=False,
        num_workers=1,
        threads=1,
        precision="fp32",
        checkpoint_interval=10**6,
        dual_policy=DualPolicyConfig(
            enabled=True,
            training_agents_pct=1 / num_players,
            assignment=[seat],
            pool=npcs,
            matchmaking=MatchmakingConfig(type="weights"),
        ),
    )
    return Config(
        run=f"{table}_seat_{seat}_seed_{seed}",
        seed=seed,
        device="cpu",
        train_dir=folder,
        trainer=trainer,
        agent=AgentConfig(name="mlp", args={"hidden_size": 64}),
        env=EnvConfig(name="kuhn", num_envs=256, args={"num_players": num_players}),
        evals=EvalsConfig(episodes=0),
        report=False,
    )


def train_and_measure(folder: Path, table: str, seat: int, seed: int) -> Outcome:
    """Trains one policy in `folder` (which must exist) and enumerates what it is worth."""
    num_players, npcs = TABLES[table].num_players, TABLES[table].npcs
    for k, (_, npc) in enumerate(npcs):
        write_npc(_npc_file(folder, k), npc, num_players)
    config, began = oracle_config(folder, table, seat, seed), _core_s()
    result = train(config, make_host=make_kuhn)
    core_s = _core_s() - began
    learned = read_strategy(str(folder / config.run / result["checkpoint"]), num_players)
    return Outcome(
        npc_value=npc_value(npcs, seat, num_players),
        best_value=best_response(npcs, seat, num_players)[0],
        value=mean_value(learned, npcs, seat, num_players),
        core_s=core_s,
    )


def _npc_file(folder: Path, k: int) -> Path:
    return folder / f"npc_{k}.safetensors"


def _core_s() -> float:
    """Seconds of processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main() -> int:
    """Prints a line a run; 0 if all of them reached the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seats", type=int, nargs="+", help="the learner's; every seat without")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    logging.disable(logging.INFO)
    num_failed = 0
    print("table seat seed  NPC's own  learned     best    gain   core", flush=True)
    for table in options.tables:
        for seat in options.seats or range(TABLES[table].num_players):
            for seed in options.seeds:
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                    outcome = train_and_measure(Path(folder), table, seat, seed)
                is_good = outcome.gain_fraction >= REACHED and outcome.core_s < LIMIT_S
                num_failed += not is_good
                print(
                    f"{table:5} {seat:4} {seed:4} {outcome.npc_value:10.4f} {outcome.value:8.4f} "
                    f"{outcome.best_value:8.4f} {outcome.gain_fraction:7.1%} {outcome.core_s:4.0f} s"
                    f"{'' if is_good else '   FAILED'}",
                    flush=True,
                )
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
