"""Hostile names, keys and URIs: no file outside the cache, no request to a host that was not configured.

Every URI goes through the real resolver, with W&B and S3 on loopback; the services are also the proxies for all other
hosts, so that a request to one would stand in their `foreign_hosts`.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.errors import DualPolicyError, NpcError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.resolver import resolve_all
from dual_policy_plugin.npc.sources import http, s3_objects, wandb_artifacts
from dual_policy_plugin.npc.sources.http import Retries
from dual_policy_plugin.npc.uri import NpcUri
from tests.npc.policies import policy_bytes
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

NUM_NAMES = 500
PARTS = (
    "..",
    ".",
    "",
    "...",
    "/etc/passwd",
    "\\..\\..\\windows",
    "%2e%2e",
    "%252e%252e%252f",
    "\u2024\u2024",  # one dot leaders
    "\uff0e\uff0e",  # fullwidth full stops
    "\u2215etc",  # division slash
    "a\x00b",
    "a\nb",
    "\u202egnp.yxp",
    "user:pass@evil.example",
    "user@evil.example",
    "@169.254.169.254",
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "0xa9fea9fe",
    "metadata.google.internal",
    "localhost:1",
    "evil.example:80",
    "http://evil.example/x",
    "file:///etc/passwd",
    "a?versionId=../../x",
    "a#b",
    "a;b",
    "$(touch pwned)",
    "`touch pwned`",
    "${oc.env:HOME}",
    "{0.__class__}",
    "a" * 300,
    "~root",
    "-rf",
    "CON",
    "policy:v0:v1",
    "link",
    "é",
    "🦀",
)
FORMS = (
    "{}",
    "file://{}",
    "file:///{}",
    "builtin://{}",
    "builtin://arena/{}",
    "wandb://{}",
    "wandb://{}/arena/policy:v0",
    "wandb://team/{}/policy:v0",
    "wandb://team/arena/{}",
    "wandb://team/arena/model/{}:v0",
    "wandb://team/arena/model/policy:{}",
    "wandb://team/arena/model/policy/{}:v0",
    "wandb://run/{}",
    "wandb://team/{}",
    "s3://{}",
    "s3://{}/a.safetensors",
    "s3://pol/{}",
    "s3://pol/{}/a.safetensors",
    "s3://pol/x/{}/../../other/secret.safetensors",
    "s3://pol/a.safetensors?versionId={}",
    "http://{}/a.safetensors",
    "gs://{}/a.safetensors",
    "{}://pol/a.safetensors",
    "S3://{}@pol/a.safetensors",
)


def hostile_uris() -> list[str]:
    """500 different URIs, the same every time: all forms of every part are among what is drawn from."""
    every = sorted({form.format(part) for form, part in itertools.product(FORMS, PARTS) if form.format(part).strip()})
    return random.Random(11).sample(every, NUM_NAMES)


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRIES", Retries(attempts=2, first_wait_s=0.001, max_wait_s=0.001))


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    }


def error_of(uri: str, type: str, cache: Cache) -> str:
    """The user's error that a URI gives; empty where it gives a policy."""
    try:
        resolve_all(PolicySource(uri=uri, type=type), seed=0, cache=cache)
    except DualPolicyError as error:
        return str(error)
    return ""


