"""`dual-policy report`: what the page says of runs, sweeps and curricula, and its one line for what it cannot show."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.cli import main
from dual_policy_plugin.report.page.matrix import rating_difference
from dual_policy_plugin.report.page.runs import RUN_FILES
from tests.curriculum.test_status import STATE
from tests.report.made_runs import STEPS, make_run

VOID = ("meta", "br", "path", "use", "image", "stop")


class Reader(HTMLParser):
    """What a page shows: its tags, whether they are closed in order, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def shown(path: Path) -> str:
    return " ".join(" ".join(read(path).words).split())


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def test_the_page_of_a_run_says_what_it_came_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = "run: r\ntrainer:\n  total_timesteps: 20480\n  dual_policy:\n    assignment: last\n    lock: ${oc.env:X}\n"
    folder = make_run(tmp_path / "r", 40, config=config)
    assert report(folder) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder}/report.html (0.")
    assert err == ""
    text = shown(folder / "report.html")
    for words in (
        "win rate against weak 0.750 [0.661, 0.822] over 100 episodes", "learner steps 20,480 of 20,480",
        "time 0:00:20 40 iterations", "cost $0.40", "state finished", "weak npc builtin://arena/weak",
        "ab" * 32, "8 agents in each of its envs; assignment last, training_agents_pct by default. acts agents",
        "learner 4 4-7 NPC 4 0-3",
        "a point is about 2 iterations and 20 episodes", "total_timesteps: 20480", "lock: ${oc.env:X}",
        "0.750 0.661 to 0.822 100 +191 (+116 to +266)", "A win is an episode in which", "dual-policy-plugin",
    ):  # fmt: skip
        assert words in text, words
    titles = re.findall(r"<h3>(.*?)</h3>", (folder / "report.html").read_text())
    assert titles == [
        "Win rate in training", "Return per agent", "Return per side", "policy loss", "value loss", "entropy",
        "approx. KL", "clipped share", "explained variance", "gradient norm", "learning rate", "attacks", "hearts",
        "ore", "times_frozen", "Steps per second", "Seconds per iteration", "Cost", "Rating differences",
    ]  # fmt: skip


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    report(make_run(tmp_path / "r", npcs=["a", "b"]))
    reader = read(tmp_path / "r" / "report.html")
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        if not name.startswith("xmlns"):
            assert "http" not in value, (name, value)
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png")), value
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in reader.attributes
    assert "url(http" not in (tmp_path / "r" / "report.html").read_text()


def test_a_pool_is_shown_npc_by_npc(tmp_path: Path) -> None:
    names = [f"npc_{k}" for k in range(9)]
    report(make_run(tmp_path / "r", 400, npcs=names))
    text = shown(tmp_path / "r" / "report.html")
    assert "Win rate against each NPC" in text
    assert "The 7 of 9 NPCs that played most." in text
    assert "npc_8 npc builtin://arena/npc_8" in text


def test_evaluations_over_time_are_drawn_with_the_last_one(tmp_path: Path) -> None:
    evals = {f"evals/weak/{key}": value for key, value in (("win_rate", 0.6), ("low", 0.5), ("high", 0.7))}
    report(make_run(tmp_path / "r", more=evals), "--png", tmp_path / "png")
    assert "Win rate in evaluations" in shown(tmp_path / "r" / "report.html")
    assert (tmp_path / "png" / "evaluations.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_written_as_png_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(make_run(tmp_path / "r"), "--png", tmp_path / "deep" / "png", "--out", tmp_path / "page.html")
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path}/deep/png (19 figures)"
    found = sorted(path.name for path in (tmp_path / "deep" / "png").iterdir())
    assert len(found) == 19
    assert {"win_rate.png", "entropy.png", "env_hearts.png", "cost.png", "rating_differences.png"} <= set(found)
    assert not (tmp_path / "r" / "report.html").exists()


def test_unknown_metrics_are_drawn_where_they_are_few_and_else_named(tmp_path: Path) -> None:
    more: dict[str, Any] = {f"mine/{k:02}": 1.0 for k in range(15)} | {"mine/text": "words", "x": math.inf}
    report(make_run(tmp_path / "r", more=more))
    text = shown(tmp_path / "r" / "report.html")
    assert "mine/11" in text
    assert "Not drawn: mine/12, mine/13, mine/14, x" in text
    assert "No numbers, and not drawn: mine/text" in text


HOSTILE = "<script>alert('x')</script>\"'&‮$\\frac{" + "a" * 300


def test_other_peoples_names_stay_text(tmp_path: Path) -> None:
    config = "run: |-\n  </pre><script>alert(1)</script>\nnote: ‮reversed\n"
    folder = make_run(
        tmp_path / "<b>$run$", npcs=["weak", "_x_"], config=config, more={HOSTILE: 1.0, "env/npc/<i>": 2.0}
    )
    lock = json.loads((folder / "npc.lock.json").read_text())
    lock["npcs"][0] |= {"requested": HOSTILE, "metadata": {"run": HOSTILE[:20]}}
    (folder / "npc.lock.json").write_text(json.dumps(lock))
    result = json.loads((folder / "result.json").read_text())
    result["evals"][0]["opponent"] = HOSTILE
    (folder / "result.json").write_text(json.dumps(result))
    assert report(folder) == 0
    reader = read(folder / "report.html")
    assert not {"script", "b>", "i"} & set(reader.tags)
    text = " ".join(reader.words)
    assert "<script>alert('x')</script>\"'&\\u202e$\\frac{" in text
    assert "</pre><script>alert(1)</script>" in text
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text
    assert "<b>$run$" in text


def test_a_curriculum_shows_its_ladder_and_every_decision(tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    for num in range(3):
        make_run(sweep / str(num), seed=num, config=f"run: s\nseed: {num}\n")
    (sweep / "curriculum.json").write_text(json.dumps(STATE))
    assert report(sweep) == 0
    text = shown(sweep / "report.html")
    for gate in STATE["gates"]:
        assert gate["why"] in text
        assert gate["decision"] in text
    for rung in STATE["rungs"]:
        assert f"{rung['name']} " in text
    for words in (
        "1 weak 0 [-30, 30]",
        "2 medium 250 [220, 280]",
        "3 strong -",
        "Ratings of the rungs",
        "5 2 2 failed",
    ):
        assert words in text, words
    assert re.search(r"job 2 finished weak 0\.75 \[0\.66, 0\.82\] \S+ 0\.750 10,240 0:00:10 \$0\.20 2", text)


def test_a_sweep_without_a_job_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "curriculum.json").write_text(json.dumps({**STATE, "jobs": [], "gates": []}))
    assert report(tmp_path / "s") == 0
    assert "1 weak 0 [-30, 30]" in shown(tmp_path / "s" / "report.html")


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "one", config="run: one\nseed: 1\ntrainer:\n  horizon: 32\n")
    second = make_run(tmp_path / "two", npcs=["weak", "medium"], config="run: two\nseed: 1\ntrainer:\n  horizon: 64\n")
    assert report(first, second, "--out", tmp_path / "page.html") == 0
    text = shown(tmp_path / "page.html")
    assert "run state win rates learner's return objective learner steps time cost horizon" in text
    assert re.search(rf"one finished weak 0\.75 \S+ \S+ \S+ 0\.750 {20 * STEPS:,} 0:00:10 \$0\.20 32", text)
    assert "two finished weak 0.75 [0.66, 0.82], medium 0.75" in text
    assert "Win rate of run against opponent" in text
    assert "config.yaml of two" in text
    assert "Drawn are" not in text


