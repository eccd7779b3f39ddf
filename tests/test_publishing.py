"""A run's checkpoints on their way to S3 and W&B, with the real clients, and back through every selector."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

from dual_policy_plugin.checkpoint import PolicyFile, encode_policy
from dual_policy_plugin.cli import main
from dual_policy_plugin.config import PolicySource, WandbConfig
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.resolver import PinnedPolicy, read_verified, resolve_all
from dual_policy_plugin.publishing import Destination, Publisher, checkpoint_facts, plain_name, s3_destination
from dual_policy_plugin.report.loggers import WandbLogger
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run_state import FACTS_KEY, STATE_NAME
from dual_policy_plugin.types import ObservationSpace
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

PREFIX = "s3://policies/team"
TRAIN = (
    *("run=exp/a", "env.num_envs=4", "trainer.horizon=8", "trainer.num_minibatches=1", "trainer.checkpoint_interval=2"),
    *("trainer.total_timesteps=768", "evals.episodes=0", "agent.hidden_size=16", "+dual_policy=checkpoint"),
    "report=false",
    "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/forager",
)


def policy_bytes(epoch: int, win_rate: float | None = None) -> bytes:
    """A small policy file with the metadata of a checkpoint."""
    metrics = {} if win_rate is None else {"dual_policy/win_rate": win_rate}
    return encode_policy(
        PolicyFile(
            architecture="mlp",
            args={},
            observation_space=ObservationSpace(kind="vector", shape=(2,), features=("a", "b")),
            actions=("left", "right"),
            tensors={"weight": torch.full((4,), float(epoch))},
            metadata={"run": "exp", "epoch": epoch, "step": epoch * 100, "metrics": metrics},
        )
    )


def save(run: RunDirectory, epoch: int, score: float | None = None) -> None:
    """What train.py saves after an iteration."""
    run.save_checkpoint(epoch, policy_bytes(epoch, score), score=score)
    save_state(run, epoch)


def save_state(run: RunDirectory, epoch: int) -> None:
    facts = json.dumps({"counters": {"iteration": epoch}})
    weights = {"x": torch.zeros(1).numpy()}
    run.save_state(STATE_NAME, safetensors.numpy.save(weights, metadata={FACTS_KEY: facts}))


def open_run(folder: Path, keep: int = 5) -> RunDirectory:
    return RunDirectory.open(folder / "exp", config_yaml="seed: 1", keep_checkpoints=keep)


def epochs_of(run: RunDirectory) -> list[int]:
    return sorted(int(path.stem[6:]) for path in run.checkpoints.glob("model_*"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run with the checkpoint of epoch 0."""
    with open_run(tmp_path) as run:
        save(run, 0)
        yield run


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 with the bucket `policies`, to which the environment points."""
    with S3Server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
            monkeypatch.delenv(name.lower(), raising=False)
        server.client().create_bucket(Bucket="policies")
        yield server


def objects(s3: S3Server, prefix: str = "team/exp/") -> dict[str, bytes]:
    """Key behind the prefix -> bytes."""
    client = s3.client()
    listed = client.list_objects_v2(Bucket="policies", Prefix=prefix).get("Contents", [])
    keys = [entry["Key"] for entry in listed]
    return {key.removeprefix(prefix): client.get_object(Bucket="policies", Key=key)["Body"].read() for key in keys}


def names(*epochs: int) -> list[str]:
    return [f"model_{epoch:04d}.safetensors" for epoch in epochs]


def resolve_from(folder: Path, uri: str, **selector: Any) -> list[PinnedPolicy]:
    """The pins of a selector with an empty cache; the bytes of each are fetched and verified."""
    cache = Cache(folder / hashlib.sha256(f"{uri}{selector}".encode()).hexdigest()[:8])
    pinned = resolve_all(PolicySource(uri=uri, **selector), seed=1, cache=cache)
    for policy in pinned:
        assert hashlib.sha256(read_verified(policy, cache=cache)).hexdigest() == policy.sha256
    return pinned


# ---- S3 ----


def test_checkpoints_arrive_as_they_are_saved_and_every_selector_finds_them(
    run: RunDirectory, s3: S3Server, tmp_path: Path
) -> None:
    publisher = Publisher.open(run, [s3_destination(PREFIX, "exp")])
    assert objects(s3) == {"model_0000.safetensors": policy_bytes(0)}, "epoch 0 is there before training begins"
    for epoch, score in ((1, 0.25), (2, 0.75), (3, 0.5)):
        save(run, epoch, score)
        publisher.advance(epoch)
    publisher.finish()
    publisher.close()
    assert objects(s3) == {name: (run.checkpoints / name).read_bytes() for name in names(0, 1, 2, 3)}
    head = s3.client().head_object(Bucket="policies", Key="team/exp/model_0002.safetensors")
    assert head["Metadata"] == {"sha256": hashlib.sha256(policy_bytes(2, 0.75)).hexdigest()}
    place = f"{PREFIX}/exp/"
    assert s3_destination(f"{PREFIX}/", "exp").name == place

    def epochs(**selector: Any) -> list[int]:
        return [policy.metadata["epoch"] for policy in resolve_from(tmp_path, place, **selector)]

    assert [p.uri for p in resolve_from(tmp_path, place + names(2)[0])] == [place + names(2)[0]]
    assert epochs() == [3]
    assert epochs(type="latest", range=2) == [3, 2]
    with_score = {"metric": "dual_policy/win_rate", "filters": {"run": "exp"}}
    assert epochs(type="top", range=1, metric="step") == [3]
    assert sorted(epochs(type="all")) == [0, 1, 2, 3]
    assert len(set(epochs(type="rand", range=3))) == 3
    with pytest.raises(Exception, match="dual_policy/win_rate"):  # epoch 0 has none
        epochs(type="top", **with_score)
    s3.client().delete_object(Bucket="policies", Key="team/exp/model_0000.safetensors")
    assert epochs(type="top", range=2, **with_score) == [2, 3]


def test_a_continued_run_sends_what_is_missing_and_nothing_twice(tmp_path: Path, s3: S3Server) -> None:
    with open_run(tmp_path) as run:
        save(run, 0)
        Publisher.open(run, [s3_destination(PREFIX, "exp")]).close()
        for epoch in (1, 2):
            save(run, epoch)  # the process was killed before it could send them
        run.save_checkpoint(3, policy_bytes(3))  # and this one before its state was saved: it will be made again
    with open_run(tmp_path) as run:
        Publisher.open(run, [s3_destination(PREFIX, "exp")]).close()
        assert list(objects(s3)) == names(0, 1, 2)
        assert s3.count("PUT /policies/team") == 3
        run.save_checkpoint(3, policy_bytes(33))
        save_state(run, 3)
        other = [s3_destination(PREFIX, "exp"), s3_destination("s3://policies/other", "exp")]
        Publisher.open(run, other).close()
    assert objects(s3)["model_0003.safetensors"] == policy_bytes(33)
    assert list(objects(s3, "other/exp/")) == names(0, 1, 2, 3)
    assert s3.count("PUT /policies/team") == 4


def test_what_arrived_without_a_note_counts_and_other_bytes_are_never_overwritten(
    run: RunDirectory, s3: S3Server
) -> None:
    s3.client().put_object(Bucket="policies", Key="team/exp/model_0000.safetensors", Body=policy_bytes(0))
    Publisher.open(run, [s3_destination(PREFIX, "exp")]).close()  # killed between sending and noting
    save(run, 1)
    s3.client().put_object(Bucket="policies", Key="team/exp/model_0001.safetensors", Body=b"another run's")
    with pytest.raises(RunError) as caught:
        Publisher.open(run, [s3_destination(PREFIX, "exp")])
    assert str(caught.value) == (
        "model_0001.safetensors could not be published to s3://policies/team/exp/model_0001.safetensors: another file"
        " stands there and is not overwritten; use another run= or trainer.publish_uri=; the same command goes on and"
        " sends what is missing"
    )
    assert objects(s3)["model_0001.safetensors"] == b"another run's"


@pytest.mark.parametrize("kind", ["status:500", "status:503", "status:409", "reset", "lost", "slow:0.05", "status:429"])
def test_a_fault_on_the_way_is_tried_again(run: RunDirectory, s3: S3Server, kind: str) -> None:
    s3.faults.add("PUT /policies/team", kind, times=2)
    Publisher.open(run, [s3_destination(PREFIX, "exp")]).close()
    assert objects(s3) == {"model_0000.safetensors": policy_bytes(0)}
    assert len(s3.faults.fired) == (1 if kind.startswith("slow") else 2)
    assert json.loads(run.load_state("published.json") or b"")["arrived"] == {
        f"{PREFIX}/exp/": {"0": f"{PREFIX}/exp/model_0000.safetensors"}
    }


def test_a_failure_is_said_keeps_the_checkpoint_and_is_mended_by_the_next(
    tmp_path: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(tmp_path, keep=1) as run:
        save(run, 0)
        publisher = Publisher.open(run, [s3_destination(PREFIX, "exp")])
        fault = s3.faults.add("PUT /policies/team", "status:403", times=2)
        for epoch in (1, 2):
            save(run, epoch)
            publisher.advance(epoch)
            publisher.lanes[0].under_way.exception()  # type: ignore[union-attr]  # waits
        assert epochs_of(run) == [0, 1, 2], "retention leaves what nobody has"
        assert list(objects(s3)) == names(0)
        assert fault.num_fired == 2
        save(run, 3)
        publisher.advance(3)
        publisher.finish()
        publisher.close()
        assert list(objects(s3)) == names(0, 1, 2, 3)
        assert [entry for entry in s3.exchanges if entry.method == "PUT" and entry.status == 200][-3:]
        save(run, 4)
        assert epochs_of(run) == [0, 4]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "model_0001.safetensors could not be published to s3://policies/team/exp/model_0001.safetensors: no access"
    )


def test_the_end_waits_tries_once_more_and_then_is_an_error(run: RunDirectory, s3: S3Server) -> None:
    publisher = Publisher.open(run, [s3_destination(PREFIX, "exp")])
    s3.faults.add("PUT /policies/team", "status:403", times=None)
    save(run, 1)
    publisher.advance(1)
    with pytest.raises(RunError, match=r"model_0001.* no access.*; the same command goes on and sends what is missing"):
        publisher.finish()
    publisher.close()
    assert s3.count("PUT /policies/team/exp/model_0001") == 2
    s3.faults.clear()
    Publisher.open(run, [s3_destination(PREFIX, "exp")]).close()
    assert list(objects(s3)) == names(0, 1)


def test_a_slow_destination_holds_up_neither_training_nor_the_other(run: RunDirectory, s3: S3Server) -> None:
    import threading

    gate, sent = threading.Event(), []

    def send(checkpoint: Any) -> str:
        if checkpoint.epoch:
            assert gate.wait(30)
        sent.append((checkpoint.epoch, checkpoint.is_best))
        return f"slow://{checkpoint.epoch}"

    publisher = Publisher.open(run, [Destination(name="slow", send=send), s3_destination(PREFIX, "exp")])
    for epoch, score in ((1, 0.5), (2, 0.25), (3, 0.125)):
        save(run, epoch, score)
        publisher.advance(epoch)
        publisher.lanes[1].under_way.exception()  # type: ignore[union-attr]
    assert list(objects(s3)) == names(0, 1, 2, 3)
    assert sent == [(0, False)]
    gate.set()
    publisher.finish()
    publisher.close()
    assert sent == [(0, False), (1, True), (2, False), (3, False)]


def test_without_a_destination_nothing_is_pinned(tmp_path: Path, s3: S3Server) -> None:
    with open_run(tmp_path, keep=1) as run:
        save(run, 0)
        save(run, 1)
        s3.faults.add("PUT /policies/team/exp/model_0001", "status:403", times=None)
        with pytest.raises(RunError, match="no access"):
            Publisher.open(run, [s3_destination(PREFIX, "exp")])
        save(run, 2)
        assert epochs_of(run) == [0, 1, 2]
    with open_run(tmp_path, keep=1) as run:
        Publisher.open(run, []).close()
        save(run, 3)
        assert epochs_of(run) == [0, 3]


def test_no_bucket_and_no_login_are_said(run: RunDirectory, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(uri: str) -> str:
        with pytest.raises(RunError) as caught:
            Publisher.open(run, [s3_destination(uri, "exp")])
        line = str(caught.value)
        assert "\n" not in line
        assert s3.env["AWS_SECRET_ACCESS_KEY"] not in line
        return line

    assert "NoSuchBucket" in error("s3://no-such-bucket/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "no AWS login was found" in error(PREFIX)


def test_a_runs_name_becomes_part_of_a_key() -> None:
    assert s3_destination("s3://policies", "exp").name == "s3://policies/exp/"
    assert s3_destination("s3://policies/a/b", "sweep 1/é/3").name == "s3://policies/a/b/sweep-1/-/3/"
    assert plain_name("sweep/3 é") == "sweep-3--"
    assert len(plain_name("x" * 300)) == 128


# ---- W&B ----


@pytest.fixture
def wandb_server(tmp_path: Path) -> Iterator[WandbServer]:
    with WandbServer(tmp_path / "wandb") as server:
        yield server


def test_versions_carry_our_metadata_and_the_aliases_latest_and_best(
    run: RunDirectory, wandb_server: WandbServer, tmp_path: Path
) -> None:
    with wandb_server.client(WANDB_ENTITY="team", WANDB_PROJECT="arena"):
        config = WandbConfig(mode="online", project="arena", entity="team")
        logger = WandbLogger.open(config, run, name="exp", run_config={})
        destination = logger.destination("exp")
        assert destination is not None
        publisher = Publisher.open(run, [destination])
        for epoch, score in ((1, 0.5), (2, 0.75), (3, 0.25)):
            save(run, epoch, score)
            publisher.advance(epoch)
            publisher.wait()
        publisher.finish()
        publisher.close()
        logger.finish({"objective": 0.25})
        assert wandb_server.aliases("team", "arena", "exp") == {"best": "v2", "latest": "v3"}
        place = "wandb://team/arena/model/exp"
        found = resolve_from(tmp_path, place, type="all")
        assert {p.metadata["epoch"]: p.sha256 for p in found} == {
            epoch: hashlib.sha256((run.checkpoints / name).read_bytes()).hexdigest()
            for epoch, name in enumerate(names(0, 1, 2, 3))
        }
        facts = next(p.metadata for p in found if p.metadata["epoch"] == 2)
        assert facts["dual_policy/win_rate"] == 0.75
        assert (facts["step"], facts["architecture"], facts["parameters"], facts["actions"]) == (200, "mlp", 4, 2)
        assert facts["sha256"] == hashlib.sha256(policy_bytes(2, 0.75)).hexdigest()

        def uris(uri: str, **selector: Any) -> list[str]:
            return [policy.uri for policy in resolve_from(tmp_path, uri, **selector)]

        assert uris(f"{place}:best") == uris("wandb://team/arena/exp:v2") == [f"{place}:v2"]
        assert uris(place) == uris("wandb://run/exp") == [f"{place}:v3"]
        with_score = {"metric": "dual_policy/win_rate", "filters": {"architecture": "mlp"}}
        assert uris(place, type="latest", range=2) == [f"{place}:v3", f"{place}:v2"]
        assert uris(place, type="top", range=2, metric="step") == [f"{place}:v3", f"{place}:v2"]
        assert uris("wandb://run/exp", type="top", range=2, metric="step") == uris(place, type="latest", range=2)
        assert uris("wandb://team/arena", type="latest") == [f"{place}:v3"]
        assert uris("wandb://team/arena", type="top", **with_score) == [f"{place}:v3"]
    assert wandb_server.foreign_hosts == []


def test_an_upload_that_fails_is_one_clean_line(run: RunDirectory, wandb_server: WandbServer) -> None:
    with wandb_server.client():
        config = WandbConfig(mode="online", project="arena", entity="team")
        logger = WandbLogger.open(config, run, name="exp", run_config={})
        destination = logger.destination("exp")
        assert destination is not None
        wandb_server.faults.add("PUT /storage/team/arena", "status:403", times=None)
        with pytest.raises(RunError) as caught:
            Publisher.open(run, [destination])
        wandb_server.faults.clear()
        logger.finish()
    line = str(caught.value)
    assert line.startswith("model_0000.safetensors could not be published to wandb://team/arena/model/exp: ")
    for secret in (wandb_server.api_key, wandb_server.url_secret, "\n"):
        assert secret not in line


def test_metadata_stays_below_the_hundred_names_that_wandb_takes(tmp_path: Path) -> None:
    metrics = {f"dual_policy/npc/n{i}/share": i / 200 for i in range(200)}
    path = tmp_path / "model_0001.safetensors"
    file = PolicyFile(
        architecture="mlp",
        args={},
        observation_space=ObservationSpace(kind="vector", shape=(1,), features=("a",)),
        actions=("left", "right"),
        tensors={"weight": torch.zeros(1)},
        metadata={"epoch": 1, "metrics": metrics},
    )
    path.write_bytes(encode_policy(file))
    facts = checkpoint_facts(path)
    assert facts["metrics"] == metrics
    assert len(facts) < 20


# ---- The whole program ----


@pytest.mark.slow
def test_training_publishes_to_both_and_goes_on_where_it_failed(
    tmp_path: Path,
    s3: S3Server,
    wandb_server: WandbServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    words = [*TRAIN, f"train_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'hydra'}"]
    folder = tmp_path / "exp" / "a"
    with wandb_server.client(WANDB_ENTITY="team"):
        s3.faults.add("PUT /policies/team", "status:403", times=None)
        assert main(["train", *words, f"trainer.publish_uri={PREFIX}", "wandb=off"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert "model_0000.safetensors could not be published to s3://policies/team/exp/a/" in line
        assert not (folder / "metrics.jsonl").exists(), "nothing was trained"
        s3.faults.clear()

        fault = s3.faults.add("PUT /policies/team/exp/a/model_0004", "status:403", times=None)
        assert main(["train", *words, f"trainer.publish_uri={PREFIX}", "wandb=online"]) == 2
        assert json.loads((folder / "result.json").read_text())["iterations"] == 6
        assert list(objects(s3, "team/exp/a/")) == names(0, 2), "4 first, then 6"
        assert fault.num_fired >= 2
        s3.faults.clear()

        assert main(["train", *words, f"trainer.publish_uri={PREFIX}", "wandb=online"]) == 0
        local = {name: (folder / "checkpoints" / name).read_bytes() for name in names(0, 2, 4, 6)}
        assert objects(s3, "team/exp/a/") == local
        pinned = resolve_from(tmp_path, "wandb://team/dual-policy/model/exp-a", type="all")
        assert {p.sha256 for p in pinned} == {hashlib.sha256(data).hexdigest() for data in local.values()}
        assert sorted(p.uri[-3:] for p in pinned) == [":v0", ":v1", ":v2", ":v3"]

        capsys.readouterr()
        assert main(["runs", "--format=uris"]) == 0
        assert capsys.readouterr().out == "wandb://team/dual-policy/model/exp-a:v3\n"
        newest = "wandb://team/dual-policy/model/exp-a:latest"
        again = [*TRAIN[1:-1], f"trainer.dual_policy.checkpoint_npc.uri={newest}", "run=b", "wandb=off"]
        assert main(["train", *again, f"train_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'hydra'}"]) == 0
        (npc,) = json.loads((tmp_path / "b" / "result.json").read_text())["npcs"]
        assert npc["uri"] == "wandb://team/dual-policy/model/exp-a:v3"
        assert npc["sha256"] == hashlib.sha256(local["model_0006.safetensors"]).hexdigest()


def test_offline_the_client_keeps_each_checkpoint_for_its_sync(
    run: RunDirectory, wandb_server: WandbServer, tmp_path: Path
) -> None:
    with wandb_server.client() as wandb:
        logger = WandbLogger.open(WandbConfig(mode="offline", project="p"), run, name="exp", run_config={})
        destination = logger.destination("exp")
        assert destination is not None
        publisher = Publisher.open(run, [destination])
        save(run, 1, 0.5)
        publisher.advance(1)
        publisher.finish()
        publisher.close()
        logger.finish()
        wandb.teardown()
        (path,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
        text = path.read_bytes()
        assert text.count(b"model.safetensors") >= 2
        copies = [path for path in Path(wandb_server.env["WANDB_DATA_DIR"]).rglob("*") if path.is_file()]
        assert {path.read_bytes() for path in copies} >= {policy_bytes(0), policy_bytes(1, 0.5)}
    assert wandb_server.exchanges == []
    assert list(json.loads(run.load_state("published.json") or b"")["arrived"]) == ["offline:exp"]


def test_a_wrong_publish_uri_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uri in ("gs://bucket/x", "policies/x", "s3://", "s3://user@bucket/x", "s3://bucket/a?b"):
        words = [*TRAIN, f"train_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'hydra'}"]
        assert main(["train", *words, f'trainer.publish_uri="{uri}"']) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert line == f"error: trainer.publish_uri={uri} is not possible; use s3://bucket/prefix/, or null"
