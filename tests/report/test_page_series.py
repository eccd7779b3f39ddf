"""Columns of metrics.jsonl, and how they are pooled: sums of episodes weigh, and nothing is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.report.page.charts import Line, draw_lines
from dual_policy_plugin.report.page.curves import (
    FEW_EPISODES,
    WIN_EPISODES,
    metric_line,
    one_run,
    win_line,
    win_windows,
)
from dual_policy_plugin.report.page.runs import read_run
from dual_policy_plugin.report.page.series import MAX_POINTS, pool_windows, read_series
from tests.report.made_runs import STEPS, make_run


def test_neighbours_are_pooled_by_their_weights() -> None:
    steps, rates = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 0.0, 0.5, 1.0])
    found = pool_windows(steps, rates, np.array([30.0, 10.0, 20.0, 20.0]), least=40)
    assert found.means.tolist() == [0.75, 0.75]
    assert found.weights.tolist() == [40.0, 40.0]
    assert found.steps.tolist() == [15.0, 35.0]


def test_every_window_has_what_it_must_and_the_rest_is_in_the_last() -> None:
    found = pool_windows(np.arange(8.0), np.arange(8.0), np.full(8, 8.0), least=20)
    assert found.weights.tolist() == [24.0, 40.0]
    assert found.means.tolist() == [1.0, 5.0]
    assert pool_windows(np.arange(2.0), np.arange(2.0), least=20).weights.tolist() == [2.0]


def test_what_has_no_value_or_no_weight_is_left_out() -> None:
    nan = math.nan
    steps, values = np.array([1.0, 2.0, nan, 4.0, 5.0]), np.array([1.0, nan, 3.0, 4.0, 5.0])
    found = pool_windows(steps, values, np.array([1.0, 1.0, 1.0, 0.0, 1.0]))
    assert found.means.tolist() == [1.0, 5.0]
    assert pool_windows(np.array([nan]), np.array([1.0])).means.tolist() == []


@pytest.mark.parametrize("length", [1, 399, 401, 12_345])
def test_a_long_series_keeps_its_mean_in_few_points(length: int) -> None:
    values = np.random.default_rng(0).normal(size=length)
    weights = np.random.default_rng(1).integers(1, 50, size=length).astype(np.float64)
    found = pool_windows(np.arange(length, dtype=np.float64), values, weights)
    assert len(found.means) <= MAX_POINTS
    assert found.weights.min() >= weights.sum() / MAX_POINTS * (1 - 1e-9)
    assert found.weights.sum() == weights.sum()
    mean = (found.means * found.weights).sum() / found.weights.sum()
    assert mean == pytest.approx((values * weights).sum() / weights.sum(), rel=1e-12, abs=1e-12)


def test_what_a_restart_did_again_is_pooled_where_it_belongs() -> None:
    found = pool_windows(np.array([1.0, 2.0, 3.0, 2.0]), np.array([1.0, 4.0, 3.0, 6.0]), least=2)
    assert found.steps.tolist() == [1.5, 2.5]
    assert found.means.tolist() == [2.5, 4.5]


def test_the_win_rate_has_the_interval_of_its_pooled_episodes(tmp_path: Path) -> None:
    run = read_run("r", make_run(tmp_path / "r", 800))
    found, line = win_windows(run), win_line(run, "r", 0)
    assert found.weights.tolist() == [WIN_EPISODES] * 40
    assert found.iterations == 20
    rates = np.arange(800).reshape(40, 20).mean(axis=1) / 799
    assert line.values == pytest.approx(rates)
    assert line.steps == pytest.approx(np.arange(1, 801).reshape(40, 20).mean(axis=1) * STEPS)
    assert line.band is not None
    assert (line.band[0][2], line.band[1][2]) == pytest.approx(wilson_interval(rates[2] * 200, 200))


def test_a_short_run_has_some_points_too(tmp_path: Path) -> None:
    found = win_windows(read_run("r", make_run(tmp_path / "r", 16)))
    assert found.weights.tolist() == [FEW_EPISODES] * 8


def test_a_rate_is_weighed_by_its_time(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 800)
    lines = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    for k, line in enumerate(lines):  # half of the iterations take ten times as long: 1000 steps in 1 s, in 10 s
        line |= {"timing/rollout_s": 0.5 + 9.0 * (k % 2), "charts/learner_SPS": 1000.0 / (1.0 + 9.0 * (k % 2))}
        line["timing/update_s"] = 0.5
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = metric_line(read_run("r", folder), "charts/learner_SPS", "", 0)
    assert np.median(line.values) == pytest.approx(2000 / 11, rel=1e-3)


def test_columns_have_nan_where_a_line_lacks_them(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1, "b": null}\n{"b": 2.5, "c": "text", "d": true}\n{"a": NaN}\n{"a": 1e999, "b": 1}\n')
    lines = read_series(path)
    assert lines.num_lines == 4
    assert lines.names == ["a", "b"]
    assert lines.not_numbers == ["c", "d"]
    assert np.nan_to_num(lines.column("a"), nan=-1).tolist() == [1, -1, -1, -1]
    assert np.nan_to_num(lines.column("b"), nan=-1).tolist() == [-1, 2.5, -1, 1]
    assert lines.last("a") == 1
    assert lines.last("z") is None


def test_a_whole_number_that_is_no_float_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"a": 1{"0" * 400}}}\n')
    assert math.isnan(read_series(path).column("a")[0])


@pytest.mark.parametrize("bad", ["{", "3", '"text"', '{"a": }', "[" * 100_000])
def test_a_line_in_the_middle_that_cannot_be_read_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(RunError, match=r"m\.jsonl line 2 is no JSON object; restore the file"):
        read_series(path)


def test_a_half_written_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b')
    lines = read_series(path)
    assert (lines.num_lines, lines.torn_bytes) == (1, 11)
    assert read_series(tmp_path / "none.jsonl").num_lines == 0


def test_what_is_of_episodes_is_pooled_as_a_win_rate_is(tmp_path: Path) -> None:
    run = read_run("r", make_run(tmp_path / "r", 400))
    returns, wins = metric_line(run, "dual_policy/policy_a_reward", "", 0), win_windows(run)
    assert returns.steps.tolist() == wins.steps.tolist()
    values = run.metrics.column("dual_policy/policy_a_reward")
    assert returns.values[0] == pytest.approx(values[: WIN_EPISODES // 10].mean())
    assert len(metric_line(run, "losses/entropy", "", 0).values) == 400


def test_the_evaluation_at_an_end_stands_where_it_was_played(tmp_path: Path) -> None:
    evals = {f"evals/weak/{key}": value for key, value in (("win_rate", 0.6), ("low", 0.5), ("high", 0.7))}
    folder = make_run(tmp_path / "r", 10, more=evals)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"agent_step": 4.5 * STEPS}))  # and 10 iterations now
    (plot,) = (plot for plot in one_run(read_run("r", folder))[0].shown if plot.name == "evaluations")
    steps, rates = plot.figure.axes[0].get_lines()[-1].get_data()
    assert np.asarray(steps).tolist() == [STEPS * k for k in (1, 2, 3, 4, 4.5, 5, 6, 7, 8, 9, 10)]
    assert np.asarray(rates).tolist() == [0.6] * 4 + [0.75] + [0.6] * 6


@pytest.mark.parametrize("values", [[0.003, 0.002921], [0.5, 0.6], [-0.00012345, -0.00012346], [123.4561, 123.4562]])
def test_long_numbers_stay_inside_their_figure(values: list[float]) -> None:
    line = Line(label="", steps=np.array([1.0, 2.0]), values=np.array(values))
    plot = draw_lines("x", "x", "", [line], is_small=True)
    assert plot is not None
    plot.figure.canvas.draw()
    labels = [label.get_window_extent() for label in plot.figure.axes[0].get_yticklabels()]
    assert len(labels) >= 2
    assert min(label.x0 for label in labels) >= 0