def test_hostile_uris_write_nothing_outside_the_cache_and_ask_nobody_else(
    wandb_server: WandbServer,  # noqa: F811
    s3_server: S3Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3 = s3_server.client()
    for bucket in ("pol", "other"):
        s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket="other", Key="secret.safetensors", Body=policy_bytes(1))
    wandb_server.add_artifact("team", "arena", "policy", files={"model.safetensors": policy_bytes(2)})
    inside, secret = tmp_path / "in", tmp_path / "secret"
    inside.mkdir()
    secret.mkdir()
    (secret / "passwd").write_text("secret")
    (inside / "link").symlink_to(secret)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(inside))
    cache = Cache(tmp_path / "cache")
    before = {folder: files_under(tmp_path / folder) for folder in ("in", "secret")}
    uris = hostile_uris()
    with wandb_server.client(WANDB_ENTITY="team", WANDB_PROJECT="arena"):  # the proxy for all other hosts
        errors = [error_of(uri, "all" if number % 3 == 0 else "specific", cache) for number, uri in enumerate(uris)]
    found = {uri for uri, error in zip(uris, errors, strict=True) if not error}
    for error in errors:
        assert error == "" or error.isprintable(), ascii(error)
        assert "pass@" not in error
    assert (len(uris), len(set(uris))) == (NUM_NAMES, NUM_NAMES)
    # A file that the user may name; all versions of a policy, whatever version stands behind its name.
    assert {uri for uri in found if not uri.startswith("wandb://team/arena/model/policy:")} <= {"/etc/passwd"}
    assert len(found) < 6, found
    assert before == {folder: files_under(tmp_path / folder) for folder in ("in", "secret")}
    assert all(len(path.name) in (64, 69) for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert wandb_server.foreign_hosts == []
    assert s3_server.foreign_hosts == []
    assert {e.host for e in wandb_server.exchanges} <= {wandb_server.url.removeprefix("http://")}
    assert {e.host for e in s3_server.exchanges} <= {s3_server.url.removeprefix("http://")}
    assert not any("secret.safetensors" in e.target for e in s3_server.exchanges if e.method == "GET")
    assert len(wandb_server.exchanges) > 20, "some of them did go to the service"
    assert len(s3_server.exchanges) > 20


def test_hostile_names_from_the_services_stay_names(
    wandb_server: WandbServer,  # noqa: F811
    s3_server: S3Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Files inside artifacts and keys in listings are data: they become neither paths nor URIs."""
    s3 = s3_server.client()
    s3.create_bucket(Bucket="pol")
    s3.put_object(Bucket="pol", Key="run/model_0001.safetensors", Body=policy_bytes(1))
    for key in ("run/..%2f..%2fevil.safetensors", "run/a\\..\\evil.pt", "run/$(touch x).safetensors", "run/\u202e.pt"):
        s3.put_object(Bucket="pol", Key=key, Body=policy_bytes(9))
    cache = Cache(tmp_path / "cache")
    (pinned,) = resolve_all(PolicySource(uri="s3://pol/run/"), seed=0, cache=cache)
    assert pinned.uri == "s3://pol/run/model_0001.safetensors"
    for number, name in enumerate(("../../evil.safetensors", "/abs.safetensors", "a\\..\\evil.pt", "\u202e.pt")):
        wandb_server.add_artifact("team", "arena", f"policy{number}", files={name: policy_bytes(number + 2)})
    with wandb_server.client():
        for number in range(4):
            (pinned,) = resolve_all(PolicySource(uri=f"wandb://team/arena/policy{number}"), seed=0, cache=cache)
            assert pinned.name == f"policy{number}.v0"
    assert len(list((cache.root / "blobs").iterdir())) == 5
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name or "abs" in path.name]


@pytest.mark.parametrize(
    "text",
    [
        "wandb://evil/../arena/policy:v0",
        "s3://pol/../other/secret.safetensors",
        "s3://pol/a/../../other/secret.safetensors",
        "s3://169.254.169.254/latest/meta-data",
    ],
)
def test_sources_check_names_themselves_too(text: str, s3_server: S3Server) -> None:  # noqa: F811
    scheme, _, path = text.partition("://")
    ask = {
        "s3": lambda: s3_objects.fetch(Candidate(name="x", uri=text, num_bytes=1)),
        "wandb": lambda: wandb_artifacts.find(NpcUri(text=text, scheme=scheme, path=path), None),
    }
    with pytest.raises(NpcError):
        ask[scheme]()
    assert s3_server.exchanges == []


@pytest.mark.parametrize(
    ("url", "service", "is_allowed"),
    [
        ("https://storage.example.com/a?sig=1", "https://api.wandb.ai", True),
        ("http://127.0.0.1:9/a", "http://127.0.0.1:8080", True),
        ("http://10.1.2.3/a", "http://10.1.2.4:8080", True),
        ("http://wandb.corp.internal/a", "http://wandb.corp.internal", True),
        ("http://storage.example.com/a", "https://api.wandb.ai", False),
        ("https://169.254.169.254/latest", "https://api.wandb.ai", False),
        ("http://169.254.169.254/latest", "http://127.0.0.1:8080", False),
        ("http://[fe80::1%25eth0]/a", "http://127.0.0.1:8080", False),
        ("https://[::ffff:169.254.169.254]/a", "https://api.wandb.ai", False),
        ("https://127.0.0.1/a", "https://api.wandb.ai", False),
        ("https://2852039166/a", "https://api.wandb.ai", False),
        ("https://0xa9fea9fe/a", "https://api.wandb.ai", False),
        ("https://localhost/a", "https://api.wandb.ai", False),
        ("https://metadata.google.internal/a", "https://api.wandb.ai", False),
        ("https://user:pass@storage.example.com/a", "https://api.wandb.ai", False),
        ("file:///etc/passwd", "https://api.wandb.ai", False),
        ("https:///a", "https://api.wandb.ai", False),
        ("https://[::1/a", "https://api.wandb.ai", False),
    ],
)
def test_download_addresses_lead_only_outside_or_to_the_service(url: str, service: str, is_allowed: bool) -> None:
    if is_allowed:
        http.check_host(url, service)
    else:
        with pytest.raises(NpcError, match=r"the service answered with"):
            http.check_host(url, service)
