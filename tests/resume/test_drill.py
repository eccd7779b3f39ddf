"""Ten kills, and one between each two files of an iteration, leave no trace; `make drill` has two hundred.

The drill's processes are forked from one of their own, and not from the tests' own. That the drill sees what it is
there for, the sabotaged runs show.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dual_policy_plugin import files
from tests.resume.edge import Call, Edge, kind_of
from tests.resume.reading import Faults, Peace, differences, digest, look
from tests.resume.runs import ROOT, RUN
from tests.resume.witness import Page, Witness

LAST_LINE = re.compile(
    r"(\d+) kills in (\d+) runs \(seed \d+\), (\d+) inside a save \((.*)\), (\d+) unreadable files, (\d+) wrong, \d+ s"
)


def run_drill(*words: str) -> tuple[int, list[int], str]:
    """The exit code of a drill; kills, runs, kills inside a save, unreadable, wrong; all that it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.resume.drill", *words],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    found = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert found is not None, done.stdout
    return done.returncode, [int(found[i]) for i in (1, 2, 3, 5, 6)], done.stdout


@pytest.mark.slow
def test_ten_kills_leave_no_trace() -> None:
    code, (kills, runs, inside, unreadable, wrong), text = run_drill("--kills", "10", "--seed", "8")
    assert (code, kills, unreadable, wrong) == (0, 10, 0, 0), text
    assert runs >= 1
    assert inside >= 3  # four of these aims cannot miss


@pytest.mark.slow
def test_a_kill_between_any_two_files_of_an_iteration_leaves_no_trace() -> None:
    code, (kills, runs, inside, unreadable, wrong), text = run_drill("--calls", "8")
    assert (code, unreadable, wrong) == (0, 0, 0), text
    # metrics, timing, both synced, index, checkpoint, latest, removal, both synced, state, index, timing, result
    assert kills == runs == inside == 14
    for kind in ("metrics", "timing", "index", "checkpoint", "latest", "state", "result"):
        assert f" {kind}" in text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "fault"),
    [("plain", r"cut short|too few|holds no|not JSON|Expecting"), ("late", r"metrics.jsonl has \d+ lines, the")],
)
def test_the_drill_sees_a_save_that_is_not_safe(sabotage: str, fault: str) -> None:
    code, (kills, *_, unreadable, wrong), text = run_drill("--kills", "60", "--seed", "1", "--sabotage", sabotage)
    assert code == 1, text
    assert unreadable + wrong > 0
    assert kills < 60  # it stops at the first fault
    assert re.search(fault, text), text
    if sabotage == "plain":
        assert unreadable > 0


@pytest.fixture
def run(tmp_path: Path, peace: Peace) -> Path:
    """A copy of its directory."""
    return Path(shutil.copytree(peace.run, tmp_path / "run"))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_run(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def without_last_line(path: Path) -> None:
    path.write_bytes(b"".join(files.read_lines(path)[:-1]))


def with_other_lines(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"}\n", b', "x": 1}\n'))


@pytest.mark.parametrize(
    ("name", "harm", "unreadable", "wrong"),
    [
        ("config.yaml", lambda path: None, [], []),
        ("timing.jsonl", torn, [], []),
        ("run.lock", emptied, [], []),
        ("checkpoints/model_0008.safetensors", torn, ["checkpoints/model_0008.safetensors: model_0008"], []),
        ("checkpoints/best.safetensors", emptied, ["checkpoints/best.safetensors: best"], []),
        ("checkpoints/latest.safetensors", of_another_run, [], ["checkpoints/latest.safetensors has bytes that"]),
        (
            "state/training.safetensors",
            torn,
            ["state/training.safetensors: "],
            ["the state is of iteration -1, it was"],
        ),
        ("state/training.safetensors", Path.unlink, [], ["the state is of iteration -1, it was of 7"]),
        ("state/checkpoints.json", torn, [], []),
        ("state/checkpoints.json", emptied, ["state/checkpoints.json: "], []),
        ("result.json", emptied, ["result.json: "], []),
        ("config.yaml", emptied, ["config.yaml: "], []),
        ("metrics.jsonl", torn, [], ["metrics.jsonl has 7 lines, the state is of iteration 8"]),
        ("metrics.jsonl", without_last_line, [], ["metrics.jsonl has 7 lines, the state is of iteration 8"]),
        ("metrics.jsonl", with_other_lines, [], ["metrics.jsonl has lines that"]),
    ],
)
def test_what_a_crash_could_have_done_is_seen(
    run: Path, peace: Peace, name: str, harm: Callable[[Path], None], unreadable: list[str], wrong: list[str]
) -> None:
    harm(run / name)
    faults = Faults()
    look(run, peace, 7, faults)
    for found, expected in ((faults.unreadable, unreadable), (faults.wrong, wrong)):
        assert len(found) == len(expected), found
        assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_finished_runs_may_differ_in_times_only(run: Path, peace: Peace) -> None:
    (run / "timing.jsonl").write_bytes(b"")
    (run / "result.json").write_bytes(
        re.sub(rb'"elapsed_s": [0-9.]+', b'"elapsed_s": 99.5', (run / "result.json").read_bytes())
    )
    assert differences(peace.run, run) == []
    (run / "checkpoints/.best.safetensors.0123456789ab.tmp").write_bytes(b"")
    of_another_run(run / "state/training.safetensors")
    (run / "npc.lock.json").unlink()
    assert differences(peace.run, run) == [
        "checkpoints/.best.safetensors.0123456789ab.tmp is not as in peace",
        "npc.lock.json is not as in peace",
        "state/training.safetensors is not as in peace",
    ]


