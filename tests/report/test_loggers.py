from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dual_policy_plugin.config import WandbConfig
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.report.loggers import WandbLogger
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.wandb_runs import quieter_mode
from tests.services.wandb_server import WandbServer

BLOCK = 32768
METRICS = {
    "dual_policy/policy_a_reward": 1.25,
    "dual_policy/win_rate": 0.5,
    "dual_policy/npc/medium/share": 1.0,
    "env/learner/hearts": 3.0,
    "losses/explained_variance": -0.75,
    "charts/learner_SPS": 43123.0,
    "cost/accrued_total": 0.125,
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.open(tmp_path / "exp", config_yaml="seed: 1") as run:
        yield run


@pytest.fixture(autouse=True)
def _no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no netrc, no settings of whoever runs the tests; and none of the test before, which wandb remembers."""
    names = ("API_KEY", "MODE", "PROJECT", "ENTITY", "DIR", "RUN_ID", "RUN_GROUP", "TAGS")
    for name in names:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    if sys.modules.get("wandb") is not None:
        sys.modules["wandb"].teardown()


def read_records(path: Path) -> list[object]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def history(records: list[object]) -> list[dict[str, float]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]  # type: ignore[attr-defined]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def offline_files(run: RunDirectory) -> list[Path]:
    sys.modules["wandb"].teardown()  # its service writes the end of the file after `finish` has returned
    return sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))


def test_offline_every_metric_arrives(run: RunDirectory) -> None:
    config = WandbConfig(mode="offline", project="p", group="g", tags=["a", "b"])
    logger = WandbLogger.open(config, run, name="exp", run_config={"seed": 1, "trainer": {"gamma": 0.99}})
    steps = [16384 * i for i in range(1, 41)]
    for step in steps:
        logger.log({name: value * step for name, value in METRICS.items()}, step)
        if step == steps[-1]:
            logger.log({"evals/win_rate": 0.75}, step)
    logger.finish({"objective": 0.875})
    logger.finish()
    (path,) = offline_files(run)
    records = read_records(path)
    rows = history(records)
    assert [row["_step"] for row in rows] == steps
    for row in rows:
        assert {name: row[name] for name in METRICS} == {name: value * row["_step"] for name, value in METRICS.items()}
    assert rows[-1]["evals/win_rate"] == 0.75
    run_id = json.loads(run.load_state("wandb.json") or b"")["id"]
    begun = next(record.run for record in records if record.WhichOneof("record_type") == "run")  # type: ignore[attr-defined]
    assert (begun.run_id, begun.project, begun.run_group, list(begun.tags)) == (run_id, "p", "g", ["a", "b"])
    assert begun.display_name == "exp"
    values = {item.key: item.value_json for item in begun.config.update}
    assert json.loads(values["trainer"]) == {"gamma": 0.99}
    assert json.loads(values["seed"]) == 1
    summary = {
        item.key or "/".join(item.nested_key): item.value_json
        for record in records
        if record.WhichOneof("record_type") == "summary"  # type: ignore[attr-defined]
        for item in record.summary.update  # type: ignore[attr-defined]
    }
    assert json.loads(summary["objective"]) == 0.875


def test_a_continued_run_goes_on_in_the_same_wandb_run(run: RunDirectory) -> None:
    run.save_state("wandb.json", b'{"id": "abcd1234"}')
    logger = WandbLogger.open(WandbConfig(mode="offline"), run, name="exp", run_config={})
    logger.log({"x": 1.0}, 5)
    logger.finish()
    (path,) = offline_files(run)
    assert path.name == "run-abcd1234.wandb"
    assert history(read_records(path))[0]["_step"] == 5


def test_off_writes_nothing_and_needs_no_wandb(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = WandbLogger.open(WandbConfig(), run, name="exp", run_config={})
    logger.log(METRICS, 1)
    logger.finish({"objective": 1.0})
    assert not (run.path / "wandb").exists()
    assert run.load_state("wandb.json") is None


def test_a_missing_package_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb.mode=offline needs the package wandb; install it with `pip install"):
        WandbLogger.open(WandbConfig(mode="offline"), run, name="exp", run_config={})


def test_online_without_a_login_is_one_line(run: RunDirectory) -> None:
    with pytest.raises(ConfigError) as caught:
        WandbLogger.open(WandbConfig(mode="online"), run, name="exp", run_config={})
    assert str(caught.value) == (
        "wandb.mode=online finds no W&B login; run `wandb login`, set WANDB_API_KEY, or use wandb=offline or wandb=off"
    )


class Refusing(BaseHTTPRequestHandler):
    """A W&B server that knows nobody."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"errors": [{"message": "user is not logged in"}]}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_online_with_a_refused_key_is_one_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://user:hunter2@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        with pytest.raises(ConfigError) as caught:
            WandbLogger.open(WandbConfig(mode="online"), run, name="exp", run_config={})
        server.shutdown()
    message = str(caught.value)
    assert re.fullmatch(
        r"wandb\.mode=online could not start: Failed to verify credentials with .* user is not logged in; "
        r"see that the server is reachable and the login right, or use wandb=offline or wandb=off",
        message,
    )
    assert "k" * 40 not in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("is_listening", "why"), [(False, "connection refused"), (True, "Client.Timeout|deadline exceeded")]
)
def test_online_without_an_answer_is_one_line_with_the_cause(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, is_listening: bool, why: str
) -> None:
    """The service must be the first to give up: ended while it cancels a request for the client, it may hang."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # kept to the end, so that nobody else listens there
        if is_listening:
            server.listen()
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
        monkeypatch.delenv("WANDB_SILENT")  # as users have it
        cause = rf"127\.0\.0\.1:{port}/graphql giving up after 2 .*({why}).*"
        with pytest.raises(ConfigError, match=rf"wandb\.mode=online could not start: .*{cause}; see that"):
            WandbLogger.open(WandbConfig(mode="online"), run, name="exp", run_config={})
        server.setblocking(False)
        asked = 0
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()
                asked += 1
        assert asked == 2 * is_listening  # one request, twice: the client waits for no other


# ---- W&B's own variables ----


@pytest.mark.parametrize(
    ("mode", "variable", "result", "said"),
    [
        ("online", "", "online", ""),
        ("online", "online", "online", ""),
        ("online", "run", "online", ""),
        ("online", "offline", "offline", "offline wins, `wandb sync` sends the run later"),
        ("online", "dryrun", "offline", "offline wins, `wandb sync` sends the run later"),
        ("online", "Disabled", "off", "off wins, nothing is sent"),
        ("offline", "online", "offline", "offline wins, `wandb sync` sends the run later"),
        ("offline", "offline", "offline", ""),
        ("offline", "disabled", "off", "off wins, nothing is sent"),
        ("off", "online", "off", "off wins, nothing is sent"),
        ("off", "offline", "off", "off wins, nothing is sent"),
        ("off", "disabled", "off", ""),
        ("off", "shared", "off", ""),
        ("off", "", "off", ""),
    ],
)
def test_the_quieter_of_config_and_variable_wins_and_says_so(
    mode: str, variable: str, result: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert quieter_mode(mode, variable) == result
    assert caplog.messages == ([f"WANDB_MODE={variable} and wandb.mode={mode}: {said}"] if said else [])


def test_a_mode_that_wandb_does_not_have_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        quieter_mode("online", "ofline")
    assert str(caught.value) == ("WANDB_MODE=ofline is not possible; use online, offline or disabled, or unset it")


def test_the_variable_keeps_an_online_run_from_the_server(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer(tmp_path / "server") as server, server.client():
        config = WandbConfig(mode="online", project="arena", entity="team")
        for mode in ("disabled", "offline", "online"):
            monkeypatch.setenv("WANDB_MODE", mode)
            logger = WandbLogger.open(config, run, name="exp", run_config={})
            logger.log({"x": 1.0}, 5)
            logger.finish()
            if mode == "disabled":
                assert not (run.path / "wandb").exists()
            if mode == "offline":
                (path,) = offline_files(run)
                assert history(read_records(path))[0]["x"] == 1.0
            assert (len(server.exchanges) > 0) == (mode == "online")


def begun_run(run: RunDirectory, config: WandbConfig) -> tuple[str, str, str, list[str]]:
    """(project, entity, group, tags) of an offline run that the config makes."""
    WandbLogger.open(config, run, name="exp", run_config={}).finish()
    records = read_records(offline_files(run)[0])
    begun = next(record.run for record in records if record.WhichOneof("record_type") == "run")  # type: ignore[attr-defined]
    return begun.project, begun.entity, begun.run_group, list(begun.tags)


def test_the_variables_say_what_the_config_leaves_open(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PROJECT", "p"), ("ENTITY", "e"), ("RUN_GROUP", "g"), ("TAGS", "a,b")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert begun_run(run, WandbConfig(mode="offline")) == ("p", "e", "g", ["a", "b"])


def test_the_config_wins_over_the_variables(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PROJECT", "p"), ("ENTITY", "e"), ("RUN_GROUP", "g"), ("TAGS", "a,b")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = WandbConfig(mode="offline", project="mine", entity="us", group="h", tags=["c"])
    assert begun_run(run, config) == ("mine", "us", "h", ["c"])


def test_without_any_of_them_the_project_is_ours(run: RunDirectory) -> None:
    assert begun_run(run, WandbConfig(mode="offline")) == ("dual-policy", "", "", [])
