"""A gate's games with a stand-in that counts them: which are played, with which seeds, until when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dual_policy_plugin.config import Config, TrainerConfig
from dual_policy_plugin.curriculum import gates
from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.evaluation.matches import MatchResult
from dual_policy_plugin.npc.resolver import PinnedPolicy

Calls = list[tuple[list[str], int, int]]
"""(opponents, episodes, seed) of each evaluation."""


def pinned(name: str, sha256: str = "") -> PinnedPolicy:
    return PinnedPolicy(name=name, requested=name, uri=f"builtin://arena/{name}", sha256=sha256 or name, num_bytes=0)


RUNGS = [pinned("weak"), pinned("medium"), pinned("strong")]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plays a gate of stage `len(rungs)` in which the policy has these win rates; gives verdict, records and calls."""

    def run(rates: dict[str, float], rungs: Sequence[PinnedPolicy] = RUNGS, **values: Any) -> Any:
        calls: Calls = []

        def evaluate(
            policy: PinnedPolicy,
            opponents: Sequence[PinnedPolicy],
            config: Config,
            *,
            episodes: int,
            seed: int,
            device: torch.device,
        ) -> list[MatchResult]:
            assert torch.get_num_threads() == 2, "the order of sums is a job's: a restart plays the same games"
            calls.append(([one.name for one in opponents], episodes, seed))
            results = []
            for one in opponents:
                wins = round(rates[one.name] * episodes)
                low, high = wilson_interval(wins, episodes)
                results.append(
                    MatchResult(
                        opponent=one.name, win_rate=wins / episodes, low=low, high=high, episodes=episodes,
                        wins=wins, draws=0, learner_return=0.0, opponent_return=0.0,
                    )
                )  # fmt: skip
            return results

        monkeypatch.setattr(gates, "evaluate_pinned", evaluate)
        monkeypatch.setattr(gates, "count_seatings", lambda config: 2)
        settings = CurriculumConfig(ladder=(), stages=3, **values)
        threads = torch.get_num_threads()
        verdict, forgotten = gates.play_gate(
            pinned("new"),
            rungs,
            Config(device="cpu", trainer=TrainerConfig(threads=2)),
            settings,
            stage=len(rungs),
            attempt=1,
            seed=5,
        )
        torch.set_num_threads(threads)
        return verdict, forgotten, calls

    return run


def test_a_policy_that_passes_plays_every_earlier_npc_too(play: Any) -> None:
    verdict, forgotten, calls = play({"weak": 0.41, "medium": 0.39, "strong": 0.7}, episodes=1000)
    assert verdict.passed
    assert verdict.episodes == 1000
    assert [(one.opponent, one.win_rate, one.ok) for one in forgotten] == [
        ("weak", 0.41, True),
        ("medium", 0.39, False),
    ]
    assert [(names, episodes) for names, episodes, _ in calls] == [(["strong"], 1000), (["weak", "medium"], 1000)]
    assert calls[0][2] != calls[1][2]


def test_the_tolerance_is_a_bound_that_may_be_met(play: Any) -> None:
    _, forgotten, _ = play({"weak": 0.4, "medium": 0.5, "strong": 0.7}, episodes=1000, forget_tolerance=0.1)
    assert [one.ok for one in forgotten] == [True, True]
    _, forgotten, _ = play({"weak": 0.499, "medium": 0.5, "strong": 0.7}, episodes=1000, forget_tolerance=0.0)
    assert [one.ok for one in forgotten] == [False, True]


def test_a_policy_that_fails_plays_no_earlier_npc(play: Any) -> None:
    verdict, forgotten, calls = play({"strong": 0.56}, episodes=1000)
    assert verdict.passed is False  # mirrored games: 500 pairs are too few for 0.56 to show 0.55
    assert forgotten == []
    assert len(calls) == 1


def test_an_npc_that_stands_in_the_ladder_twice_is_played_once(play: Any) -> None:
    rungs = [pinned("weak"), pinned("weak-2", "weak"), pinned("medium"), pinned("strong"), pinned("medium-2", "medium")]
    _, forgotten, calls = play({"weak-2": 0.5, "strong": 0.5, "medium-2": 0.7}, rungs, episodes=1000)
    assert calls[1][0] == ["weak-2", "strong"]
    assert [one.opponent for one in forgotten] == ["weak-2", "strong"]


# a pair of mirrored games adds rate * log(0.6 / 0.55) + (1 - rate) * log(0.4 / 0.45); +-log(20) decides
@pytest.mark.parametrize(
    ("rate", "passed", "looks"),
    [
        (0.9, True, 1),  # 0.0665 a pair: 46 pairs
        (0.7, True, 2),  # 0.0256: 118
        (0.42, False, 2),  # -0.0318: 95
        (0.3, False, 1),  # -0.0563: 54
        (0.575, None, 8),
    ],
)
def test_sprt_looks_until_it_knows(play: Any, rate: float, passed: bool | None, looks: int) -> None:
    verdict, _, calls = play({"weak": rate}, RUNGS[:1], rule="sprt", episodes=1000)
    assert verdict.passed is passed
    assert len(calls) == looks
    assert verdict.episodes == 125 * looks
    assert len({seed for _, _, seed in calls}) == looks


def test_no_two_gates_share_games() -> None:
    keys = [(stage, attempt, look) for stage in range(6) for attempt in range(6) for look in range(10)]
    seeds = {gates.gate_seed(1, *key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert gates.gate_seed(1, 1, 1, 0) != gates.gate_seed(2, 1, 1, 0)
