"""Strategies with known values, and any strategy as an ordinary policy file: an `mlp` whose weights are set by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dual_policy_plugin import load_policy_from_checkpoint
from dual_policy_plugin.checkpoint import PolicyFile, encode_policy
from dual_policy_plugin.types import ObservationSpace
from tests.oracle.best_response import Shares, Strategy
from tests.oracle.kuhn import decision_histories, feature_names, information_sets, observations


def equilibrium(bluff: float) -> Strategy:
    """A Nash equilibrium of two players for any `bluff` in [0, 1/3] (Kuhn 1950): the first seat wins -1/18 a hand."""
    return {
        "": (bluff, 0.0, 3 * bluff),
        "p": (1 / 3, 0.0, 1.0),
        "b": (0.0, 1 / 3, 1.0),
        "pb": (0.0, bluff + 1 / 3, 1.0),
    }


@dataclass(kw_only=True, slots=True, frozen=True)
class Table:
    """A number of players, and who plays against the learner there."""

    num_players: int
    npcs: Shares


# history -> P(bet or call) with each card, the lowest first. Mixed everywhere, no two alike, and far from equilibrium:
# the first bluffs and calls too much with low cards, and folds the best one now and then. The two of the pool differ
# in what their first action says of the second: who begins with a pass is likely `_TRAPPER`, who calls.
_LOOSE: Strategy = {
    "": (0.45, 0.15, 0.60),
    "p": (0.60, 0.20, 0.85),
    "b": (0.15, 0.70, 0.95),
    "pb": (0.05, 0.25, 0.90),
}
_THREE: Strategy = {
    "": (0.40, 0.10, 0.25, 0.70),
    "p": (0.30, 0.15, 0.35, 0.80),
    "pp": (0.55, 0.20, 0.45, 0.90),
    "b": (0.05, 0.15, 0.40, 0.95),
    "bp": (0.10, 0.45, 0.75, 0.97),
    "bb": (0.03, 0.20, 0.50, 0.92),
    "pb": (0.07, 0.25, 0.35, 0.96),
    "pbp": (0.12, 0.35, 0.65, 0.94),
    "pbb": (0.04, 0.18, 0.55, 0.93),
    "ppb": (0.06, 0.30, 0.60, 0.91),
    "ppbp": (0.15, 0.50, 0.80, 0.98),
    "ppbb": (0.02, 0.22, 0.45, 0.89),
}
_TRAPPER: Strategy = {
    "": (0.03, 0.05, 0.10),
    "p": (0.15, 0.10, 0.90),
    "b": (0.20, 0.80, 0.97),
    "pb": (0.90, 0.95, 0.98),
}
_HOTHEAD: Strategy = {
    "": (0.96, 0.92, 0.97),
    "p": (0.85, 0.75, 0.95),
    "b": (0.05, 0.30, 0.90),
    "pb": (0.02, 0.04, 0.10),
}
TABLES = {
    "two": Table(num_players=2, npcs=((1.0, _LOOSE),)),
    "pool": Table(num_players=2, npcs=((0.4, _TRAPPER), (0.6, _HOTHEAD))),
    "three": Table(num_players=3, npcs=((1.0, _THREE),)),
}


def write_npc(path: Path, strategy: Strategy, num_players: int) -> None:
    """A policy file that plays `strategy`.

    An observation has a single 1, so with identity matrices in both layers the heads' weights are the logits: column i
    holds the logarithms of both actions' probabilities in information set i. Probabilities must lie inside (0, 1).
    """
    names = feature_names(num_players)
    size = len(names)
    logits = [(0.0, 0.0)]  # while it waits, either action
    for card, history in information_sets(num_players):
        bet = strategy[history][card]
        logits.append((math.log(1.0 - bet), math.log(bet)))
    heads = torch.zeros(3, size)  # pass, bet, value
    heads[:2] = torch.tensor(logits).t()
    tensors = {
        "encoder.linear.weight": torch.eye(size), "encoder.linear.bias": torch.zeros(size),
        "encoder.mean": torch.zeros(size), "encoder.var": torch.ones(size), "encoder.count": torch.zeros(()),
        "hidden.weight": torch.eye(size), "hidden.bias": torch.zeros(size),
        "heads.weight": heads, "heads.bias": torch.zeros(3),
    }  # fmt: skip
    file = PolicyFile(
        architecture="mlp",
        args={"hidden_size": size},
        observation_space=ObservationSpace(kind="vector", shape=(size,), features=names),
        actions=("pass", "bet"),
        tensors=tensors,
        metadata={"step": 0, "epoch": 0},
    )
    path.write_bytes(encode_policy(file))


@torch.no_grad()
def read_strategy(uri: str, num_players: int) -> Strategy:
    """The strategy that the policy at `uri` plays when it samples its actions, by its answers to every observation."""
    policy = load_policy_from_checkpoint(uri)
    sets = information_sets(num_players)
    obs = torch.stack([torch.from_numpy(observations(num_players)[one]) for one in sets])
    state = torch.zeros(len(sets), int(policy.state_size))  # type: ignore[arg-type]
    logits: Tensor = policy.forward_step(obs, state)[0]  # type: ignore[operator]
    bets = logits.double().softmax(dim=1)[:, 1].view(-1, num_players + 1)  # (histories, cards)
    return {history: tuple(row) for history, row in zip(decision_histories(num_players), bets.tolist(), strict=True)}
