"""`dual-policy curriculum status`: a table that is read at a glance, and names that cannot do harm."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.cli import main
from dual_policy_plugin.commands.curriculum import format_status
from dual_policy_plugin.curriculum.state import SweepState, read_state

SHA = "0123456789abcdef" * 4


def rung(name: str, rating: float | None) -> dict[str, Any]:
    bounds = {} if rating is None else {"low": rating - 30, "high": rating + 30}
    return {
        "name": name,
        "requested": f"builtin://arena/{name}",
        "uri": f"builtin://arena/{name}",
        "sha256": SHA,
        "rating": rating,
        "low": None,
        "high": None,
        **bounds,
    }


def job(num: int, stage: int, attempt: int, objective: float | None, status: str = "finished") -> dict[str, Any]:
    return {
        "num": num,
        "stage": stage,
        "attempt": attempt,
        "overrides": [f"seed={num}"],
        "status": status,
        "objective": objective,
        "checkpoint": f"{num}/checkpoints/model_0010.safetensors",
        "sha256": SHA,
        "agent_step": 1000,
        "elapsed_s": 1.5,
    }


def gate(stage: int, attempt: int, best: int, win_rate: float, decision: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "attempt": attempt,
        "job": best,
        "opponent": "weak",
        "rule": "wilson",
        "promote_at": 0.55,
        "win_rate": win_rate,
        "low": win_rate - 0.03,
        "high": win_rate + 0.03,
        "episodes": 1024,
        "passed": decision == "promote",
        "forgotten": [],
        "decision": decision,
        "why": f"its win rate {win_rate:.3f} has the lower bound {win_rate - 0.03:.3f}, to be compared with 0.55",
    }


STATE: dict[str, Any] = {
    "version": 1,
    "request": {"sweeper": {"ladder": ["a", "b", "c"], "stages": None}, "overrides": []},
    "rungs": [rung("weak", 0), rung("medium", 250), rung("strong", None)],
    "jobs": [
        job(0, 1, 1, 0.5),
        job(1, 1, 1, 0.7),
        job(2, 2, 1, 0.4),
        job(3, 2, 1, 0.3),
        job(4, 2, 2, None, "planned"),
        job(5, 2, 2, None, "failed"),
        job(6, 2, 2, 0.45),
    ],
    "gates": [gate(1, 1, 1, 0.71, "promote"), gate(2, 1, 2, 0.41, "repeat")],
    "stage": 2,
    "attempt": 2,
    "demotions": 0,
    "status": "running",
    "policy": {"path": "1/checkpoints/model_0010.safetensors", "sha256": SHA, "job": 1, "stage": 1},
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "curriculum.json").write_text(json.dumps(STATE))
    return folder


def status(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["curriculum", "status", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def cells(text: str) -> dict[str, list[str]]:
    """The table's rows by their stage."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("stage  NPC"))
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : start + 4]]
    return {row[0]: row[1:] for row in rows}