def test_of_many_runs_the_best_are_drawn(tmp_path: Path) -> None:
    for num in range(16):
        make_run(tmp_path / "s" / str(num), 5)
    assert report(tmp_path / "s") == 0
    assert "Drawn are the 14 of 16 runs with the highest objective." in shown(tmp_path / "s" / "report.html")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "r", 5), make_run(tmp_path / "b" / "r", 5)
    report(first, second, first, "--out", tmp_path / "page.html")
    text = shown(tmp_path / "page.html")
    assert str(first) in text
    assert str(second) in text
    assert text.count("config.yaml of") == 2


CROSS: dict[str, Any] = {
    "env": "arena", "policies": [{"name": "mine"}, {"name": "weak"}], "roles": [], "episodes": 64,
    "win_rate": [[0.5, 0.8], [0.2, 0.5]], "intransitive_share": 0.0, "sure_intransitive_share": 0.0,
    "ratings": [
        {"name": "mine", "rating": 240.8, "low": 200.0, "high": 280.0, "anchored": False, "worst_case": 0.8},
        {"name": "weak", "rating": 0.0, "low": 0.0, "high": 0.0, "anchored": True, "worst_case": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize("is_named", [True, False])
def test_a_cross_play_is_shown_with_its_ratings(tmp_path: Path, is_named: bool) -> None:
    folder = make_run(tmp_path / "r", 5)
    path = (tmp_path if is_named else folder) / "cross_play.json"
    path.write_text(json.dumps(CROSS))
    assert report(folder, *(["--evaluation", path] if is_named else [])) == 0
    text = shown(folder / "report.html")
    assert "mine 241 200 to 280 0.80" in text
    assert "weak 0 given -" in text
    assert "64 episodes a cell" in text


@pytest.mark.parametrize(
    ("key", "value"), [("win_rate", [[0.5]]), ("ratings", [{}]), ("policies", 3), ("episodes", "x")]
)
def test_a_file_that_is_no_cross_play_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(CROSS | {key: value}))
    assert report(make_run(tmp_path / "r", 5), "--evaluation", tmp_path / "c.json") == 2
    assert one_line(capsys).startswith(f"error: {tmp_path}/c.json is no cross-play; name a file that")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("rate", "episodes", "points"),
    [(0.5, 100, 0.0), (10 / 11, 100, 400.0), (1.0, 50, 400 * math.log10(99)), (0.0, 50, -400 * math.log10(99))],
)
def test_a_rating_difference_is_elos(rate: float, episodes: float, points: float) -> None:
    assert rating_difference(rate, episodes) == pytest.approx(points)


def test_what_is_no_run_is_one_line_that_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "train_dir" / "first", 3)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "model_0001.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (tmp_path / "empty", "is empty, no run has begun there; name a run directory"),
        (tmp_path / "train_dir", f"is no run directory; there are runs in it: {run}"),
        (run / "checkpoints", f"is no run directory, it has none of {', '.join(RUN_FILES)}; did you mean {run}?"),
        (run / "metrics.jsonl", f"is a file; name the run directory, for example {run}"),
        (tmp_path / "none", "is not there; name a run directory"),
    ):  # fmt: skip
        assert report(folder) == 2
        assert one_line(capsys).startswith(f"error: {folder} {said}")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", '{"iteration": 1}\n???\n{"iteration": 2}\n', "metrics.jsonl line 2 is no JSON object"),
        ("timing.jsonl", "7\n{}\n", "timing.jsonl line 1 is no JSON object"),
        ("result.json", '{"evals": [{}]}', "result.json is not as a run writes it (KeyError: 'opponent')"),
        (
            "result.json",
            '{"evals": [], "iterations": "ten"}',
            "result.json is not as a run writes it (ValueError: 'ten'",
        ),
        ("result.json", "{", "result.json holds no JSON"),
        ("config.yaml", "a: [1\n", "config.yaml is no config of a run"),
        ("npc.lock.json", "[]", "npc.lock.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    folder = make_run(tmp_path / "r", 3)
    (folder / name).write_text(text)
    assert report(folder) == 2
    assert said in one_line(capsys)
    assert not (folder / "report.html").exists()


def test_a_half_written_line_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r", 20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 21, "losses/ent')
    assert report(folder) == 0
    said = "the last line of metrics.jsonl is half written, and left out"
    assert capsys.readouterr().err == f"note: r: {said}\n"
    assert said in shown(folder / "report.html")
    assert f"learner steps {20 * STEPS:,}" in shown(folder / "report.html")


def test_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 60, result=False, config="trainer: {total_timesteps: 61440}\n")
    assert report(folder) == 0
    assert "state stopped after 50% of its steps; the same command goes on" in shown(folder / "report.html")
    descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert report(folder) == 0
    finally:
        os.close(descriptor)
    text = shown(folder / "report.html")
    assert "state still going 50% of its steps" in text
    assert "win rate, newest training episodes 0.983 [0.858, 0.998] over 30 episodes" in text


