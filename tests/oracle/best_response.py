"""Exact values of Kuhn poker by enumeration of all deals and histories: of given strategies, and of the best response.

A strategy is a table: history -> for each card the probability of "b". Whoever plays it plays it on any seat, since the
history says whose turn it is. Of several NPCs one is drawn before each hand and plays it on all NPC seats to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from tests.oracle.kuhn import LETTERS, actor, decision_histories, is_over, payoffs

Strategy = dict[str, tuple[float, ...]]
Shares = Sequence[tuple[float, Strategy]]
"""NPCs with the probability that each is drawn; these sum up to 1."""


def chance(strategy: Strategy, history: str, card: int, letter: str) -> float:
    """The probability that `strategy` goes on with `letter`."""
    bet = strategy[history][card]
    return bet if letter == "b" else 1.0 - bet


def value(strategies: Sequence[Strategy], seat: int) -> float:
    """What `seat` wins a hand on average when each seat plays its own strategy."""
    num_players = len(strategies)

    def expected(cards: tuple[int, ...], history: str) -> float:
        if is_over(num_players, history):
            return payoffs(cards, history)[seat]
        who = actor(num_players, history)
        return sum(
            chance(strategies[who], history, cards[who], letter) * expected(cards, history + letter)
            for letter in LETTERS
        )

    deals = list(permutations(range(num_players + 1), num_players))
    return sum(expected(cards, "") for cards in deals) / len(deals)


def seated(learner: Strategy, npc: Strategy, seat: int, num_players: int) -> list[Strategy]:
    """`learner` on its seat, `npc` on all others."""
    return [learner if other == seat else npc for other in range(num_players)]


def mean_value(learner: Strategy, npcs: Shares, seat: int, num_players: int) -> float:
    """What `learner` wins a hand on average on `seat` against NPCs that are drawn by their shares."""
    return sum(share * value(seated(learner, npc, seat, num_players), seat) for share, npc in npcs)


def npc_value(npcs: Shares, seat: int, num_players: int) -> float:
    """What `seat` wins a hand on average when the NPC that was drawn plays there too."""
    return sum(share * value([npc] * num_players, seat) for share, npc in npcs)


def best_response(npcs: Shares, seat: int, num_players: int) -> tuple[float, Strategy]:
    """The most that `seat` can win a hand on average against NPCs on all other seats, and a pure strategy that does.

    For each own card, backward over the histories: all deals with this card and all NPCs go along together, each with
    the probability that it is so and that the NPC's play leads there. Where the seat is to act it cannot tell them
    apart, so the better of its two sums is the most it can get (it remembers its own past, so no choice bears on
    another branch).
    """
    deals = list(permutations(range(num_players + 1), num_players))
    choices: dict[tuple[int, str], str] = {}

    def most(card: int, history: str, reach: dict[tuple[int, tuple[int, ...]], float]) -> float:
        if is_over(num_players, history):
            return sum(weight * payoffs(cards, history)[seat] for (_, cards), weight in reach.items())
        who = actor(num_players, history)
        if who == seat:
            values = {letter: most(card, history + letter, reach) for letter in LETTERS}
            choices[card, history] = max(values, key=lambda letter: values[letter])
            return max(values.values())
        total = 0.0
        for letter in LETTERS:
            onward = {
                (k, cards): weight * chance(npcs[k][1], history, cards[who], letter)
                for (k, cards), weight in reach.items()
            }
            total += most(card, history + letter, onward)
        return total

    best = 0.0
    for card in range(num_players + 1):
        reach = {
            (k, cards): share / len(deals)
            for k, (share, _) in enumerate(npcs)
            for cards in deals
            if cards[seat] == card
        }
        best += most(card, "", reach)
    return best, {
        history: tuple(float(choices.get((card, history)) == "b") for card in range(num_players + 1))
        for history in decision_histories(num_players)
    }
