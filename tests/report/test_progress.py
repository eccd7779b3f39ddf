from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from dual_policy_plugin.report.figures import ASCII_SPARKS, History, format_duration, format_number, sparkline
from dual_policy_plugin.report.progress import Progress

METRICS = {
    "charts/agent_step": 1_000_000.0,
    "dual_policy/win_rate": 0.625,
    "dual_policy/episodes": 32.0,
    "dual_policy/policy_a_reward": 3.25,
    "dual_policy/npc_reward": 1.5,
    "losses/policy_loss": -0.0123,
    "losses/value_loss": 0.3,
    "losses/entropy": 1.5,
    "losses/approx_kl": 0.0004,
    "losses/clipfrac": 0.11,
    "losses/explained_variance": 0.81,
    "losses/grad_norm": 0.42,
}
TIMING = {
    "charts/learner_SPS": 43_123.0,
    "charts/env_agent_SPS": 1_286_246.0,
    "cost/hourly_total": 1.5,
    "cost/accrued_total": 0.3,
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def terminal(width: int = 80, height: int = 24, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="", write_through=True)
    return Console(
        file=file, force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False, _environ={}
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.TextIOWrapper)
    assert isinstance(console.file.buffer, io.BytesIO)
    return console.file.buffer.getvalue().decode()


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=80, _environ={}), file


def panel_lines(progress: Progress, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(progress._panel())
    return capture.get().rstrip("\n").split("\n")


def test_the_panel_shows_every_figure_in_80_columns() -> None:
    clock, console = Clock(), terminal()
    progress = Progress(
        "my_experiment",
        2_000_000,
        npc="builtin://arena/medium",
        digest="sha256:1a2b3c4d5e6f",
        console=console,
        clock=clock,
    )
    progress.update(1, {"charts/agent_step": 500_000.0}, {})
    clock.now_s += 100
    progress.update(2, METRICS, TIMING, checkpoint="model_0002.safetensors")
    assert panel_lines(progress, console) == [
        "╭─ my_experiment against builtin://arena/medium 1a2b3c4d ──────────────────────╮",
        "│ steps       ━━━━━━━━━          50.0 % 1,000,000 of 2,000,000                 │",
        "│ speed       learner 43.1k steps/s   env agents 1.29M steps/s                 │",
        "│ time        elapsed 0:01:40   left 0:03:20   iteration 2                     │",
        "│ win rate    0.625 over 32 episodes   ▆                                       │",
        "│ return      learner 3.250   NPC 1.500 (mean per agent)                       │",
        "│ losses      policy -0.012   value 0.300   entropy 1.500                      │",
        "│             kl 0.0004   clipped 0.110   explained 0.810   grad 0.420         │",
        "│ cost        $0.30 at $1.50 an hour                                           │",
        "│ checkpoint  model_0002.safetensors                                           │",
        "╰──────────────────────────────────────────────────────────────────────────────╯",
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (200, 50), (30, 12)])
def test_the_panel_never_exceeds_the_terminal(width: int, height: int) -> None:
    console = terminal(width, height)
    progress = Progress(
        "a [bold] run " * 9, 10**12, npc="wandb://entity/project/" * 9, digest="ab" * 32, console=console
    )
    for iteration in range(300):
        progress.update(iteration, {**METRICS, "charts/agent_step": 1e12}, {**TIMING, "cost/accrued_total": 1e9})
    lines = panel_lines(progress, console)
    assert len(lines) == 11
    assert {len(line) for line in lines} == {min(width, 100)}
    assert "[bold]" in lines[0]


def test_an_empty_panel_says_what_it_waits_for() -> None:
    console = terminal()
    text = "\n".join(panel_lines(Progress("r", 100, npc="x", console=console), console))
    for part in ("0.0 %", "0 of 100", "learner - steps/s", "left -", "no episode has ended yet", "none yet"):
        assert part in text
    assert "cost" not in text


