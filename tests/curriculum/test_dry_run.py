"""The dry run: sums that are worked out by hand, a probe that measures what it says, and nothing started or written."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.config import Config, DualPolicyConfig, EvalsConfig, PolicySource, TrainerConfig, WandbConfig
from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.curriculum.dry_run import Speed, format_plan, measure_speed
from dual_policy_plugin.npc.resolver import PinnedPolicy

SPEED = Speed(startup_s=1.0, step_s=1e-3, episode_s=0.01, measured_s=4.2)
CONFIG = Config(trainer=TrainerConfig(total_timesteps=10_000), evals=EvalsConfig(episodes=100))  # 1 + 10 + 1 = 12 s
JOBS = [("seed=1", CONFIG), ("seed=2", CONFIG)]
NAMES = ("weak", "medium", "strong")
RUNGS = [
    PinnedPolicy(name=name, requested=name, uri=f"builtin://arena/{name}", sha256=f"{i}23456789abcd" * 5, num_bytes=1)
    for i, name in enumerate(NAMES)
]
LADDER = tuple(PolicySource(uri=rung.uri) for rung in RUNGS)
SETTINGS = CurriculumConfig(ladder=LADDER, episodes=200, max_attempts=2)


def plan(
    rungs: list[PinnedPolicy] = RUNGS,
    jobs: list[tuple[str, Config]] = JOBS,
    settings: CurriculumConfig = SETTINGS,
    launcher: str = "basic",
) -> list[str]:
    """The lines of the plan."""
    return format_plan(rungs, jobs, settings, SPEED, folder=Path("train_dir/x"), launcher=launcher).splitlines()


def test_each_stage_has_its_npc_digest_jobs_steps_and_times() -> None:
    lines = plan()
    assert lines[0] == "train_dir/x: 3 stages; nothing was started, nothing written"
    assert lines[2].split() == ["stage", "NPC", "sha256", "jobs", "steps", "job", "time", "gate", "URI"]
    assert [line.split() for line in lines[3:6]] == [
        ["1", "weak", "023456789abc", "2", "20,000", "0:00:24", "0:00:02", "builtin://arena/weak"],
        ["2", "medium", "123456789abc", "2", "20,000", "0:00:24", "0:00:04", "builtin://arena/medium"],
        ["3", "strong", "223456789abc", "2", "20,000", "0:00:24", "0:00:06", "builtin://arena/strong"],
    ]
    assert lines[7:] == [
        "jobs: 2 for each attempt at a stage, one after the other through the launcher basic",
        "  seed=1: 0:00:12",
        "  seed=2: 0:00:12",
        "speed: measured here in 4 s: 1k steps/s of the learner, 100 episodes/s of evaluation, 1.0 s to start a job",
        "time: 0:01:24 of jobs and gates if the first attempt at each stage passes, 0:02:48 if all take 2 attempts",
        "cost: unknown: set METTA_HOURLY_COST to dollars per hour",
    ]


def test_the_cost_is_that_of_the_first_attempts_up_to_that_of_all() -> None:
    jobs = [(name, replace(config, hourly_cost=36.0)) for name, config in JOBS]
    assert plan(jobs=jobs)[-1] == "cost: $0.84 to $1.68 at $36 an hour"  # 84 s and 168 s


@pytest.mark.parametrize(
    ("launcher", "max_batch_size", "how"),
    [
        ("basic", None, "one after the other"),
        ("submitit_local", None, "up to 2 at once"),
        ("submitit_slurm", 1, "one after the other"),
        ("submitit_slurm", 5, "up to 2 at once"),
    ],
)
def test_how_many_jobs_may_run_at_once_is_the_launchers_matter(
    launcher: str, max_batch_size: int | None, how: str
) -> None:
    lines = plan(settings=replace(SETTINGS, max_batch_size=max_batch_size), launcher=launcher)
    assert lines[7] == f"jobs: 2 for each attempt at a stage, {how} through the launcher {launcher}"


def test_one_job_is_not_listed() -> None:
    lines = plan(jobs=[("", CONFIG)])
    assert lines[7] == "jobs: one for each attempt at a stage, through the launcher basic"
    assert lines[8].startswith("speed: ")


def test_measuring_the_order_takes_its_time_too() -> None:
    lines = plan(settings=replace(SETTINGS, order="weakest_first", rating_episodes=1000))
    assert "order: weakest first, measured before stage 1 in 0:00:30; here as given" in lines  # 3 pairs
    assert lines[-2].startswith("time: 0:01:54 of jobs and gates")
    assert lines[-2].endswith("0:03:18 if all take 2 attempts")


def test_stages_of_self_play_have_no_digest_yet() -> None:
    settings = CurriculumConfig(ladder=(), stages=3, start="builtin://arena/weak", episodes=200)
    lines = plan(rungs=RUNGS[:1], settings=settings)
    assert lines[0].startswith("train_dir/x: 3 stages")
    assert lines[3].split()[1:3] == ["weak", "023456789abc"]
    assert lines[5].startswith("3      best so far  made by then  2 ")


def test_names_of_other_people_are_harmless() -> None:
    rungs = [replace(RUNGS[0], uri="wandb://a/b/model/x\x1b[2J:v1"), *RUNGS[1:]]
    text = "".join(plan(rungs=rungs, jobs=[("seed=\x07", CONFIG), ("seed=2", CONFIG)]))
    assert r"x\x1b[2J:v1" in text
    assert r"seed=\x07" in text
    assert text.isprintable()


class VirtualTrain:
    """A run of 100 steps an iteration on a clock of its own; the start takes 2 s, what is compiled first 1 s more."""

    def __init__(self, iteration_s: float, episode_s: float) -> None:
        self.now, self.steps, self.iteration_s, self.episode_s = 0.0, 0, iteration_s, episode_s
        self.seen: list[Config] = []

    def __call__(self, config: Config) -> dict[str, Any]:
        print("a panel")
        logging.getLogger("some.run").info("a line")
        self.seen.append(config)
        self.now += 2.0 + (1.0 if self.steps == 0 else 0.0)
        while self.steps < config.trainer.total_timesteps:
            self.steps += 100
            self.now += self.iteration_s
        opponents = max(1, len(config.evals.opponents)) + len(config.evals.held_out)
        self.now += config.evals.episodes * opponents * self.episode_s
        (config.train_dir / config.run).mkdir(exist_ok=True)
        return {"agent_step": self.steps}


@pytest.mark.parametrize(
    ("iteration_s", "opponents", "iterations"),
    [(0.5, [], 1 + 4), (0.01, [], 1 + 4 + 16 + 64 + 256), (0.1, ["a", "b"], 1 + 4 + 16)],
)
def test_the_probe_measures_start_step_and_episode_apart(
    iteration_s: float,
    opponents: list[str],
    iterations: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    train = VirtualTrain(iteration_s, episode_s=0.25)
    stand_in = PolicySource(uri="builtin://arena/random", act="greedy")
    dual = DualPolicyConfig(enabled=True, npc=stand_in, lock=Path("sweep/npc.lock.json"))
    config = replace(
        CONFIG,
        evals=EvalsConfig(opponents=opponents, held_out=["c"]),
        trainer=replace(CONFIG.trainer, dual_policy=dual, publish_uri="s3://bucket/x/", evaluate_interval=1),
        wandb=WandbConfig(mode="online"),
    )
    with caplog.at_level(logging.INFO):
        speed = measure_speed(config, "builtin://arena/weak", train, clock=lambda: train.now)
        assert logging.getLogger("some.run").isEnabledFor(logging.INFO)
    assert speed.startup_s == pytest.approx(2.0)
    assert speed.step_s == pytest.approx(iteration_s / 100)
    assert speed.episode_s == pytest.approx(0.25)
    assert speed.measured_s == pytest.approx(train.now)
    assert train.steps == 100 * iterations
    assert capsys.readouterr().out == ""
    assert caplog.text == ""
    for one in train.seen:
        assert not one.train_dir.exists()
        assert one.train_dir.is_relative_to(tempfile.gettempdir())
        assert one.trainer.dual_policy.npc == replace(stand_in, uri="builtin://arena/weak")
        assert one.trainer.dual_policy.lock is None  # no sweep has written one
        assert one.wandb.mode == "off"
        assert one.trainer.publish_uri is None
        assert one.trainer.evaluate_interval is None
