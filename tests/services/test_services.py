"""The loopback services as the real clients see them: wandb 0.31 and boto3."""

from __future__ import annotations

import hashlib
import io
import random
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.services.faults import Faults
from tests.services.graphql_execution import UnansweredError, execute
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

WEIGHTS = random.Random(7).randbytes(100_000)
NAME = "team/arena/policy"


def plant(server: WandbServer, num_versions: int = 3, *, project: str = "arena") -> None:
    for index in range(num_versions):
        files = {"model.safetensors": WEIGHTS + bytes([index]), "notes.txt": b"same in all"}
        server.add_artifact("team", project, "policy", files=files, metadata={"epoch": index * 10})


def log_checkpoint(wandb: Any, run: Any, content: bytes, *aliases: str, epoch: int = 0) -> Any:
    artifact = wandb.Artifact("policy", type="model", metadata={"epoch": epoch})
    with artifact.new_file("model.safetensors", mode="wb") as file:
        file.write(content)
    return run.log_artifact(artifact, aliases=list(aliases)).wait()


def test_a_run_arrives_with_config_history_summary_and_its_end(wandb_server: WandbServer) -> None:
    with wandb_server.client() as wandb:
        run = wandb.init(entity="team", project="arena", id="abc", name="first", config={"lr": 0.1}, tags=["x"])
        assert wandb_server.run("team", "arena", "abc").state == "running"
        run.log({"score": 0.25})
        run.log({"score": 0.75})
        run.summary["best/score"] = 0.9
        run.finish()
        failed = wandb.init(entity="team", project="arena", id="def")
        failed.finish(exit_code=1)
    kept = wandb_server.run("team", "arena", "abc")
    assert (kept.display_name, kept.state, kept.tags) == ("first", "finished", ["x"])
    assert kept.config["lr"] == {"value": 0.1}
    assert [(row["_step"], row["score"]) for row in kept.history] == [(0, 0.25), (1, 0.75)]
    assert (kept.summary["score"], kept.summary["best/score"]) == (0.75, 0.9)
    assert wandb_server.run("team", "arena", "def").state == "failed"
    assert wandb_server.foreign_hosts == []


def test_logged_checkpoints_get_versions_aliases_and_no_copy_of_the_same_bytes(wandb_server: WandbServer) -> None:
    with wandb_server.client() as wandb:
        run = wandb.init(entity="team", project="arena", id="abc")
        first = log_checkpoint(wandb, run, WEIGHTS, "best", "epoch-0")
        second = log_checkpoint(wandb, run, WEIGHTS + b"1", "best", epoch=1)
        again = log_checkpoint(wandb, run, WEIGHTS + b"1", "again", epoch=1)
        assert [a.version for a in (first, second, again)] == ["v0", "v1", "v1"]
        assert (
            wandb_server.count("PUT /storage/team/arena/") - wandb_server.count("/runs/abc/") == 4
        )  # file, manifest: 2x
        run.finish()
        logged = list(wandb.Api().run("team/arena/abc").logged_artifacts())
        assert [a.qualified_name for a in logged] == [f"{NAME}:v0", f"{NAME}:v1"]
        assert [a.metadata for a in logged] == [{"epoch": 0}, {"epoch": 1}]
        assert logged[0].logged_by().id == "abc"
    wanted = {"epoch-0": "v0", "best": "v1", "again": "v1", "latest": "v1"}
    assert wandb_server.aliases("team", "arena", "policy") == wanted


def test_aliases_move_and_go_and_links_carry_their_own(wandb_server: WandbServer) -> None:
    plant(wandb_server)
    with wandb_server.client() as wandb:
        api = wandb.Api()
        first = api.artifact(f"{NAME}:v0")
        first.aliases.append("best")
        first.save()
        assert wandb_server.aliases("team", "arena", "policy") == {"best": "v0", "latest": "v2"}
        second = api.artifact(f"{NAME}:v1")
        second.aliases = ["best", "second"]
        second.metadata["note"] = "moved"
        second.save()
        assert wandb_server.aliases("team", "arena", "policy") == {"best": "v1", "second": "v1", "latest": "v2"}
        second.aliases.remove("second")
        second.save()
        second.link("team/shelf/chosen", aliases=["prod"])
        linked = api.artifact("team/shelf/chosen:prod", type="model")
        assert (linked.source_qualified_name, linked.metadata) == (f"{NAME}:v1", {"epoch": 10, "note": "moved"})
    assert wandb_server.aliases("team", "arena", "policy") == {"best": "v1", "latest": "v2"}
    assert wandb_server.aliases("team", "shelf", "chosen") == {"prod": "v0", "latest": "v0"}