def test_each_stage_has_its_row_and_each_decision_its_reason(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = status(capsys, str(sweep))
    assert code == 0
    assert cells(out) == {
        "1": ["weak", "0 [-30, 30]", "1", "1", "0.71 [0.68, 0.74]", "promote"],
        "2": ["medium", "250 [220, 280]", "2", "2", "0.41 [0.38, 0.44]", "repeat"],
        "3": ["strong", "-", "-", "-", "-", "-"],
    }
    assert "\njobs: 5 finished, 1 planned, 1 failed\n" in out
    assert " ".join(out.split()).startswith(f"{sweep}: at stage 2 of 3, attempt 2 (")
    assert "\npolicy: 1/checkpoints/model_0010.safetensors (stage 1, job 1, sha256 0123456789ab)\n" in out
    flat = " ".join(out.split())
    assert "stage 1, attempt 1: promote: its win rate 0.710 has the lower bound 0.680" in flat
    assert "stage 2, attempt 1: repeat: its win rate 0.410" in flat


def changed(folder: Path, **values: Any) -> SweepState:
    """The state with other values, through a file of its own."""
    (folder / "curriculum.json").write_text(json.dumps({**STATE, **values}))
    state = read_state(folder)
    assert state is not None
    return state


def test_before_its_gate_a_stage_shows_its_best_job_so_far(tmp_path: Path) -> None:
    jobs = [job(0, 1, 1, 0.5), job(1, 1, 1, 0.7), job(2, 1, 1, 0.7), job(3, 1, 1, None, "planned")]
    state = changed(tmp_path, jobs=jobs, gates=[], stage=1, attempt=1, policy=None)
    text = format_status(state, "x", width=120)
    assert cells(text)["1"] == ["weak", "0 [-30, 30]", "1", "1", "-", "-"]
    assert "policy: none yet" in text
    assert "decisions" not in text


@pytest.mark.parametrize(
    ("values", "head"),
    [
        ({"status": "finished", "stage": 3}, "x: finished, all of its 3 stages"),
        ({"status": "stopped", "stage": 2}, "x: stopped at stage 2 of 3"),
    ],
)
def test_the_first_line_says_how_the_sweep_ended(tmp_path: Path, values: dict[str, Any], head: str) -> None:
    text = format_status(changed(tmp_path, **values), "x", width=120)
    assert text.splitlines()[0] == head
    assert cells(text)["2"][2] == "1"  # no attempt is under way


@pytest.mark.parametrize(
    ("order", "head"), [("given", "at stage 1 of 3"), ("weakest_first", "before stage 1 of 3, its")]
)
def test_before_its_npcs_are_ordered_no_stage_is_under_way(tmp_path: Path, order: str, head: str) -> None:
    request = {"sweeper": {"stages": None, "order": order}, "overrides": []}
    state = changed(tmp_path, request=request, jobs=[], gates=[], stage=1, attempt=1, policy=None)
    assert format_status(state, "x", width=120).startswith(f"x: {head}")


def test_demotions_are_counted_and_stages_of_self_play_are_there_before_their_npc(tmp_path: Path) -> None:
    request = {"sweeper": {"ladder": "self", "stages": 4}, "overrides": []}
    text = format_status(changed(tmp_path, request=request, demotions=2), "x", width=120)
    assert "; demotions: 2" in text
    assert "\n4      best so far  -" in text


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_the_terminal_and_keeps_the_end_of_a_long_name(tmp_path: Path, width: int) -> None:
    name = "a_team_with_a_long_name.a_project_with_a_long_name.model_0042"
    text = format_status(
        changed(tmp_path, rungs=[rung("weak", 0), rung(name, 1250), rung("strong", None)]), "x", width=width
    )
    table = text.split("\n\n")[1].splitlines()
    assert max(map(len, text.split("\n\n", 1)[1].splitlines())) <= width
    assert table[2].split()[1].endswith("_0042")
    assert table[2].split()[1].startswith("..")


def test_what_a_name_holds_never_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    evil = "x\x1b[2J\u202e"
    gates = deepcopy(STATE["gates"])
    gates[0]["why"] = "because\x1b]0;title\x07"
    policy = {**STATE["policy"], "path": "a\x1b[31m\nb"}
    state = changed(tmp_path, rungs=[rung(evil, 0), rung("b", 1), rung("c", 2)], gates=gates, policy=policy)
    for width in (60, 200):
        text = format_status(state, "dir\x1b[1m", width=width)
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert r"x\x1b[2J\u202e" in text
    assert r"a\x1b[31m\nb" in text


def test_json_is_the_files_content(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = status(capsys, str(sweep), "--format", "json")
    assert code == 0
    assert json.loads(out) == STATE


def test_a_folder_without_a_state_says_which_one_to_name(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = status(capsys, str(sweep.parent))
    assert (code, err.count("\n")) == (2, 1)
    assert f"holds no curriculum.json; name the folder of a curriculum sweep, for example {sweep}" in err
    (sweep / "0").mkdir()
    code, _, err = status(capsys, str(sweep / "0"))
    assert f"for example {sweep}" in err
    code, _, err = status(capsys, str(sweep / "nowhere" / "at_all"))
    assert (code, err.count("\n")) == (2, 1)
    assert "train_dir/<run>" in err


@pytest.mark.parametrize("text", ["[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "rungs": 3}', "{"])
def test_a_file_that_is_no_state_is_one_line(sweep: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (sweep / "curriculum.json").write_text(text)
    code, _, err = status(capsys, str(sweep))
    assert (code, err.count("\n")) == (2, 1)
    assert "curriculum.json" in err


def test_unknown_commands_name_the_one_that_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curriculum", "statu"]) == 2
    assert "did you mean `dual-policy curriculum status`?" in capsys.readouterr().err
    assert main(["curriculum"]) == 0
    assert "status" in capsys.readouterr().out
