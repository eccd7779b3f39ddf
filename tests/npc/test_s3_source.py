"""Policies in S3: what a key or a prefix means, with real requests to a loopback S3 and the real boto3."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.sources import http, s3_client
from dual_policy_plugin.npc.sources.http import Retries
from dual_policy_plugin.npc.sources.s3_objects import collection, fetch, find
from dual_policy_plugin.npc.uri import parse_uri
from tests.npc.policies import policy_bytes
from tests.services.fixtures import s3_server  # noqa: F401
from tests.services.s3_server import S3Server

BUCKET = "policies"


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRIES", Retries(attempts=4, first_wait_s=0.01, max_wait_s=0.02))


@pytest.fixture
def s3(s3_server: S3Server) -> Any:  # noqa: F811
    client = s3_server.client()
    client.create_bucket(Bucket=BUCKET)
    return client


def put(s3: Any, key: str, body: bytes, **more: Any) -> Any:
    return s3.put_object(Bucket=BUCKET, Key=key, Body=body, **more)


def found(text: str) -> Candidate:
    return find(parse_uri(text), None)


def all_of(text: str) -> list[Candidate]:
    return collection(parse_uri(text), None)


def test_a_key_is_described_by_its_first_bytes_alone(s3: Any, s3_server: S3Server) -> None:  # noqa: F811
    data = policy_bytes(42, size=200_000, **{"dual_policy/win_rate": 0.75})
    put(s3, "runs/run_a/checkpoints/model_0042.safetensors", data)
    before = s3_server.num_bytes_sent
    candidate = found(f"s3://{BUCKET}/runs/run_a/checkpoints/model_0042.safetensors")
    assert s3_server.num_bytes_sent - before == 4096
    assert candidate.uri == f"s3://{BUCKET}/runs/run_a/checkpoints/model_0042.safetensors"
    assert (candidate.name, candidate.version, candidate.num_bytes) == ("run_a.model_0042", 42, len(data))
    wanted = {"epoch": 42, "step": 4200, "architecture": "fast", "dual_policy/win_rate": 0.75, "parameters": 200_000}
    assert {key: candidate.metadata[key] for key in wanted} == wanted
    assert candidate.etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert candidate.created.endswith("+00:00")
    assert fetch(candidate) == data


def test_a_header_longer_than_the_first_read_costs_one_more_request(s3: Any, s3_server: S3Server) -> None:  # noqa: F811
    data = policy_bytes(1, **{f"metric_{i:03}": i / 7 for i in range(200)})
    put(s3, "a.safetensors", data)
    before = len(s3_server.exchanges)
    candidate = found(f"s3://{BUCKET}/a.safetensors")
    requests = [e for e in s3_server.exchanges[before:] if "list-type" not in e.target]
    assert [e.headers["Range"] for e in requests] == [
        "bytes=0-4095",
        f"bytes=4096-{7 + int.from_bytes(data[:8], 'little')}",
    ]
    assert (candidate.metadata["metric_199"], candidate.version) == (199 / 7, None)


def test_a_prefix_means_its_newest_checkpoint_by_epoch_not_by_listing_order(s3: Any) -> None:
    for epoch in (9, 100, 10, 2):
        put(s3, f"run_a/checkpoints/model_{epoch}.safetensors", policy_bytes(epoch))
    put(s3, "run_a/checkpoints/latest.safetensors", policy_bytes(100))
    put(s3, "run_a/state/resume.safetensors", b"no policy")
    wanted = f"s3://{BUCKET}/run_a/checkpoints/model_100.safetensors"
    assert found(f"s3://{BUCKET}/run_a/").uri == wanted
    assert found(f"s3://{BUCKET}/run_a").uri == wanted
    assert found(f"s3://{BUCKET}/run_a/checkpoints/").uri == wanted
    assert found(f"s3://{BUCKET}/run_a/checkpoints/latest.safetensors").uri == wanted, "pinned to what it is a copy of"
    assert [c.version for c in all_of(f"s3://{BUCKET}/run_a/")] == [2, 9, 10, 100]


def test_a_prefix_of_runs_gives_the_newest_of_each_and_names_them(s3: Any) -> None:
    for run, epochs in (("run_a", (1, 30)), ("run_b", (2,))):
        for epoch in epochs:
            put(s3, f"exp/{run}/checkpoints/model_{epoch:04}.safetensors", policy_bytes(epoch, score=epoch / 8))
    candidates = all_of(f"s3://{BUCKET}/exp/")
    assert [(c.name, c.version, c.metadata["score"]) for c in candidates] == [
        ("run_a.model_0030", None, 3.75),
        ("run_b.model_0002", None, 0.25),
    ]
    with pytest.raises(NpcNotFoundError, match=r"it holds the runs exp/run_a/, exp/run_b/; name one of them"):
        found(f"s3://{BUCKET}/exp/")


def test_a_versioned_object_is_pinned_to_its_version(s3: Any) -> None:
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    first = put(s3, "latest.safetensors", policy_bytes(1))
    pinned = found(f"s3://{BUCKET}/latest.safetensors")
    put(s3, "latest.safetensors", policy_bytes(2))
    assert pinned.uri == f"s3://{BUCKET}/latest.safetensors?versionId={first['VersionId']}"
    assert fetch(pinned) == policy_bytes(1)
    again = found(pinned.uri)
    assert (again.uri, again.metadata["epoch"]) == (pinned.uri, 1)
    assert found(f"s3://{BUCKET}/latest.safetensors").metadata["epoch"] == 2


def test_an_object_that_was_replaced_is_refused(s3: Any) -> None:
    put(s3, "a.safetensors", policy_bytes(1))
    pinned = found(f"s3://{BUCKET}/a.safetensors")
    put(s3, "a.safetensors", policy_bytes(2))
    with pytest.raises(DigestError, match=rf"^s3://{BUCKET}/a.safetensors: another object stands there"):
        fetch(pinned)


def test_what_is_missing_is_said_with_what_is_there(s3: Any) -> None:
    put(s3, "run_a/checkpoints/model_0001.safetensors", policy_bytes(1))
    with pytest.raises(NpcNotFoundError, match=r"no such object; s3://policies/run_a/checkpoints/ holds .*model_0001"):
        found(f"s3://{BUCKET}/run_a/checkpoints/model_0002.safetensors")
    with pytest.raises(NpcNotFoundError, match=r"not found, S3 answered NoSuchBucket"):
        found("s3://nobodys-bucket/a.safetensors")
    with pytest.raises(NpcNotFoundError, match=r"no checkpoint under this prefix"):
        all_of(f"s3://{BUCKET}/nothing/")
    put(s3, "empty.safetensors", b"")
    assert found(f"s3://{BUCKET}/empty.safetensors").num_bytes == 0


def test_no_login_no_access_and_no_network_are_told_apart(
    s3: Any,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    put(s3, "a.safetensors", policy_bytes(1))
    uri = f"s3://{BUCKET}/a.safetensors"
    s3_server.faults.add("GET /policies/a", "status:403")
    with pytest.raises(NpcError, match=rf"^{uri}: no access, S3 answered 403"):
        found(uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(NpcError, match=rf"^{uri}: no network, .*; gave up after 4 attempts"):
        found(uri)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NpcError, match=rf"^{uri}: no access, no AWS login was found \(NoCredentialsError\)"):
        found(uri)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NpcError, match=r"the AWS settings do not work \(ProfileNotFound\)"):
        found(uri)


def test_a_damaged_file_is_described_without_facts_and_another_header_is_refused(s3: Any) -> None:
    put(s3, "a.safetensors", b"\x08" + bytes(100))
    candidate = found(f"s3://{BUCKET}/a.safetensors")
    assert (dict(candidate.metadata), candidate.num_bytes) == ({}, 101)
    put(s3, "b.safetensors", policy_bytes(5))
    candidate = found(f"s3://{BUCKET}/b.safetensors")
    lied = Candidate(
        uri=candidate.uri, name="b", num_bytes=candidate.num_bytes, metadata={"epoch": 6}, etag=candidate.etag
    )
    with pytest.raises(NpcError, match="its header was misread when it was chosen"):
        fetch(lied)


def test_the_publishers_sha256_is_compared_where_there_is_one(s3: Any) -> None:
    data = policy_bytes(1)
    put(s3, "good.safetensors", data, Metadata={"sha256": hashlib.sha256(data).hexdigest()})
    put(s3, "bad.safetensors", data, Metadata={"sha256": "0" * 64})
    assert fetch(found(f"s3://{BUCKET}/good.safetensors")) == data
    with pytest.raises(NpcError, match=r"not those that were published; gave up after 4 attempts"):
        fetch(found(f"s3://{BUCKET}/bad.safetensors"))


def test_an_object_without_any_digest_is_read_until_two_reads_agree(s3: Any, s3_server: S3Server) -> None:  # noqa: F811
    data = policy_bytes(1, size=6 << 20)
    parts = [data[: 5 << 20], data[5 << 20 :]]
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="big.safetensors")
    etags = [
        s3.upload_part(Bucket=BUCKET, Key="big.safetensors", UploadId=upload["UploadId"], PartNumber=i + 1, Body=part)
        for i, part in enumerate(parts)
    ]
    done = {"Parts": [{"PartNumber": i + 1, "ETag": part["ETag"]} for i, part in enumerate(etags)]}
    s3.complete_multipart_upload(
        Bucket=BUCKET, Key="big.safetensors", UploadId=upload["UploadId"], MultipartUpload=done
    )
    candidate = found(f"s3://{BUCKET}/big.safetensors")
    assert candidate.etag.strip('"').endswith("-2")
    s3_server.faults.add("GET /policies/big", "bitflip")
    before = s3_server.count("GET /policies/big")
    assert fetch(candidate) == data
    assert s3_server.count("GET /policies/big") - before == 3
    s3_server.faults.add("GET /policies/big", "wrong_length", times=2)  # two reads that agree, and are too short
    assert fetch(candidate) == data


def test_more_keys_than_can_be_meant_are_refused(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "MAX_KEYS", 3)
    for i in range(4):
        put(s3, f"many/{i}.txt", b"")
    with pytest.raises(NpcError, match="more than 3 objects are under this prefix"):
        all_of(f"s3://{BUCKET}/many/")


@pytest.mark.parametrize("kind", ["wrong_length", "truncate", "status:503", "reset"])
def test_a_fault_in_the_first_bytes_costs_no_facts(s3: Any, s3_server: S3Server, kind: str) -> None:  # noqa: F811
    long_header = {f"metric_{i:03}": i / 7 for i in range(200)}
    put(s3, "a.safetensors", policy_bytes(3, size=9000, score=0.5, **long_header))
    for after in (0, 1):  # the first read, and the one for the rest of the header
        s3_server.faults.add("GET /policies/a", kind, after=after)
        assert found(f"s3://{BUCKET}/a.safetensors").metadata["metric_199"] == 199 / 7
    assert [fired for fired, _ in s3_server.faults.fired] == [kind.partition(":")[0]] * 2


def test_a_version_that_is_not_there_never_means_what_is_under_the_key_as_a_prefix(s3: Any) -> None:
    put(s3, "run_a/checkpoints/model_0001.safetensors", policy_bytes(1))
    for ask in (found, all_of):
        with pytest.raises(NpcNotFoundError, match=r"no such object"):
            ask(f"s3://{BUCKET}/run_a?versionId=abc")