def test_without_an_npc_nothing_is_said_of_one() -> None:
    console = terminal()
    progress = Progress("r", 100, console=console)
    progress.update(1, {"dual_policy/policy_a_reward": 1.0}, {})
    text = "\n".join(panel_lines(progress, console))
    assert "learner 1.000" in text
    assert "NPC" not in text
    assert "win rate" not in text
    assert "against" not in text


def test_an_ascii_terminal_gets_ascii() -> None:
    console = terminal(encoding="ascii")
    progress = Progress("r", 2_000_000, npc="x", console=console)
    progress.update(1, METRICS, TIMING)
    text = "\n".join(panel_lines(progress, console))
    assert text.isascii()
    assert "over 32 episodes   +" in text


def test_the_win_rate_is_over_the_newest_iterations_with_500_episodes() -> None:
    console = terminal()
    progress = Progress("r", 100, npc="x", console=console)
    for win_rate, episodes in ((0.0, 400.0), (0.5, 300.0), (1.0, 100.0), (0.8, 100.0)):
        progress.update(1, {"dual_policy/win_rate": win_rate, "dual_policy/episodes": episodes}, {})
    # the last three have 500 episodes: (0.5 * 300 + 1.0 * 100 + 0.8 * 100) / 500
    assert "0.660 over 500 episodes   ▁▅█▇" in "\n".join(panel_lines(progress, console))


def test_the_time_left_is_from_the_mean_speed_of_this_process() -> None:
    clock, (console, file) = Clock(), plain()
    progress = Progress("r", 1_000_000, console=console, clock=clock)
    progress.update(1, {"charts/agent_step": 600_000.0}, {"charts/learner_SPS": 200_000.0})  # a continued run
    clock.now_s += 10
    progress.update(2, {"charts/agent_step": 700_000.0}, {"charts/learner_SPS": 200_000.0})
    lines = file.getvalue().splitlines()
    assert "left 0:00:02" in lines[0]  # 400,000 steps at the reported speed
    assert "left 0:00:30" in lines[1]  # 300,000 at 10,000/s


def test_plain_lines_come_every_ten_seconds_and_at_the_end() -> None:
    clock, (console, file) = Clock(), plain()
    with Progress("exp", 2_000_000, npc="x", console=console, clock=clock) as progress:
        for iteration in range(1, 26):
            clock.now_s += 1
            progress.update(iteration, {**METRICS, "charts/agent_step": iteration * 1000.0}, TIMING)
        progress.message("evaluation [bold]: 0.4")
    lines = file.getvalue().splitlines()
    assert [line.split(" | ")[2] for line in lines if line.startswith("exp: ")] == [
        "iteration 1",
        "iteration 11",
        "iteration 21",
        "iteration 25",
    ]
    assert lines[4] == "evaluation [bold]: 0.4"
    assert lines[0] == (
        "exp: 0.1 % | 1,000/2,000,000 learner steps | iteration 1 | learner 43.1k steps/s, env agents 1.29M steps/s | "
        "elapsed 0:00:01, left 0:00:46 | win rate 0.625 over 32 episodes | return learner 3.250, NPC 1.500 (mean per "
        "agent) | policy -0.012, value 0.300, entropy 1.500, kl 0.0004, clipped 0.110, explained 0.810, grad 0.420 | "
        "$0.30 at $1.50 an hour"
    )


def test_a_line_that_was_printed_is_not_repeated_at_the_end() -> None:
    clock, (console, file) = Clock(), plain()
    with Progress("exp", 100, console=console, clock=clock) as progress:
        progress.update(1, METRICS, TIMING)
    assert len(file.getvalue().splitlines()) == 1


