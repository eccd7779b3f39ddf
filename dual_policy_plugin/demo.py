"""`make demo`: a policy learns to beat a frozen one while you watch.

Trains, plays before and after, records games to watch, says who wins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dual_policy_plugin.config import Config
from dual_policy_plugin.devices import choose_device
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluate import SEED_OFFSET, evaluate_pinned
from dual_policy_plugin.files import publish
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.replay.page import PAGE_NAME, write_page
from dual_policy_plugin.replay.record import MAKE_FRAMES, record
from dual_policy_plugin.report.page.write import REPORT_NAME
from dual_policy_plugin.train import train

GAMES = 4
"""Of the replay."""


def demo(seed: int | None, train_dir: Path, overrides: Sequence[str] = ()) -> int:
    """Runs the demo and prints its one line; gives 0.

    Args:
        seed: of the run; None: 1.
        train_dir: the run's directory is made under `train_dir`/demo, named by the time of day.
        overrides: further words for the config, as for `dual-policy train`.

    Raises:
        ConfigError: the overrides leave nobody to play against.
    """
    run = f"demo/{datetime.now():%Y%m%d-%H%M%S}"
    words = ["+user=demo", f"run={run}", f"seed={1 if seed is None else seed}", f"train_dir='{train_dir}'", *overrides]
    config, resolved_yaml = compose_config(words)
    opponent = _opponent(config)
    started = time.perf_counter()
    result = train(config, resolved_yaml=resolved_yaml)
    took = time.perf_counter() - started
    path = config.train_dir / config.run
    fresh = path / "checkpoints" / "model_0000.safetensors"
    before = evaluate_pinned(
        resolve(str(fresh)),
        [resolve(opponent)],
        config,
        episodes=config.evals.episodes,
        seed=config.seed + SEED_OFFSET,  # the games of the evaluation after training
        device=choose_device(config.device),
    )[0]
    after = result["evals"][0]
    told = f"report {path / REPORT_NAME}" if config.report else f"result {path}/result.json"
    if config.env.name in MAKE_FRAMES:
        told += f", replay {_record_games(config, path, opponent)}"
    print(
        f"demo: win rate vs {opponent} {before.win_rate:.2f} -> {after['win_rate']:.2f} "
        f"[{after['low']:.2f}, {after['high']:.2f}] over {after['episodes']} episodes, "
        f"{result['agent_step'] / 1e6:.1f}M learner steps in {took:.0f} s; {told}"
    )
    return 0


def _record_games(config: Config, run_path: Path, opponent: str) -> Path:
    """The page of the first games of the evaluation after training."""
    device = choose_device(config.device)
    policies = resolve(str(run_path)), resolve(opponent)
    recording, _ = record(*policies, config, episodes=GAMES, seed=config.seed, device=device)
    page = run_path / PAGE_NAME
    publish(page, write_page(recording))
    return page


def _opponent(config: Config) -> str:
    """The URI of whom the learner is measured against: the first of evals.opponents, else the first NPC."""
    npcs = config.trainer.dual_policy.sources
    if config.evals.episodes == 0:
        raise ConfigError("evals.episodes=0 leaves the demo nothing to measure; use at least 1")
    if not npcs:
        raise ConfigError(
            "the demo measures a learner against an NPC, and none plays; leave trainer.dual_policy as it is"
        )
    return config.evals.opponents[0] if config.evals.opponents else npcs[0].uri
