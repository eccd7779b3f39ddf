"""URIs: what is read as what, and what is refused."""

from __future__ import annotations

import pytest

from dual_policy_plugin.errors import NpcError
from dual_policy_plugin.npc.uri import parse_uri, s3_name, wandb_name


@pytest.mark.parametrize(
    ("text", "scheme", "path"),
    [
        ("model.pt", "file", "model.pt"),
        ("./train_dir/a b/model_0000.pt", "file", "./train_dir/a b/model_0000.pt"),
        ("/abs/model.pt", "file", "/abs/model.pt"),
        ("file:///abs/model.pt", "file", "/abs/model.pt"),
        ("FILE:///abs/model.pt", "file", "/abs/model.pt"),
        ("file://relative/model.pt", "file", "relative/model.pt"),
        ("file://../up/model.pt", "file", "../up/model.pt"),
        ("a%2e%2e/b.pt", "file", "a%2e%2e/b.pt"),
        ("policy@3.pt", "file", "policy@3.pt"),
        ("runs/me@3:x/policy.pt", "file", "runs/me@3:x/policy.pt"),
        ("modèle.pt", "file", "modèle.pt"),
        ("./s3:odd", "file", "./s3:odd"),
        ("builtin://arena/medium", "builtin", "arena/medium"),
    ],
)
def test_a_uri_is_read(text: str, scheme: str, path: str) -> None:
    uri = parse_uri(text)
    assert (uri.text, uri.scheme, uri.path) == (text, scheme, path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b.pt", "U+0000"),
        ("a\nb.pt", "U+000A"),
        ("a\u202eb.pt", "U+202E"),
        ("a\u200bb.pt", "U+200B"),
        ("a\ud800b.pt", "U+D800"),
        ("x" * 5000, "has 5000 characters"),
        ("file://", "nothing follows file://; write file:///absolute/path"),
        ("builtin://", "nothing follows builtin://; write builtin://arena/medium"),
        ("s3://", "nothing follows s3://; write s3://bucket/key"),
        ("file:/abs/model.pt", "two slashes, file://"),
        ("s3:bucket/key", "two slashes, s3://"),
        ("https://host/model.pt", "https:// is not read"),
        ("gs://bucket/model.pt", "gs:// is not read"),
        ("a${oc.env:HOME}.pt", "take for an interpolation"),
        ("fil://a/b.pt", "did you mean file://"),
        ("builtins://arena/weak", "did you mean builtin://"),
        ("gopher://a", "unknown scheme gopher://"),
        ("builtin://medium", "builtin://<env>/<name>"),
        ("builtin://arena/../../etc/passwd", "builtin://<env>/<name>"),
        ("builtin://../arena", "builtin://<env>/<name>"),
        ("builtin://arena/weak.safetensors", "builtin://<env>/<name>"),
        ("builtin://arena/weak/", "builtin://<env>/<name>"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(NpcError) as caught:
        parse_uri(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "file://user:hunter2@host/x.pt",
        "s3://AKIA:hunter2@bucket/key",
        "https://hunter2@host/x.pt",
        "user:hunter2@host/x.pt",
        "foo://user:hunter2@host",
        "s3:/user:hunter2@host",
    ],
)
def test_credentials_are_refused_and_never_shown(text: str) -> None:
    with pytest.raises(NpcError, match="user name or password") as caught:
        parse_uri(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wandb://team/arena/model/policy:v7", ("team", "arena", "model", "policy", "v7")),
        ("wandb://team/arena/model/policy", ("team", "arena", "model", "policy", "latest")),
        ("wandb://team/arena/policy:best", ("team", "arena", None, "policy", "best")),
        ("wandb://team/my arena/policy", ("team", "my arena", None, "policy", "latest")),
        ("wandb://run/my.run-1:v0", (None, None, "model", "my.run-1", "v0")),
        ("wandb://run/sweep/3:best", (None, None, "model", "sweep/3", "best")),
        ("wandb://run/arena/model/policy", ("run", "arena", "model", "policy", "latest")),
        ("wandb://team/arena", ("team", "arena", None, None, "latest")),
        ("wandb://team/arena/", ("team", "arena", None, None, "latest")),
    ],
)
def test_the_parts_of_a_wandb_name(text: str, parts: tuple[str | None, ...]) -> None:
    name = wandb_name(parse_uri(text))
    assert (name.entity, name.project, name.type, name.name, name.version) == parts


@pytest.mark.parametrize(
    ("text", "parts", "is_prefix"),
    [
        ("s3://bucket/a/b.pt", ("bucket", "a/b.pt", None), False),
        ("s3://bucket/a//b%2e.pt?x=1", ("bucket", "a//b%2e.pt?x=1", None), False),
        ("s3://bucket/k?versionId=3sL4.k-_", ("bucket", "k", "3sL4.k-_"), False),
        ("s3://bucket/a/", ("bucket", "a/", None), True),
        ("s3://bucket", ("bucket", "", None), True),
        ("S3://bucket/", ("bucket", "", None), True),
    ],
)
def test_the_parts_of_an_s3_name(text: str, parts: tuple[str | None, ...], is_prefix: bool) -> None:
    name = s3_name(parse_uri(text))
    assert (name.bucket, name.key, name.version_id) == parts
    assert name.is_prefix is is_prefix


@pytest.mark.parametrize(
    "text",
    [
        "wandb://team", "wandb://team/arena:v1", "wandb://a/b/c/d/e", "wandb://a/b/c/d/e:v1", "wandb://a//c",
        "wandb://a/b/..", "wandb://../b/c", "wandb://a/b/c:", "wandb://a/b/c:v1:v2", "wandb://a/b/c:a/b",
        "wandb://a/b/%2e%2e", "wandb://a/b\\c/d", "wandb://a/b/c?x=1", "wandb://a/b/\u2024\u2024", "wandb://a/b/c#d",
        "wandb://run/", "wandb://run", "wandb://a/ b/c", "wandb://a/b/c d", "wandb:///a/b",
        "s3://169.254.169.254/latest/meta-data", "s3://Bucket/key", "s3://a..b/key", "s3://-a/key", "s3://a_b/k", "s3:///key",
        "s3://bucket/../key", "s3://bucket/a/./b", "s3://bucket/k?versionId=",
        "s3://bucket/k/?versionId=a", "s3://bucket/?versionId=a", "s3://bucket/k?versionId=a/b",
        "s3://bucket/" + "k" * 1025, "s3://bu\u2024cket/k", "s3://bucket:9000/k",
    ],
)  # fmt: skip
def test_what_no_artifact_and_no_object_can_be_named(text: str) -> None:
    with pytest.raises(NpcError) as caught:
        parse_uri(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/k?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
        "s3://bucket/k?AWSAccessKeyId=AK&Signature=hunter2",
        "s3://bucket/k?versionId=hunter2/x",
        "s3://Bucket/k?x=hunter2",
        "https://host/model.pt?token=hunter2",
        "https://host/model.pt?whatever=hunter2",
        "ftp://host/model.pt?whatever=hunter2",
        "gs://bucket/model.pt?GoogleAccessId=a&Signature=hunter2",
        "wandb://a/b/c?api_key=hunter2",
    ],
)
def test_what_follows_a_question_mark_is_never_shown(text: str) -> None:
    with pytest.raises(NpcError) as caught:
        parse_uri(text)
    assert "hunter2" not in str(caught.value)