@contextlib.contextmanager
def stderr_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[logging.StreamHandler[io.StringIO], io.StringIO]]:
    """A root handler on stderr, as Hydra and `logging.basicConfig` set one."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield handler, stream
    finally:
        logging.getLogger().removeHandler(handler)


def test_log_messages_go_above_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    with stderr_handler(monkeypatch) as (handler, stream):
        with Progress("exp", 100, npc="x", console=console) as progress:
            progress.update(1, METRICS, TIMING)
            logging.getLogger("trainer").warning("a [bold] message")
            print("a printed line")
            progress.message("ours")
        assert stream.getvalue() == ""
        assert handler.stream is stream
        logging.getLogger("trainer").warning("afterwards")
        assert stream.getvalue() == "[trainer] afterwards\n"
    screen = replay(written(console), rows=60)
    assert screen[:3] == ["[trainer] a [bold] message", "a printed line", "ours"]
    assert screen[3].startswith("╭─ exp against x ─")
    assert screen[-1].startswith("╰──")
    assert len(screen) == 14  # three lines and one panel: nothing torn, nothing left behind


def replay(output: str, rows: int) -> list[str]:
    """What stands on the screen after `output`: a terminal that knows only what rich's Live uses."""
    screen, row, column, i = [""] * rows, 0, 0, 0
    while i < len(output):
        char = output[i]
        if char == "\x1b":
            end = i + 2
            while not output[end].isalpha():
                end += 1
            count, command = output[i + 2 : end], output[end]
            if command == "A":
                row -= int(count or 1)
            elif command == "K":
                assert count == "2"
                screen[row] = ""
            else:
                assert (command, count) in {("l", "?25"), ("h", "?25")} or command == "m"
            i = end
        elif char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
        else:
            screen[row] = screen[row][:column].ljust(column) + char + screen[row][column + 1 :]
            column += 1
        i += 1
    while screen and not screen[-1].strip():
        screen.pop()
    return [line.rstrip() for line in screen]


def test_an_error_in_the_loop_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stdout, num_threads = terminal(), sys.stdout, threading.active_count()

    def fail() -> None:
        with Progress("exp", 100, console=console) as progress:
            progress.update(1, METRICS, TIMING)
            raise ZeroDivisionError

    with stderr_handler(monkeypatch) as (handler, stream):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert handler.stream is stream
        assert sys.stderr is stream
    assert sys.stdout is stdout
    end = time.monotonic() + 5
    while threading.active_count() > num_threads and time.monotonic() < end:
        time.sleep(0.01)  # rich does not wait for its thread
    assert threading.active_count() <= num_threads  # one of an earlier test may have ended meanwhile
    assert written(console).rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_an_update_costs_microseconds_and_four_frames_a_second() -> None:
    console = terminal()
    with Progress("exp", 2_000_000, npc="x", console=console) as progress:
        start, cpu = time.perf_counter(), time.process_time()
        count = 0
        while time.perf_counter() - start < 1.0:
            progress.update(count, METRICS, TIMING)
            count += 1
            time.sleep(0.001)
        cpu = time.process_time() - cpu
    frames = written(console).count("╭─ exp")
    assert 3 <= frames <= 7  # the first, four in the second, the last
    assert cpu / count < 0.001


def test_history_merges_neighbours_when_full() -> None:
    history = History(capacity=4)
    for value in (0.0, 1.0, 0.5, 0.7, 0.1, 0.3):
        history.add(value)
    assert history.values(8) == pytest.approx([0.5, 0.6, 0.2])
    assert history.values(2) == pytest.approx([0.5, 0.4])
    long = History(capacity=64)
    for i in range(100_000):
        long.add(i / 100_000)
    values = long.values(100)
    assert 32 <= len(values) <= 64
    assert values == sorted(values)
    assert values[0] < 0.04
    assert values[-1] > 0.95


def test_sparkline_spans_0_to_1() -> None:
    assert sparkline([0.0, 0.5, 1.0, -3.0, 7.0]) == "▁▅█▁█"
    assert sparkline([0.0, 1.0], ASCII_SPARKS) == "_#"


def test_figures_are_short() -> None:
    assert format_duration(3725.4) == "1:02:05"
    assert format_duration(None) == "-"
    assert [format_number(value) for value in (0.0, 0.5, -0.00012345, 12.3456)] == [
        "0.000",
        "0.500",
        "-0.000123",
        "12.346",
    ]
