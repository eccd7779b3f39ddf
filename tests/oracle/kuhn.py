"""Kuhn poker for any number of players: the rules as functions of a history, and a PettingZoo env made of them.

n players, a deck of n + 1 cards (0 is the lowest), an ante of 1, one bet of 1, one round (Kuhn 1950 for two players,
Abou Risk and Szafron 2010 for three). A history is the text of the actions so far, in seat order: "p" passes (checks,
or folds once somebody has bet), "b" bets (or calls). An information set is a card and a history; the history says
whose turn it is.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

PASS, BET = 0, 1
LETTERS = "pb"
InformationSet = tuple[int, str]  # card, history


def actor(num_players: int, history: str) -> int:
    """The seat whose turn it is after `history`."""
    return len(history) % num_players  # a round ends before anybody who has bet, called or folded would come again


def is_over(num_players: int, history: str) -> bool:
    """Whether nobody is to act after `history`: all passed, or all have answered the bet."""
    return len(history) == (history.index("b") if "b" in history else 0) + num_players


def has_folded(num_players: int, history: str, seat: int) -> bool:
    """Whether `seat` has passed on a bet."""
    return _answer(num_players, history, seat) == "p"


def _answer(num_players: int, history: str, seat: int) -> str:
    """What `seat` did from the first bet on, which is its last action; empty if it has not, or nobody bet."""
    first = history.find("b")
    return history[first:][(seat - first) % num_players :][:1] if first >= 0 else ""


def payoffs(cards: tuple[int, ...], history: str) -> list[int]:
    """What each seat wins in a game that is over: the pot goes to the highest card that did not fold."""
    num_players = len(cards)
    paid = [1 + (_answer(num_players, history, seat) == "b") for seat in range(num_players)]
    in_pot = [seat for seat in range(num_players) if not has_folded(num_players, history, seat)]
    winner = max(in_pot, key=lambda seat: cards[seat])
    return [sum(paid) - paid[seat] if seat == winner else -paid[seat] for seat in range(num_players)]


@lru_cache
def decision_histories(num_players: int) -> tuple[str, ...]:
    """Every history after which somebody is to act, the shorter ones first."""
    found, longer = [], [""]
    while longer:
        open_ones = [history for history in longer if not is_over(num_players, history)]
        found += open_ones
        longer = [history + letter for history in open_ones for letter in LETTERS]
    return tuple(found)


@lru_cache
def information_sets(num_players: int) -> tuple[InformationSet, ...]:
    """All of them, in the order of an observation's numbers."""
    return tuple((card, history) for history in decision_histories(num_players) for card in range(num_players + 1))


@lru_cache
def feature_names(num_players: int) -> tuple[str, ...]:
    """Names of an observation's numbers: one for "not your turn", then one for each information set."""
    return "wait", *(f"card_{card}_after_{history or 'deal'}" for card, history in information_sets(num_players))


@lru_cache
def observations(num_players: int) -> dict[InformationSet | None, Any]:
    """Information set (None: not your turn) -> what its owner sees: a 1 in its place, (num_features,) float32."""
    rows = np.eye(len(feature_names(num_players)), dtype=np.float32)
    return dict(zip([None, *information_sets(num_players)], rows, strict=True))


class Kuhn(ParallelEnv):  # type: ignore[misc]
    """One table. Every seat acts in every step; only the action of the seat whose turn it is counts.

    Who waits stays in its seat, so that what the hand pays at its end reaches the last decision. Who folds has its loss
    at once and leaves; of two players that ends the hand, of more it empties the seat.
    """

    metadata = {"name": "kuhn"}  # noqa: RUF012 - as PettingZoo has it

    def __init__(self, num_players: int) -> None:
        self.num_players = num_players
        self.possible_agents = [f"seat_{seat}" for seat in range(num_players)]
        self.agents: list[str] = []
        self.action_names = ("pass", "bet")
        self.feature_names = feature_names(num_players)
        self.max_episode_steps = 2 * num_players - 1
        self.agents_leave = num_players > 2
        self._observation_space = Box(0.0, 1.0, (len(self.feature_names),), np.float32)
        self._action_space = Discrete(len(LETTERS))

    def observation_space(self, agent: str) -> Box:
        return self._observation_space

    def action_space(self, agent: str) -> Discrete:
        return self._action_space

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.deal(tuple(Random(seed).sample(range(self.num_players + 1), self.num_players)))
        return self._observe(), {agent: {} for agent in self.agents}

    def deal(self, cards: tuple[int, ...]) -> None:
        """Starts a hand with these cards, one for each seat."""
        self.cards, self.history, self.agents = cards, "", list(self.possible_agents)

    def step(self, actions: dict[str, int]) -> Any:
        here, seat = self.agents, actor(self.num_players, self.history)
        self.history += LETTERS[int(actions[self.possible_agents[seat]])]
        rewards = dict.fromkeys(here, 0.0)
        gone = set()
        if is_over(self.num_players, self.history):
            paid = dict(zip(self.possible_agents, payoffs(self.cards, self.history), strict=True))
            rewards, gone = {agent: float(paid[agent]) for agent in here}, set(here)
        elif has_folded(self.num_players, self.history, seat):
            gone = {self.possible_agents[seat]}
            rewards[self.possible_agents[seat]] = -1.0  # its ante: it has not bet
        self.agents = [agent for agent in here if agent not in gone]
        seen = self._observe() | dict.fromkeys(gone, observations(self.num_players)[None])
        terminations = {agent: agent in gone for agent in here}
        return seen, rewards, terminations, dict.fromkeys(here, False), {agent: {} for agent in here}

    def _observe(self) -> dict[str, Any]:
        """What those see who are there."""
        rows = observations(self.num_players)
        seen = dict.fromkeys(self.agents, rows[None])
        if not is_over(self.num_players, self.history):
            seat = actor(self.num_players, self.history)
            seen[self.possible_agents[seat]] = rows[self.cards[seat], self.history]
        return seen


def make_kuhn(index: int, *, num_players: int) -> Kuhn:
    return Kuhn(num_players)
