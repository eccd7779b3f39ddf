"""What is shown of a wait: a bar on a real terminal, which leaves no trace, and few log lines elsewhere."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

import dual_policy_plugin
from dual_policy_plugin import waiting as module
from dual_policy_plugin.report.progress import Progress
from dual_policy_plugin.waiting import current_line, panel_shows_waits, waiting

ROOT = Path(dual_policy_plugin.__file__).parent.parent
PROGRAM = """
import logging, sys, time
from dual_policy_plugin import waiting as module
from dual_policy_plugin.waiting import waiting
module.SHOWN_AFTER_S = 0.3
logging.basicConfig(format="%(message)s", level="INFO")
with waiting("looking up x"):
    with waiting("fetching s3://bucket/x.safetensors", 4_000_000, unit="B") as advance:
        for _ in range(8):
            advance(500_000)
            time.sleep(0.15)
        logging.info("a line of the log")
        time.sleep(0.3)
    time.sleep(0.5)
print("done")
"""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOWN_AFTER_S", 0.3)
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.5)


def on_a_terminal(script: str) -> str:
    """Everything that a program writes to a terminal of 100 columns."""
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen([sys.executable, "-c", script], stdin=inner, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    written = b""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if select.select([outer], [], [], 0.1)[0]:
            try:
                part = os.read(outer, 65536)
            except OSError:
                break
            if not part:
                break
            written += part
    assert child.wait(10) == 0
    os.close(outer)
    return written.decode()


def screen_of(written: str) -> list[str]:
    """The lines that are left, of the few sequences that a bar uses: start of line, line up, erase the line."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\r":
            fresh = True
            continue
        elif not part.startswith("\x1b"):
            lines[row] = lines[row] + part if not locals().get("fresh") else part
        fresh = False
    return [line.rstrip() for line in lines if line.strip()]


def test_a_bar_on_a_terminal_and_nothing_of_it_afterwards() -> None:
    written = on_a_terminal(PROGRAM)
    assert "fetching s3://bucket/x.safetensors" in written
    assert re.search(r"[1-4]\.[05] MB of 4\.0 MB, \d+%", written)
    assert "looking up x" in written  # once the inner one is over
    assert screen_of(written) == ["a line of the log", "done"]
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0  # the cursor is back


def test_a_short_wait_shows_nothing() -> None:
    assert on_a_terminal(PROGRAM.replace("0.3\n", "20\n", 1)) == "a line of the log\r\ndone\r\n"


def test_the_screen_is_clean_after_an_error() -> None:
    script = PROGRAM.replace('print("done")', "").replace("    time.sleep(0.5)", "    raise SystemExit(0)")
    written = on_a_terminal(script)
    assert screen_of(written) == ["a line of the log"]
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0


def test_few_log_lines_elsewhere(soon: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), waiting("playing 64 episodes", 100) as advance:
        for _ in range(13):
            advance(5)
            time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert re.fullmatch(r"playing 64 episodes: \d\d%, [01] s", lines[0])


def test_the_innermost_wait_of_each_thread_is_shown(soon: None) -> None:
    shown: list[str] = []

    def other() -> None:
        with waiting("sending files"):
            time.sleep(0.8)

    thread = threading.Thread(target=other)
    with waiting("waiting for jobs"):
        thread.start()
        with waiting("fetching a policy", 2_000, unit="B") as advance:
            advance(500)
            time.sleep(0.5)
            shown.append(current_line())
        time.sleep(0.1)
        shown.append(current_line())
        thread.join()
    without_seconds = [re.sub(r", \d+ s", "", line) for line in shown]
    assert without_seconds[0] == "fetching a policy: 500 B of 2.0 kB, 25%; sending files: waiting"
    assert without_seconds[1].startswith("waiting for jobs: waiting")
    assert current_line() == ""
    assert not [one for one in threading.enumerate() if one.name == "waiting"]


def test_a_panel_has_the_terminal_for_itself() -> None:
    script = PROGRAM.replace(
        'with waiting("looking up x"):', 'with module.panel_shows_waits(), waiting("looking up x"):'
    )
    assert on_a_terminal(script) == "a line of the log\r\ndone\r\n"
    with panel_shows_waits():
        assert module._display.has_panel
    assert not module._display.has_panel


def test_the_panel_of_a_run_shows_it(soon: None) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, height=40)
    with Progress("first", 100, console=console) as progress:
        progress.update(1, {"charts/agent_step": 50.0}, {})
        with waiting("playing 64 episodes", 4) as advance:
            advance(1)
            time.sleep(1.0)
    assert "waiting     playing 64 episodes: 25%, 0 s" in text.getvalue()
    assert "playing" not in text.getvalue().rpartition("╭")[2]  # in the last panel, which stays
    assert not module._display.has_panel


def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = module._Wait("playing", 100.0, "")
    wait.advance(25)
    wait.begun -= 30
    assert wait.line() == "playing: 25%, 1:30 left, 30 s"
    wait.advance(75)
    assert wait.line() == "playing: 100%, 30 s"


def test_waiting_costs_the_hot_path_nothing() -> None:
    begun = time.process_time()
    with waiting("playing", 10**6) as advance:
        for _ in range(100_000):
            advance(1)
    assert time.process_time() - begun < 0.5
