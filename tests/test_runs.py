"""`dual-policy runs` with the real W&B client against the loopback service."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from dual_policy_plugin.npc.sources import SOURCES
from dual_policy_plugin.npc.uri import parse_uri
from dual_policy_plugin.wandb_runs import clean, list_runs
from tests.services.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parent.parent
POLICY = (ROOT / "dual_policy_plugin/builtin/arena/weak.safetensors").read_bytes()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Five runs of team/dual-policy, the project of our config; the third has no score, the fourth no policy."""
    monkeypatch.chdir(tmp_path)
    with WandbServer(tmp_path) as server:
        for i, score in enumerate((0.125, 0.75, None, 0.5, 0.25)):
            summary = {} if score is None else {"objective": score}
            state = "crashed" if i == 0 else "finished"
            server.add_run("team", "dual-policy", f"id{i}", name=f"run {i}", summary=summary, state=state)
            if i != 3:
                files = {"model.safetensors": POLICY + bytes([i])}
                server.add_artifact("team", "dual-policy", "policy", files=files, run=f"id{i}")
        server.add_project("team", "empty")
        server.add_project("team", "secret")
        server.deny("team", "secret")
        with server.client():
            yield server


def ask(server: WandbServer, capsys: pytest.CaptureFixture[str], *words: str, **env: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `dual-policy runs`; under `env` with a client of its own."""
    with server.client(**env) if env else contextlib.nullcontext():
        code = main(["runs", *words])
    said = capsys.readouterr()
    assert server.api_key not in said.out + said.err
    return code, said.out, said.err


def test_the_table_has_four_columns_and_marks_what_is_missing(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ask(server, capsys)
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["Run Name", "Score", "Created", "WandB URI"]
    assert [(name, score, uri) for name, score, _, uri in lines[1:]] == [
        ("run 4", "0.250", "wandb://team/dual-policy/model/policy:v3"),
        ("run 3", "0.500", "-"),
        ("run 2", "N/A", "wandb://team/dual-policy/model/policy:v2"),
        ("run 1", "0.750", "wandb://team/dual-policy/model/policy:v1"),
        ("run 0", "0.125", "wandb://team/dual-policy/model/policy:v0"),
    ]
    assert [line[2] for line in lines[1:]] == [
        server.run("team", "dual-policy", f"id{i}").created_at for i in (4, 3, 2, 1, 0)
    ]


def test_json_and_uris_are_all_that_stands_on_standard_output(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ask(server, capsys, "--format", "uris")
    assert (code, out.splitlines()) == (0, [f"wandb://team/dual-policy/model/policy:v{i}" for i in (3, 2, 1, 0)])
    assert "note: 1 of 5 runs published no policy and are left out" in err
    code, out, _ = ask(server, capsys, "--format=json", "--limit=2")
    rows = json.loads(out)
    assert [(row["id"], row["name"], row["state"], row["score"], row["uri"]) for row in rows] == [
        ("id4", "run 4", "finished", 0.25, "wandb://team/dual-policy/model/policy:v3"),
        ("id3", "run 3", "finished", 0.5, None),
    ]
    code, out, err = ask(server, capsys, "--project=empty", "--format=json")
    assert (code, out, err.count("\n")) == (4, "[]\n", 1)


def test_every_uri_resolves_to_the_bytes_of_its_run(server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ask(server, capsys, "--format=uris")
    uris = out.splitlines()
    found = [SOURCES["wandb"].find(parse_uri(uri), None) for uri in uris]
    assert [candidate.uri for candidate in found] == uris
    assert [SOURCES["wandb"].fetch(candidate) for candidate in found] == [POLICY + bytes([i]) for i in (4, 2, 1, 0)]


def test_what_cannot_be_pasted_back_is_not_printed(server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:
    def add(name: str, files: dict[str, bytes], **more: str) -> None:
        server.add_artifact("team", "odd", name, files=files, run="id", **more)  # type: ignore[arg-type]

    server.add_run("team", "odd", "id", name="odd")
    add("data", {"model.safetensors": POLICY}, type="dataset")
    add("two words", {"model.safetensors": POLICY})
    add("notes", {"notes.txt": b"no policy"})
    add("several", {"a.safetensors": POLICY, "b.safetensors": POLICY})
    assert ask(server, capsys, "--project=odd")[1].split()[-1] == "-"
    assert ask(server, capsys, "--project=odd", "--format=uris")[:2] == (0, "")
    add("old", {"model.safetensors": POLICY}, created_at="2020-01-01T00:00:00Z")
    assert ask(server, capsys, "--project=odd", "--format=uris")[1] == "wandb://team/odd/model/old:v0\n"
    add("foreign", {"net.pt": b"x"}, created_at="2021-01-01T00:00:00Z")
    add("foreign", {"net.pt": b"y"}, created_at="2021-01-02T00:00:00Z")
    assert ask(server, capsys, "--project=odd", "--format=uris")[1] == "wandb://team/odd/model/foreign:v1\n"


def test_limit_counts_runs_over_pages(server: WandbServer) -> None:
    for i in range(120):
        server.add_run("team", "many", f"id{i:03}", summary={"score": i / 1000})
        if i % 10 == 0:
            server.add_artifact("team", "many", "policy", files={"model.pt": b"%d" % i}, run=f"id{i:03}")
    before = server.count("graphql Runs")
    runs = list_runs("team", "many", limit=30)
    assert [run.id for run in runs] == [f"id{i:03}" for i in range(119, 89, -1)]
    assert [run.uri is not None for run in runs] == [i % 10 == 0 for i in range(119, 89, -1)]
    assert server.count("graphql Runs") - before == 1
    assert len(list_runs("team", "many", limit=1)) == 1
    before = server.count("graphql Runs")
    ids = [run.id for run in list_runs("team", "many", limit=110, order="created")]
    assert ids == [f"id{i:03}" for i in range(110)]
    assert server.count("graphql Runs") - before == 2


def test_state_and_order(server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*words: str) -> str:
        return "".join(row["id"][2] for row in json.loads(ask(server, capsys, "--format=json", *words)[1]))

    assert ids() == ids("--order", "-created") == ids("--order", "-created_at") == "43210"
    assert ids("--order", "created") == ids("--order=+created_at") == "01234"
    assert ids("--order", "-score") == "13402"  # without a score: at the end either way
    assert ids("--order", "score") == "04312"
    assert ids("--order", "-score", "--limit", "2") == "13"
    assert ids("--state", "finished") == "4321"
    assert ids("--state", "crashed") == "0"
    assert ids("--state", "all", "--limit", "4") == "4321"


def test_a_score_is_a_finite_number(server: WandbServer) -> None:
    for key, summary in {
        "a": {"objective": "high", "score": 0.5},
        "b": {"objective": True, "dual_policy/win_rate": 0.25},
        "c": {"objective": float("nan")},
        "d": {"objective": 0, "score": 1.0},
    }.items():
        server.add_run("team", "scores", key, summary=summary)
    scores = {run.id: run.score for run in list_runs("team", "scores", limit=9)}
    assert scores == {"a": 0.5, "b": 0.25, "c": None, "d": 0.0}


def test_entity_and_project_come_from_the_options_then_the_settings_then_the_config(
    server: WandbServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for entity, project in (("team", "mine"), ("others", "mine"), ("others", "set"), ("others", "file")):
        server.add_run(entity, project, f"{entity}-{project}")

    def only(*words: str, **env: str) -> str:
        code, out, err = ask(server, capsys, "--format=json", *words, **env)
        assert code == 0, err
        return ",".join(row["id"] for row in json.loads(out))

    assert only().startswith("id4")  # the config's project, the login's entity
    assert only("wandb.project=mine") == "team-mine"
    assert only("wandb.project=mine", "wandb.entity=others") == "others-mine"
    env = {"WANDB_ENTITY": "others", "WANDB_PROJECT": "set"}
    assert only(**env) == only("wandb.project=mine", **env) == "others-set"
    assert only("--project=mine", **env) == "others-mine"
    assert only("--project=mine", "--entity=team", **env) == "team-mine"
    settings = Path(server.env["WANDB_CONFIG_DIR"]) / "settings"
    settings.write_text("[default]\nentity = others\nproject = file\n")
    assert only() == "others-file"


@pytest.mark.slow  # seven clients, and their second attempts
def test_no_runs_no_login_and_no_network_are_three_things(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str, **env: str) -> tuple[int, str]:
        code, out, err = ask(server, capsys, *words, **env)
        (line,) = err.splitlines()
        assert out == ""
        return code, line.removeprefix("error: ")

    assert error("--project=empty") == (4, "no run in the W&B project team/empty; start one with wandb=online")
    assert error("--state=running") == (
        4,
        "no running run in the W&B project team/dual-policy; ask for others with --state all",
    )
    assert error(WANDB_API_KEY="") == (5, "no W&B login; run `wandb login` or set WANDB_API_KEY")
    code, line = error(WANDB_API_KEY="0" * 40)
    assert (code, "user is not logged in; run `wandb login --relogin`" in line) == (5, True)
    assert "0" * 40 not in line
    code, line = error(WANDB_API_KEY="short")
    assert (code, "has 5.; run `wandb login`" in line) == (5, True)
    assert error("--project=secret")[0] == 5
    code, line = error(WANDB_BASE_URL="http://127.0.0.1:1")
    assert (code, line.startswith("W&B cannot be reached: "), "connection refused" in line) == (6, True, True)
    assert error("--project=none") == (
        2,
        "W&B has no project team/none; name another with --entity and --project",
    )
    for operation, kind in (("Runs", "reset"), ("RunOutputArtifacts", "status:503")):
        server.faults.add(f"graphql {operation}", kind, times=None)
        code, line = error()
        assert (code, line.startswith("W&B cannot be reached: ")) == (6, True)
        server.faults.clear()
    server.faults.add("graphql Runs", "status:503", times=1)
    assert ask(server, capsys, "--limit=1")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "'0' is no count of 1 or more"),
        (["--limit", "-3"], "--limit"),
        (["--limit", "many"], "'many' is no count"),
        (["--state", "done"], "finished"),
        (["--format", "csv"], "json"),
        (["--order", "name"], "-created, created, -score, score"),
        (["--project", "a/b"], "--project='a/b' is no name"),
        (["--entity", "user:pass@host"], "is no name"),
        (["--project", "a\x1b[2J"], r"--project='a\x1b[2J' is no name"),
        (["--colour"], "--colour"),
        (["wandb.projekt=x"], "wandb.project"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["runs", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_names_cannot_steer_the_terminal(server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.add_run("team", "odd", "id", name="evil\x1b]0;title\x07\nRun Name")
    _, out, _ = ask(server, capsys, "--project=odd")
    assert r"evil\x1b]0;title\x07\nRun Name" in out
    assert out.count("\n") == 2
    _, out, _ = ask(server, capsys, "--project=odd", "--format=json")
    assert out.isascii()
    assert json.loads(out)[0]["name"] == "evil\x1b]0;title\x07\nRun Name"


def test_an_errors_text_is_cleaned() -> None:
    text = 'Get "https://user:pass@host/a?X-Amz-Signature=abc&x=1": reset\n while retrying: again'
    assert clean(text) == 'Get "https://host/a?...": reset'
    assert len(clean("x" * 5000)) == 300
    assert clean("a\x1b[2Jb") == r"a\x1b[2Jb"


def test_the_tool_is_the_same_command(server: WandbServer) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, ROOT / "tools/list_wandb_runs.py", "--format", "uris", "--limit", "1"],
        env={**kept, **server.env, "WANDB_SILENT": "false"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "wandb://team/dual-policy/model/policy:v3\n"), done.stderr
    assert server.foreign_hosts == []
