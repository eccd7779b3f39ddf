"""The state file: what is written is what is read, and a spoilt file is one line."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.curriculum.state import (
    ChosenPolicy,
    EarlierRung,
    Gate,
    Job,
    Rung,
    SweepState,
    read_state,
    write_state,
)
from dual_policy_plugin.errors import RunError


def whole_state() -> SweepState:
    rung = Rung(name="weak", requested="builtin://arena/weak", uri="builtin://arena/weak", sha256="a" * 64)
    job = Job(
        num=0, stage=1, attempt=1, overrides=["seed=1"], status="finished", objective=1.0, checkpoint="0/checkpoints/x",
        sha256="b" * 64, agent_step=100, elapsed_s=2.5,
    )  # fmt: skip
    record = EarlierRung(opponent="weak", win_rate=0.5, low=0.4, high=0.6, episodes=10, ok=True)
    gate = Gate(
        stage=1, attempt=1, job=0, opponent="weak", rule="wilson", promote_at=0.55, win_rate=0.7, low=0.6, high=0.8,
        episodes=64, passed=True, forgotten=[record], decision="promote", why="so",
    )  # fmt: skip
    planned = Job(num=1, stage=2, attempt=1, overrides=[])
    policy = ChosenPolicy(path="0/checkpoints/x", sha256="b" * 64, job=0, stage=1)
    return SweepState(
        request={"sweeper": {"stages": None}, "overrides": [], "config": {}}, rungs=[rung], jobs=[job, planned],
        gates=[gate], stage=2, attempt=1, demotions=1, policy=policy,
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    write_state(tmp_path, whole_state())
    assert read_state(tmp_path) == whole_state()
    fresh = SweepState(request={})
    write_state(tmp_path, fresh)
    assert read_state(tmp_path) == fresh
    content = json.loads((tmp_path / "curriculum.json").read_text())
    assert list(content) == ["version", *asdict(fresh)]
    assert (content["version"], content["status"], content["policy"]) == (1, "running", None)


SPOILS: list[tuple[Any, str]] = [
    (lambda state: state.update(version=2), "no state of version 1"),
    (lambda state: state.pop("gates"), "not as a curriculum sweep writes it"),
    (lambda state: state.pop("stage"), "SweepState has no stage"),
    (lambda state: state["jobs"][0].pop("status"), "Job has no status"),
    (lambda state: state["jobs"][0].update(more=1), "more is not a known key"),
    (lambda state: state["rungs"][0].update(sha256=None), "not as a curriculum sweep writes it"),
    (lambda state: state.update(stage="two"), "stage='two'"),
    (lambda state: state.update(jobs=[1]), "not as a curriculum sweep writes it"),
]


@pytest.mark.parametrize(("spoil", "line"), SPOILS)
def test_a_spoilt_file_is_one_line(tmp_path: Path, spoil: Any, line: str) -> None:
    write_state(tmp_path, whole_state())
    path = tmp_path / "curriculum.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=re.escape(line)) as caught:
        read_state(tmp_path)
    assert str(path) in str(caught.value)
    assert "use another run= name" in str(caught.value)
