"""TensorBoard's own reader finds every figure of a run once, also after a stop and after work that was done again."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dual_policy_plugin.errors import ConfigError, RunError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.run_state import STATE_NAME
from dual_policy_plugin.train import train

STEPS = 8 * 8 * 4
"""Learner steps of an iteration."""
WORDS = [
    "+dual_policy=checkpoint", "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/forager", "device=cpu",
    "agent.hidden_size=16", "env.num_envs=8", "env.episode_steps=12", "trainer.horizon=8", "trainer.threads=1",
    "trainer.num_minibatches=2", "trainer.checkpoint_interval=2", "evals.episodes=8", "run=r",
]  # fmt: skip


def play(folder: Path, iterations: int, *words: str) -> dict[str, Any]:
    config, text = compose_config(
        [*WORDS, f"train_dir={folder}", f"trainer.total_timesteps={iterations * STEPS}", *words]
    )
    return train(config, resolved_yaml=text)


def lines(run: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def read(run: Path) -> EventAccumulator:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return reader.Reload()


def scalars(reader: EventAccumulator) -> dict[tuple[str, int], float]:
    """(tag, step) -> value; no pair may stand there twice."""
    events = [(tag, event.step, event.value) for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)]
    twice = [pair for pair, count in Counter((tag, step) for tag, step, _ in events).items() if count > 1]
    assert not twice
    return {(tag, step): value for tag, step, value in events}


def written(run: Path, result: dict[str, Any]) -> dict[tuple[str, int], float]:
    """What metrics.jsonl, timing.jsonl (of work that was done again, the newest) and result.json say."""
    timings = {line["iteration"]: line for line in lines(run, "timing.jsonl") if "timing/rollout_s" in line}
    found: dict[tuple[str, int], float] = {}
    for line in lines(run, "metrics.jsonl"):
        step = int(line["charts/agent_step"])
        found |= {(name, step): value for name, value in (line | timings[int(line["iteration"])]).items()}
        del found["iteration", step]
    for match in result["evals"]:
        names = ("win_rate", "low", "high", "episodes")
        found |= {(f"evals/{match['opponent']}/{name}", result["agent_step"]): match[name] for name in names}
    return found


def same(got: dict[tuple[str, int], float], wanted: dict[tuple[str, int], float]) -> bool:
    assert got.keys() == wanted.keys()
    return all(np.float32(got[pair]) == np.float32(wanted[pair]) for pair in wanted)  # event files hold float32


def test_every_figure_stands_there_once(tmp_path: Path) -> None:
    run = tmp_path / "r"
    result = play(tmp_path, 4, "tensorboard=true", "trainer.evaluate_interval=2")
    reader = read(run)
    got = scalars(reader)
    assert same(got, written(run, result))
    assert {step for _, step in got} == {STEPS * i for i in range(1, 5)}
    assert ("evals/forager/win_rate", 2 * STEPS) in got
    assert ("charts/learner_SPS", STEPS) in got
    assert ("timing/update_s", STEPS) in got
    texts = {tag: reader.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]}
    assert texts.keys() == {"config/text_summary", "npcs/text_summary"}
    assert "    run: r\n" in texts["config/text_summary"]
    assert result["npcs"][0]["sha256"] in texts["npcs/text_summary"]

    state = run / "state" / STATE_NAME
    early = state.read_bytes()
    longer = play(tmp_path, 8, "tensorboard=true")
    wanted = written(run, longer) | {key: value for key, value in got.items() if key[0].startswith("evals/")}
    assert same(scalars(read(run)), wanted)  # with the evaluation of the end that it had first
    reader.Reload()
    assert same(scalars(reader), wanted), "whoever was looking on sees the same"

    state.write_bytes(early)  # as if it had been killed before a later one was saved
    again = play(tmp_path, 8, "tensorboard=true")
    assert len(lines(run, "timing.jsonl")) > 12
    got = scalars(read(run))
    assert same({pair: got[pair] for pair in written(run, again)}, written(run, again))
    assert sorted({step for _, step in got}) == [STEPS * i for i in range(1, 9)]
    times = [event.wall_time for event in read(run).Scalars("charts/agent_step")]
    assert times == sorted(times)
    sizes = [path.stat().st_size for path in sorted((run / "tensorboard").iterdir())]
    assert (len(sizes), sizes[0], sizes[1] > 0) == (2, 0, True)


def test_switched_on_later_it_shows_what_was_before(tmp_path: Path) -> None:
    run = tmp_path / "r"
    play(tmp_path, 2, "evals.episodes=0")
    assert not (run / "tensorboard").exists()
    result = play(tmp_path, 3, "tensorboard=true", "evals.episodes=0")
    assert same(scalars(read(run)), written(run, result))


def test_a_missing_package_is_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [one for one in sys.modules if one.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError) as caught:
        play(tmp_path, 1, "tensorboard=true")
    assert str(caught.value) == (
        "tensorboard=true needs the package tensorboard; install it with "
        "`pip install 'dual-policy-plugin[tensorboard]'`, or use tensorboard=false"
    )
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "tensorboard").write_text("a file")
    with pytest.raises(RunError, match=r"r/tensorboard could not be written: File exists; a file stands"):
        play(tmp_path, 1, "tensorboard=true")