def test_what_is_to_outlive_a_crash_of_the_machine_is_on_the_disk_in_time(peace: Peace) -> None:
    """A killed process loses nothing that it has written; a machine does, unless it was synced."""
    written: set[str] = set()  # growing files with lines that are not synced
    is_synced: dict[str, bool] = {}  # temporary files
    num_checked = 0
    for i, (name, kind, is_temporary) in enumerate(peace.calls):
        if name == "write" and is_temporary:
            is_synced[kind] = False
        elif name == "write" and kind in ("metrics", "timing"):
            written.add(kind)
        elif name == "fsync":
            written.discard(kind)
            is_synced[kind] = True
        elif name == "replace":
            assert is_synced[kind], f"call {i}: {kind} is renamed before its bytes are on the disk"
            assert [call[:2] for call in peace.calls[i + 1 : i + 4]] == [
                ("open", "folder"), ("fsync", "folder"), ("close", "folder"),
            ]  # fmt: skip
            if kind in ("checkpoint", "state"):
                assert written == set(), f"call {i}: {kind} is saved before the lines that it stands on"
                num_checked += 1
    assert num_checked == 5 + 9  # epochs 0, 2, 4, 6, 8; a state at the start and after each iteration


def test_a_digest_leaves_out_when_and_nothing_else() -> None:
    assert digest(b'{"when": "2026-01-01", "uri": "a"}') == digest(b'{"when": "2027-01-01", "uri": "a"}')
    assert digest(b'{"when": "2026-01-01", "uri": "a"}') != digest(b'{"when": "2026-01-01", "uri": "b"}')
    assert digest(b"elapsed_s") != digest(b"")


def test_the_edge_sees_each_call_of_a_save_and_the_witness_where_it_is(tmp_path: Path) -> None:
    page, places, calls = Page(), [], []
    witness = Witness(page=page)

    def before(call: Call) -> None:
        witness.before(call)
        calls.append(call.name)
        places.append(page.read())

    path = tmp_path / "latest.safetensors"
    with Edge(tmp_path, before, witness.after):
        assert page.read().kind == ""
        files.publish(path, b"x" * 10)
        assert (page.read().kind, page.read().num_saves) == ("", 1)
        files.append_line(tmp_path / "metrics.jsonl", {"iteration": 1})
        files.sync_file(tmp_path / "timing.jsonl")  # there is none
        assert (page.read().kind, page.read().num_saves) == ("", 2)
        path.unlink()
    assert calls == [
        *("open", "write", "fsync", "close", "replace", "open", "fsync", "close"),
        *("open", "write", "close"), "open", "unlink",
    ]  # fmt: skip
    assert [place.kind for place in places] == ["latest"] * 8 + ["metrics"] * 3 + ["timing", "latest"]
    assert [place.num_saves for place in places] == [1] * 8 + [2] * 3 + [3] * 2
    assert {kind: len(times) for kind, times in witness.lengths_s.items()} == {"latest": 2, "metrics": 1}
    files.publish(path, b"y")
    assert len(calls) == 13  # it is gone


def test_a_dead_process_says_where_it_was(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dual_policy_plugin import files;"
        "from tests.resume.edge import Edge; from tests.resume.witness import Page, Witness;"
        "page, folder = Page(), Path(sys.argv[1]); witness = Witness(page=page, die_at=(2, 5));"
        "Edge(folder, witness.before, witness.after).__enter__();"
        "[files.publish(folder / f'{name}.safetensors', name.encode()) for name in ('latest', 'best')]"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".best.safetensors.*.tmp")  # written, synced, closed, and not renamed
    assert left.read_bytes() == b"best"
    assert [path.name for path in tmp_path.iterdir() if path != left] == ["latest.safetensors"]


def test_kinds_of_files(tmp_path: Path) -> None:
    assert kind_of(Path("r/checkpoints/model_0004.safetensors")) == "checkpoint"
    assert kind_of(RUN / "state/training.safetensors") == "state"
    assert kind_of(tmp_path) == "folder"
    assert kind_of(Path("r/notes.txt")) == "other"
