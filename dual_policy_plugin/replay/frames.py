"""What is drawn of an episode: plain numpy arrays, of whatever env.

Made by `arena_frames.py` and `mettagrid_frames.py`, read by `page.py` and `gif.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FACINGS = ("", "north", "south", "west", "east")
"""Names of the numbers in `Frames.facings`; 0: it has not turned to any side yet."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Frames:
    """An episode of T steps with A agents. A cell is row * width + column; frame t is what stood there before step t,
    frame T how it ended."""

    height: int
    width: int
    """Cells inside the border wall."""
    cells: NDArray[np.uint16]
    """(T + 1, A): where each agent stands."""
    facings: NDArray[np.uint8]
    """(T + 1, A): see FACINGS."""
    actions: NDArray[np.uint8]
    """(T, A): what each agent did in step t, as the number of an action."""
    returns: NDArray[np.float32]
    """(T + 1, A): rewards so far."""
    state: dict[str, NDArray[np.uint16]]
    """name -> (T + 1, A): ore, hearts, and what else the env has."""
    walls: list[int]
    mines: list[int]
    altars: list[int]
    """Cells."""
    stocks: NDArray[np.uint16]
    """(T + 1, number of altars): hearts that each altar has left."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.actions)


@dataclass(kw_only=True, slots=True, frozen=True)
class Game:
    """What must be known to see an episode again: where it began, and what everybody did."""

    seed: int
    """Of the round: what the env was reset with."""
    number: int
    """The env's number."""
    actions: NDArray[np.uint8]
    """(T, A)."""
    returns: NDArray[np.float64]
    """(A,): the returns that evaluation counted."""


def empty_frames(num_frames: int, num_agents: int, names: tuple[str, ...], num_altars: int) -> dict[str, Any]:
    """The arrays of `Frames` that have an entry per frame, all zeros; without actions."""
    shape = (num_frames, num_agents)
    return {
        "cells": np.zeros(shape, np.uint16),
        "facings": np.zeros(shape, np.uint8),
        "returns": np.zeros(shape, np.float32),
        "state": {name: np.zeros(shape, np.uint16) for name in names},
        "stocks": np.zeros((num_frames, num_altars), np.uint16),
    }
