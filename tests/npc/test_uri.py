"""URIs: what is read as what, and what is refused."""

from __future__ import annotations

import pytest

from dual_policy_plugin.errors import NpcError
from dual_policy_plugin.npc.uri import parse_uri


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
        ("file://", "nothing follows file://"),
        ("builtin://", "nothing follows builtin://"),
        ("file:/abs/model.pt", "two slashes, file://"),
        ("s3:bucket/key", "two slashes, s3://"),
        ("s3://bucket/key.pt", "this version reads files and builtin:// only"),
        ("wandb://entity/project/model/name:latest", "this version reads files and builtin:// only"),
        ("https://host/model.pt", "this version reads files and builtin:// only"),
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