def test_download_by_version_and_alias_gives_the_bytes(wandb_server: WandbServer, tmp_path: Path) -> None:
    plant(wandb_server)
    with wandb_server.client() as wandb:
        api = wandb.Api()
        for reference, last_byte in (("v0", 0), ("v1", 1), ("latest", 2)):
            artifact = api.artifact(f"{NAME}:{reference}", type="model")
            folder = Path(artifact.download(root=str(tmp_path / reference)))
            assert (folder / "model.safetensors").read_bytes() == WEIGHTS + bytes([last_byte])
            assert (folder / "notes.txt").read_bytes() == b"same in all"
        run = wandb.init(entity="team", project="arena", id="abc")
        used = run.use_artifact(f"{NAME}:v1")
        run.finish()
        assert [a.name for a in api.run("team/arena/abc").used_artifacts()] == ["policy:v1"]
        assert [r.id for r in used.used_by()] == ["abc"]
    assert wandb_server.num_bytes_sent > 3 * len(WEIGHTS)


def test_one_file_in_memory_needs_three_requests(wandb_server: WandbServer) -> None:
    """The way round the client's cache and its unbounded retries: ask for the signed URL, fetch it oneself."""
    import requests

    plant(wandb_server)
    with wandb_server.client() as wandb:
        api = wandb.Api()
        api.artifact(f"{NAME}:v0")  # the first one also asks for the server's features
        before = len(wandb_server.exchanges)
        artifact = api.artifact(f"{NAME}:v1", type="model")
        (file,) = artifact.files(names=["model.safetensors"], per_page=1)
        content = requests.get(file.direct_url, timeout=5).content
        wandb_server.expire_urls()
        assert requests.get(file.direct_url, timeout=5).status_code == 403
    assert content == WEIGHTS + b"\x01"
    assert (file.size, file.md5) == (len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
    operations = [e.operation or e.method for e in wandb_server.exchanges[before:]]
    operations = [operation for operation in operations if operation != "ServerFeaturesQuery"]
    assert operations == ["ArtifactMembershipByName", "ArtifactMembershipFiles", "GET", "GET"]
    assert not list(Path(wandb_server.env["WANDB_CACHE_DIR"]).rglob("obj/**/*"))


def test_versions_are_listed_with_all_that_a_selector_needs(wandb_server: WandbServer) -> None:
    for index in range(7):
        wandb_server.add_artifact(
            "team",
            "arena",
            "policy",
            files={"model.safetensors": bytes(100 + index)},
            metadata={"epoch": index, "eval/score": index / 8},
            aliases=["best"] if index == 4 else [],
            created_at=f"2026-01-0{index + 1}T00:00:00Z",
        )
    with wandb_server.client() as wandb:
        api = wandb.Api()
        versions = list(api.artifacts("model", NAME, per_page=3))
        assert [v.version for v in versions] == ["v6", "v5", "v4", "v3", "v2", "v1", "v0"]
        assert [v.metadata["eval/score"] for v in versions] == [0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
        assert [v.aliases for v in versions][:3] == [["latest"], [], ["best"]]
        assert (versions[0].created_at, versions[0].size, versions[0].state) == (
            "2026-01-07T00:00:00Z",
            106,
            "COMMITTED",
        )
        assert len({v.digest for v in versions}) == 7
        assert api.artifact(f"{NAME}:best").digest == versions[2].digest
        assert wandb_server.count("ProjectArtifacts") == 3
        oldest_first = api.artifacts("model", NAME, order="+versionIndex")
        assert [v.version for v in oldest_first][:2] == ["v0", "v1"]
        collection = api.artifact_collection("model", NAME)
        assert (collection.type, sorted(collection.aliases)) == ("model", ["best", "latest"])
        assert [c.name for c in api.artifact_type("model", "team/arena").collections()] == ["policy"]


def test_runs_are_paged_ordered_and_filtered(wandb_server: WandbServer) -> None:
    for index in range(120):
        wandb_server.add_run(
            "team",
            "arena",
            f"run{index:03}",
            name=f"name {index}",
            state="finished" if index % 4 else "crashed",
            config={"lr": index % 3, "ppo": {"gamma": 0.9}},
            summary={"score": (index * 37 % 120) / 120, "eval/wins": index} if index != 5 else {},
        )
    wandb_server.add_artifact("team", "arena", "policy", files={"m": b"1"}, run="run118")
    with wandb_server.client() as wandb:
        api = wandb.Api()
        runs = api.runs("team/arena", per_page=50, order="-created_at", lazy=False)
        assert [run.id for run in runs] == [f"run{index:03}" for index in reversed(range(120))]
        assert len(runs) == 120
        assert wandb_server.count("Runs") == 3
        assert (runs[0].name, runs[0].state, runs[0].config["lr"]) == ("name 119", "finished", 2)
        assert runs[0].summary["eval/wins"] == 119
        assert wandb_server.count("Runs") == 3, "summary and config came with the list"
        assert [a.name for a in runs[1].logged_artifacts()] == ["policy:v0"]

        def ids(**query: Any) -> list[str]:
            return [run.id for run in api.runs("team/arena", **query)]

        scores = {f"run{i:03}": (i * 37 % 120) / 120 for i in range(120) if i != 5}
        ranked = sorted(scores, key=lambda run_id: scores[run_id])
        assert ids(order="+summary_metrics.score") == ["run005", *ranked]
        assert ids(order="-summary_metrics.score") == [*reversed(ranked), "run005"]
        assert len(ids(filters={"state": "finished"})) == 90
        assert ids(filters={"summary_metrics.eval/wins": {"$gte": 118}}) == ["run118", "run119"]
        assert ids(filters={"$or": [{"display_name": "name 7"}, {"config.lr": 1, "name": "run001"}]}) == [
            "run001",
            "run007",
        ]
        with pytest.raises(Exception, match="unknown filter operator"):
            ids(filters={"state": {"$near": 1}})


def test_unknown_names_wrong_keys_and_denied_projects_are_three_things(wandb_server: WandbServer) -> None:
    plant(wandb_server)
    plant(wandb_server, project="secret")
    wandb_server.deny("team", "secret")
    with wandb_server.client() as wandb:
        api = wandb.Api()
        for name, message in {
            "nobody/none/policy:latest": "project 'none' not found under entity 'nobody'",
            "team/arena/none:latest": "artifact membership 'none:latest' not found in 'team/arena'",
            f"{NAME}:v9": "artifact membership 'policy:v9' not found in 'team/arena'",
            "team/secret/policy:v0": "permission denied",
        }.items():
            with pytest.raises(wandb.errors.CommError, match=message):
                api.artifact(name)
        with pytest.raises(ValueError, match="Could not find project none"):
            list(api.runs("team/none"))
        with pytest.raises(ValueError, match="Unable to parse 'Artifacts' response data"):
            list(api.artifacts("model", "team/arena/none"))
        with pytest.raises(wandb.errors.CommError, match="permission denied"):
            wandb.init(entity="team", project="secret")
    with wandb_server.client(WANDB_API_KEY="0" * 40) as wandb:
        with pytest.raises(wandb.errors.AuthenticationError, match="user is not logged in"):
            wandb.Api()
        assert wandb_server.exchanges[-1].status == 401
    with wandb_server.client(WANDB_API_KEY="") as wandb, pytest.raises(wandb.errors.UsageError, match="No API key"):
        wandb.Api()
    nowhere = wandb_server.client(WANDB_BASE_URL="http://127.0.0.1:1")
    with nowhere as wandb, pytest.raises(wandb.errors.AuthenticationError, match="connection refused"):
        wandb.Api()


def test_a_process_of_its_own_reaches_only_the_stand_in(wandb_server: WandbServer) -> None:
    plant(wandb_server)
    script = (
        "import sys, requests, wandb; print(wandb.Api().artifact(sys.argv[1]).version)\n"
        "try: requests.get('https://elsewhere.example/x', timeout=5)\n"
        "except requests.ConnectionError: print('refused')"
    )
    done = wandb_server.run_script(script, f"{NAME}:latest")
    assert (done.stdout.split(), done.returncode) == (["v2", "refused"], 0), done.stderr
    assert wandb_server.foreign_hosts == ["elsewhere.example:443"]


def test_graphql_faults_end_within_bounds(wandb_server: WandbServer) -> None:
    plant(wandb_server)
    with wandb_server.client() as wandb:
        api = wandb.Api()

        def attempts(kind: str, times: int | None) -> tuple[int, str]:
            before = wandb_server.count("ArtifactMembershipByName")
            wandb_server.faults.add("ArtifactMembershipByName", kind, times=times)
            try:
                outcome = api.artifact(f"{NAME}:v0").version
            except wandb.errors.CommError as error:
                outcome = str(error)
            wandb_server.faults.clear()
            return wandb_server.count("ArtifactMembershipByName") - before, outcome

        num, outcome = attempts("status:503", times=None)
        assert (num, "giving up after 2 attempt(s)" in outcome, "planted 503" in outcome) == (2, True, True)
        num, outcome = attempts("reset", times=None)
        assert (num, "connection reset by peer" in outcome) == (2, True)
        assert attempts("lost", times=1) == (2, "v0")
        assert attempts("status:409", times=1) == (1, "planted 409")
        assert attempts("truncate", times=1) == (1, "unexpected EOF")
        assert attempts("wrong_length", times=1) == (1, "unexpected EOF")
        assert attempts("slow:0.1", times=1) == (1, "v0")
    assert len(wandb_server.faults.fired) == 9


@pytest.mark.filterwarnings("ignore:unclosed file <_io.FileIO:ResourceWarning")  # the client's, after `truncate`
def test_the_client_takes_damaged_downloads_for_good_ones(wandb_server: WandbServer, tmp_path: Path) -> None:
    """Why our own digest is needed: wandb 0.31 compares no digest after a download and notes the expected one."""
    plant(wandb_server, 1)
    with wandb_server.client() as wandb:
        artifact = wandb.Api().artifact(f"{NAME}:v0")

        def download(kind: str) -> bytes:
            wandb_server.faults.add("model.safetensors", kind)
            folder = artifact.download(root=str(tmp_path / kind.partition(":")[0]), skip_cache=True)
            return (Path(folder) / "model.safetensors").read_bytes()

        good = WEIGHTS + b"\x00"
        flipped = download("bitflip")
        assert sum((a ^ b).bit_count() for a, b in zip(flipped, good, strict=True)) == 1
        assert download("wrong_length") == good[: len(good) // 2]
        assert download("status:503") == good
        assert download("reset") == good
        assert download("stall:0.1") == good
        wandb_server.faults.add("model.safetensors", "truncate")
        with pytest.raises(Exception, match="IncompleteRead"):
            artifact.download(root=str(tmp_path / "truncate"), skip_cache=True)
    assert [kind for kind, _ in wandb_server.faults.fired] == [
        *("bitflip", "wrong_length", "status", "reset", "stall", "truncate")
    ]


def test_hostile_file_names_reach_the_client(wandb_server: WandbServer, tmp_path: Path) -> None:
    import requests

    names = ["../../evil", "/abs", "a/../../evil", "a\\..\\evil", "é %2e?#&.bin"]
    wandb_server.add_artifact("team", "arena", "policy", files={name: name.encode() for name in names})
    with wandb_server.client() as wandb:
        artifact = wandb.Api().artifact(f"{NAME}:v0")
        files = {file.name: requests.get(file.direct_url, timeout=5).content for file in artifact.files()}
        assert files == {name: name.encode() for name in names}
        with pytest.raises(ValueError, match=r"evil|abs"):
            artifact.download(root=str(tmp_path / "in" / "root"), skip_cache=True)
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/abs").exists()


def test_an_upload_that_arrives_damaged_is_refused(wandb_server: WandbServer) -> None:
    import requests

    plant(wandb_server, 1)
    with wandb_server.client() as wandb:
        (file,) = wandb.Api().artifact(f"{NAME}:v0").files(names=["notes.txt"])
    wrong = {"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert requests.put(file.direct_url, data=b"other", headers=wrong, timeout=5).status_code == 400
    assert requests.get(file.direct_url, timeout=5).content == b"same in all"
    ranged = requests.get(file.direct_url, headers={"Range": "bytes=5-6"}, timeout=5)
    assert (ranged.status_code, ranged.content, ranged.headers["Content-Range"]) == (206, b"in", "bytes 5-6/11")


def test_s3_keeps_multipart_ranges_versions_and_conditions(s3_server: S3Server) -> None:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import ClientError

    s3 = s3_server.client()
    s3.create_bucket(Bucket="policies")
    s3.put_bucket_versioning(Bucket="policies", VersioningConfiguration={"Status": "Enabled"})
    big = WEIGHTS * 120
    s3.upload_fileobj(io.BytesIO(big), "policies", "big/é k=1.bin", Config=TransferConfig(multipart_threshold=1 << 20))
    assert s3_server.count("uploadId=") >= 3  # two parts and the completion
    head = s3.head_object(Bucket="policies", Key="big/é k=1.bin")
    assert head["ContentLength"] == len(big)
    sent = s3_server.num_bytes_sent
    ranged = s3.get_object(Bucket="policies", Key="big/é k=1.bin", Range="bytes=100-199")
    assert ranged["Body"].read() == big[100:200]
    assert s3_server.num_bytes_sent - sent == 100
    first = s3.put_object(Bucket="policies", Key="a", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.put_object(Bucket="policies", Key="a", Body=b"2", IfNoneMatch="*")
    second = s3.put_object(Bucket="policies", Key="a", Body=b"2", IfMatch=first["ETag"])
    assert s3.get_object(Bucket="policies", Key="a", VersionId=first["VersionId"])["Body"].read() == b"1"
    assert first["VersionId"] != second["VersionId"]
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(Bucket="policies", Key="none")


def test_s3_keeps_nothing_of_a_client_that_is_killed_within_its_request(s3_server: S3Server) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="k", Body=b"whole")
    address = urlsplit(s3_server.url)
    for head in (b"Content-Length: 100\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"PUT /bucket/k HTTP/1.1\r\nHost: x\r\n" + head)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    assert client.get_object(Bucket="bucket", Key="k")["Body"].read() == b"whole"


def test_s3_faults_reach_boto3(s3_server: S3Server) -> None:
    import boto3
    from botocore.exceptions import ClientError, FlexibleChecksumError, ResponseStreamingError

    s3 = s3_server.client(response_checksum_validation="when_required")
    s3.create_bucket(Bucket="policies")
    s3.put_object(Bucket="policies", Key="a", Body=WEIGHTS)

    def get(kind: str, client: Any = s3) -> bytes:
        s3_server.faults.add("GET /policies/a", kind)
        return client.get_object(Bucket="policies", Key="a")["Body"].read()

    assert get("status:503") == get("reset") == get("lost") == get("stall:0.1") == WEIGHTS
    assert sum((a ^ b).bit_count() for a, b in zip(get("bitflip"), WEIGHTS, strict=True)) == 1
    assert get("wrong_length") == WEIGHTS[: len(WEIGHTS) // 2]
    with pytest.raises(ResponseStreamingError, match="50000 more expected"):
        get("truncate")
    with pytest.raises(ClientError, match="412"):
        get("status:412")
    with pytest.raises(FlexibleChecksumError):
        get("bitflip", s3_server.client())  # boto3 checks the CRC that it stored itself
    s3_server.faults.add("PUT /policies/b", "lost")
    with pytest.raises(ClientError, match="PreconditionFailed"):  # its own first attempt is in the way
        s3.put_object(Bucket="policies", Key="b", Body=b"1", IfNoneMatch="*")
    assert boto3.client("s3").get_object(Bucket="policies", Key="b")["Body"].read() == b"1"  # the environment's client
    assert s3_server.foreign_hosts == []


def test_s3_starts_empty_every_time() -> None:
    for _ in range(2):
        with S3Server() as server:
            s3 = server.client()
            assert s3.list_buckets()["Buckets"] == []
            s3.create_bucket(Bucket="policies")


def test_faults_follow_the_script_and_the_seed() -> None:
    def fired(seed: int) -> list[int]:
        faults = Faults(seed)
        faults.add("GET /a", "reset", times=3, after=2, probability=0.5)
        return [index for index in range(40) if faults.draw("GET /a/b") is not None]

    assert fired(1) == fired(1)
    assert len(fired(1)) == 3
    assert min(fired(1)) >= 2
    assert len({tuple(fired(seed)) for seed in range(8)}) > 1
    assert Faults().draw("GET /a") is None
    for kind in ("status", "melt", "reset:1"):
        with pytest.raises(ValueError, match="fault kind"):
            Faults().add("", kind)


def test_graphql_selects_what_is_asked_and_refuses_what_is_unknown() -> None:
    run = {"__typename": "Run", "name": "x", "tags": ["a"], "state": lambda: "finished"}
    query = {"__typename": "Query", "run": lambda name: run | {"name": name}}
    document = """query Q($n: String!, $more: Boolean = false) {
        first: run(name: $n) { ...F tags @include(if: $more) } run(name: "b") { ... on Run { name } ... on Other { z } }
    } fragment F on Run { __typename name state }"""
    assert execute(document, {"n": "a"}, query=query, mutation={}) == {
        "first": {"__typename": "Run", "name": "a", "state": "finished"},
        "run": {"name": "b"},
    }
    assert execute(document, {"n": "a", "more": True}, query=query, mutation={})["first"]["tags"] == ["a"]
    with pytest.raises(UnansweredError, match="Cannot query field 'colour' on type 'Run'"):
        execute('{ run(name: "a") { colour } }', {}, query=query, mutation={})


def test_what_the_stand_in_cannot_answer_fails_the_test(tmp_path: Path) -> None:
    server = WandbServer(tmp_path)
    server.add_project("team", "arena")
    with server.client() as wandb, pytest.raises(Exception, match="Cannot query field 'sweep'"):
        wandb.Api().sweep("team/arena/abc")
    with pytest.raises(AssertionError, match="asked what it does not know"):
        server.close()
