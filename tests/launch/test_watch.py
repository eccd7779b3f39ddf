"""`dual-policy watch`: a real command under it, its signals, its heartbeat, its time."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import dual_policy_plugin.heartbeat as heartbeat
from dual_policy_plugin.commands.watch import run
from dual_policy_plugin.errors import EXIT_AGAIN, EXIT_LIMIT, ConfigError, RunError
from dual_policy_plugin.evaluate import evaluate_pinned
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.npc.resolver import resolve

PYTHON = [sys.executable, "-S", "-c"]
BEATING = """
import os, sys, time
path, text = os.environ["DUAL_POLICY_HEARTBEAT"], sys.argv[1]
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    with open(path, "r+") as file: file.write(text)
    os.utime(path)
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_the_exit_code_is_the_commands(script: str, code: int) -> None:
    assert run(["--", "bash", "-c", script]) == code


def test_words_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--", "-h", "--words-of", "a b", "'", '"', "*", "$HOME", "", "ü\n"]
    monkeypatch.setenv("MORE", "x='1 2' \\$y \"z'\"")
    dump = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    assert run(["--words-of", "MORE", "--", *PYTHON, dump, str(tmp_path / "words"), *words]) == 0
    assert json.loads((tmp_path / "words").read_text()) == [*words, "x=1 2", "$y", "z'"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "watch has no command; write it behind --"),
        (["--", "/no/such"], "/no/such cannot be run: No such file or directory; see PATH"),
        (["--max-runtime-hours", "-1", "--", "true"], "'-1' is no number of 0 or more"),
        (["--grace-seconds", "inf", "--", "true"], "'inf' is no number of 0 or more"),
        (["--words-of", "OPEN", "--", "true"], "OPEN=a 'b has no words: No closing quotation; close every quote"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPEN", "a 'b")
    with pytest.raises(ConfigError, match=re.escape(line)) as error:
        run(words)
    assert "\n" not in str(error.value)


def test_a_command_without_a_sign_of_life_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--heartbeat-timeout-seconds", "0.3", "--startup-seconds", "0.6"]
    start = time.monotonic()
    assert run([*words, "--", "sleep", "60"]) == EXIT_AGAIN
    assert 0.6 <= time.monotonic() - start < 5
    assert re.search(r"^watch: no sign of life for \d s; the command is ended and may be started again$",
                     capfd.readouterr().err, re.MULTILINE)  # fmt: skip
    assert run([*words, "--", *PYTHON, BEATING, "", "1.5"]) == 0  # longer than both, with signs of life


def test_a_command_that_falls_silent_is_ended_after_the_shorter_time() -> None:
    start = time.monotonic()
    words = ["--heartbeat-timeout-seconds", "0.4", "--startup-seconds", "30"]
    assert run([*words, "--", *PYTHON, BEATING + "\ntime.sleep(60)", f"{1:20.3f}", "0.3"]) == EXIT_AGAIN
    assert time.monotonic() - start < 6


def test_signs_of_life_while_it_sets_up_are_no_promise_of_more() -> None:
    words = ["--heartbeat-timeout-seconds", "0.2", "--startup-seconds", "2.5", "--", *PYTHON]
    assert run([*words, BEATING + "\ntime.sleep(1)", "", "0.2"]) == 0
    assert run([*words, BEATING + "\ntime.sleep(60)", "", "0.2"]) == EXIT_AGAIN


def test_what_does_not_end_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """As torchrun's ranks, which have sessions of their own."""
    pids = tmp_path / "pids"
    deaf = f"trap '' TERM; echo $$ >> {pids}; while :; do sleep 1; done"
    script = f"(setsid bash -c {shlex.quote(deaf)}) & {deaf}"
    words = ["--heartbeat-timeout-seconds", "0.1", "--startup-seconds", "1", "--grace-seconds", "0.3"]
    assert run([*words, "--", "bash", "-c", script]) == EXIT_AGAIN
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started)


def test_the_time_is_over_and_the_command_may_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved"
    script = f"trap 'touch {saved}; exit 0' TERM; sleep 60 & wait"
    assert run(["--max-runtime-hours", "0.0002", "--", "bash", "-c", script]) == 0  # it was done by then
    assert saved.exists()
    assert run(["--max-runtime-hours", "0.0002", "--", "sleep", "60"]) == EXIT_LIMIT
    line = "watch: --max-runtime-hours=0.0002 is over; a run has been told to save and goes on with the same command"
    assert capfd.readouterr().err.count(line) == 2


