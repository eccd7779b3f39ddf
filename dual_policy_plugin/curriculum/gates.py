"""A gate's games: a stage's best policy against the stage's NPC, and against earlier ones if it passed.

The games are new ones: a policy that was chosen for its win rate in some games is likely worse than it looked there.
Takes pinned policies; gives a verdict and the records against earlier NPCs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from dual_policy_plugin.config import Config
from dual_policy_plugin.curriculum.config import KEY, CurriculumConfig
from dual_policy_plugin.curriculum.state import EarlierRung
from dual_policy_plugin.devices import choose_device, set_threads
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluate import assign_seats, evaluate_pinned, read_spec
from dual_policy_plugin.evaluation.matches import MatchResult, seatings_of
from dual_policy_plugin.evaluation.sequential import GateVerdict, Rule, can_pass, sprt, wilson_gate
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.rng import LOW_31_BITS, hash32

NUM_LOOKS = 8
"""How often `sprt` looks at its games, at most."""
_EARLIER = NUM_LOOKS  # stands where a look's number does in the seed of games against earlier NPCs
_RATING = NUM_LOOKS + 1
_log = logging.getLogger(__name__)


def bind_rule(settings: CurriculumConfig, episodes_per_seed: int) -> Rule:
    """The rule of the settings, as a function of wins and episodes."""
    if settings.rule == "sprt":
        return partial(
            sprt,
            p0=settings.promote_at,
            p1=settings.promote_at + settings.indifference,
            alpha=settings.alpha,
            beta=settings.beta,
            episodes_per_seed=episodes_per_seed,
        )
    return partial(
        wilson_gate,
        promote_at=settings.promote_at,
        confidence=settings.confidence,
        episodes_per_seed=episodes_per_seed,
    )


def count_seatings(config: Config) -> int:
    """How many episodes of a gate share a seed: 2 where both policies play from either side.

    Raises:
        DualPolicyError: the env cannot be built, or the learner's share does not fit it.
    """
    spec = read_spec(config)
    return len(seatings_of(assign_seats(spec.num_agents, config.trainer.dual_policy), spec))


def check_gate(settings: CurriculumConfig, episodes_per_seed: int) -> None:
    """Raises a ConfigError where not even a policy that wins every game would pass."""
    rule = bind_rule(settings, episodes_per_seed)
    if not can_pass(rule, settings.episodes):
        raise ConfigError(
            f"{KEY}.promote_at={settings.promote_at:g} can never be passed with {KEY}.episodes={settings.episodes}, "
            f"not even by winning all of them (rule={settings.rule}); lower promote_at, or play more episodes"
        )


def play_gate(
    policy: PinnedPolicy,
    rungs: Sequence[PinnedPolicy],
    config: Config,
    settings: CurriculumConfig,
    *,
    stage: int,
    attempt: int,
    seed: int,
) -> tuple[GateVerdict, list[EarlierRung]]:
    """The verdict of a stage's gate, and the policy's records against earlier NPCs if it passed.

    Args:
        policy: the stage's best.
        rungs: the NPCs of the stages up to this one.
        config: of the job that made the policy.
        settings: of the sweep.
        stage: which stage.
        attempt: which attempt; every attempt plays games of its own.
        seed: of the sweep.
    """
    device = gate_device(config)
    set_threads(config)
    rule = bind_rule(settings, count_seatings(config))
    num_looks = NUM_LOOKS if settings.rule == "sprt" else 1
    per_look = -(-settings.episodes // num_looks)

    def play(opponents: Sequence[PinnedPolicy], look: int, episodes: int) -> list[MatchResult]:
        games = gate_seed(seed, stage, attempt, look)
        return evaluate_pinned(policy, opponents, config, episodes=episodes, seed=games, device=device)

    wins, episodes, look = 0.0, 0, 0
    verdict: GateVerdict | None = None
    while episodes < settings.episodes and (verdict is None or verdict.passed is None):
        (result,) = play(rungs[-1:], look, per_look)
        wins, episodes, look = wins + result.wins, episodes + result.episodes, look + 1
        verdict = rule(wins, episodes)
    assert verdict is not None
    earlier = list({one.sha256: one for one in rungs[:-1] if one.sha256 != rungs[-1].sha256}.values())
    if not verdict.passed or not earlier:
        return verdict, []
    least = 0.5 - settings.forget_tolerance
    return verdict, [_as_record(one, least) for one in play(earlier, _EARLIER, settings.episodes)]


def _as_record(result: MatchResult, least: float) -> EarlierRung:
    """A match as the state file has it; `ok` from a win rate of `least` on."""
    return EarlierRung(
        opponent=result.opponent,
        win_rate=result.win_rate,
        low=result.low,
        high=result.high,
        episodes=result.episodes,
        ok=result.win_rate >= least,
    )


def gate_seed(seed: int, stage: int, attempt: int, look: int) -> int:
    """The seed of a look's games: no two looks, attempts or stages of a sweep share games."""
    return int(hash32(seed, stage, attempt, look)) & LOW_31_BITS


def rating_seed(seed: int) -> int:
    """The seed of the games that order the ladder."""
    return gate_seed(seed, 0, 0, _RATING)


def gate_device(config: Config) -> torch.device:
    """Where the gates are played: as the jobs, but on this machine, which may be a cluster's front end."""
    name = config.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("device=%s is not on this machine: its CPU plays the gates; the jobs keep their device", name)
        name = "cpu"
    return choose_device(name)