def test_a_run_that_was_asked_for_more_is_not_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 20)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"iterations": 10}))
    report(folder)
    text = shown(folder / "report.html")
    assert "state stopped" in text
    assert "the evaluation of result.json is of iteration 10; the run has gone on to 20 since" in text


def test_a_run_without_metrics_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("run: r\n")
    assert report(tmp_path / "r") == 0
    assert capsys.readouterr().err == "note: r: there are no metrics yet\n"
    assert "<svg" not in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "{tmp}"], "--out={tmp} is a folder; name a file in it, --out={tmp}/report.html"),
        (["--out", "{tmp}/no/page.html"], "--out={tmp}/no/page.html cannot be written, there is no folder {tmp}/no;"),
        (["--png", "{tmp}/r/result.json"], "--png={tmp}/r/result.json is a file; name a folder"),
        (["--evaluation", "{tmp}/none.json"], "{tmp}/none.json could not be read: No such file or directory"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    make_run(tmp_path / "r", 3)
    assert report(tmp_path / "r", *(word.format(tmp=tmp_path) for word in words)) == 2
    assert one_line(capsys).startswith(f"error: {said.format(tmp=tmp_path)}")


def test_a_folder_that_cannot_be_written_names_the_other_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "r", 3)
    (folder / "report.html").mkdir()  # as root every folder can be written
    assert report(folder) == 2
    assert "name another file with --out" in one_line(capsys)
    assert report(folder, "--out", tmp_path / "page.html") == 0


def test_ten_thousand_iterations_take_seconds_and_no_torch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 10_000, npcs=["weak", "medium", "strong"])
    assert (folder / "metrics.jsonl").stat().st_size > 12e6
    assert (folder / "timing.jsonl").stat().st_size > 2e6
    program = (
        f"import sys\nfrom dual_policy_plugin.cli import main\n"
        f"failed = main(['report', {str(folder)!r}])\nsys.exit(failed or 3 * ('torch' in sys.modules))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time of its one thread: what the wall clock shows where nothing else runs
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0
    assert (folder / "report.html").stat().st_size < 1.5e6


@pytest.mark.parametrize("has_browser", [True, False])
def test_the_page_is_shown_in_the_users_browser(tmp_path: Path, has_browser: bool) -> None:
    folder, seen = make_run(tmp_path / "r", 3), tmp_path / "seen"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(0o755)
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)} | ({"BROWSER": f"{browser} %s"} if has_browser else {})
    command = [sys.executable, "-m", "dual_policy_plugin", "report", str(folder), "--open"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert seen.exists() == has_browser
    if has_browser:
        assert seen.read_text().strip() == (folder / "report.html").as_uri()
    else:
        assert done.stderr == f"note: no browser was found; open {folder}/report.html in one\n"