def test_the_time_of_earlier_starts_counts() -> None:
    start = time.monotonic()
    assert run(["--max-runtime-hours", "1", "--", *PYTHON, BEATING, f"{3599.0:20.3f}", "60"]) == EXIT_LIMIT
    assert time.monotonic() - start < 5
    assert run(["--max-runtime-hours", "1", "--", *PYTHON, BEATING, f"{3500.0:20.3f}", "0.5"]) == 0


def test_another_node_may_reach_the_limit_first() -> None:
    """Its ranks end, ours are lost: to start again would be to reach the limit again."""
    words = ["--max-runtime-hours", "0.01", "--grace-seconds", "30", "--"]
    assert run([*words, "bash", "-c", "exit 75"]) == EXIT_AGAIN
    assert run([*words, *PYTHON, BEATING + "\nsys.exit(75)", f"{20.0:20.3f}", "0.5"]) == EXIT_LIMIT
    assert run([*words, *PYTHON, BEATING + "\nsys.exit(2)", f"{20.0:20.3f}", "0.5"]) == 2


@pytest.mark.parametrize(
    ("codes", "own", "code"),
    [([75, 75], 1, 75), ([75, 2], 1, 2), ([3], 1, 3), ([], 1, 1), ([75], 137, 137), ([2], 0, 0)],
)
def test_a_ranks_exit_code_passes_torchrun(codes: list[int], own: int, code: int) -> None:
    notes = "".join(f"echo {one} >> $DUAL_POLICY_HEARTBEAT.codes; " for one in codes)
    assert run(["--", "bash", "-c", f"{notes}exit {own}"]) == code


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_go_on_to_the_command_once(signum: signal.Signals, tmp_path: Path) -> None:
    count = (
        "import signal, sys, time\n"
        "seen = []\n"
        f"signal.signal({int(signum)}, lambda *_: seen.append(1))\n"
        "open(sys.argv[1], 'w').close()\n"
        "end = time.monotonic() + 20\n"
        "while not seen and time.monotonic() < end: time.sleep(0.05)\n"
        "time.sleep(0.3)\n"
        "sys.exit(40 + len(seen))"
    )
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "dual_policy_plugin", "watch", "--", *PYTHON, count, str(ready)]
    with subprocess.Popen(command, start_new_session=True) as watching:
        while not ready.exists():
            assert watching.poll() is None
            time.sleep(0.05)
        os.killpg(watching.pid, signum)  # as a terminal does: to the whole group, which the command is not in
        assert watching.wait(20) == 41


@pytest.fixture
def beaten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "heartbeat"
    monkeypatch.setenv(heartbeat.VARIABLE, str(path))
    for last in ("_last", "_told"):
        monkeypatch.setattr(heartbeat, last, -1e9)
    return path


def test_a_beat_touches_the_file_at_most_once_a_second(beaten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat.beat(12.3456)
    os.utime(beaten, (0, 0))
    heartbeat.beat(99.0)
    assert (beaten.stat().st_mtime, heartbeat.read_age(str(beaten))) == (0, 12.346)
    monkeypatch.setattr(heartbeat, "_last", time.monotonic() - 1.1)
    heartbeat.beat()  # of a rank that does not know
    assert (beaten.stat().st_mtime > 0, heartbeat.read_age(str(beaten))) == (True, 12.346)


def test_a_run_tells_its_age_though_others_give_signs_of_life(beaten: Path) -> None:
    """Until it has, the watch takes it for one that is starting: a mirror's thread beats all the time."""
    heartbeat.beat()
    assert heartbeat.read_age(str(beaten)) is None
    heartbeat.beat(7.0)
    assert heartbeat.read_age(str(beaten)) == 7.0


def test_a_beat_that_cannot_be_given_is_an_error(beaten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat.VARIABLE, str(beaten / "nowhere/file"))
    with pytest.raises(RunError, match=r"DUAL_POLICY_HEARTBEAT=.*nowhere/file cannot be touched: No such file"):
        heartbeat.beat()
    monkeypatch.delenv(heartbeat.VARIABLE)
    heartbeat.beat()  # nobody watches


def test_evaluation_gives_signs_of_life(beaten: Path) -> None:
    config, _ = compose_config(["device=cpu", "env.num_envs=2", "env.episode_steps=4", "env.num_agents=2"])
    weak = resolve("builtin://arena/random")
    evaluate_pinned(weak, [weak], config, episodes=2, seed=1, device=torch.device("cpu"))
    assert beaten.exists()
