"""Twenty planted secrets, and every place where one might turn up: logs, errors, lock file, metadata, cache names.

The secrets are real ones to the clients: keys and tokens that they sign and log in with, signed URLs that the services
hand out, and careless words in artifacts' metadata. The resolver runs at log level DEBUG, with success and with faults.
"""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.errors import DualPolicyError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.lock import lock_entries, write_lock
from dual_policy_plugin.npc.resolver import PinnedPolicy, read_verified, resolve_all
from dual_policy_plugin.npc.sources import http
from dual_policy_plugin.npc.sources.http import Retries
from tests.npc.policies import policy_bytes
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

SIGNED = "https://bucket.s3.amazonaws.com/key?X-Amz-Credential={}&X-Amz-Signature={}"


def canary(number: int) -> str:
    return f"canary{number:02}" + "0123456789abcdef" * 2


CANARIES = [canary(number) for number in range(20)]
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": canary(0),
    "AWS_SECRET_ACCESS_KEY": canary(1),
    "AWS_SESSION_TOKEN": canary(2),
    "WANDB_IDENTITY_TOKEN_NOTE": canary(3),
    "HF_TOKEN": canary(4),
}
CARELESS = {
    "api_key": canary(7),
    "wandb_api_key": canary(8),
    "aws": {"secret_access_key": canary(9), "session_token": canary(10)},
    "password": canary(11),
    "data_url": SIGNED.format(canary(12), canary(13)),
    "endpoint": f"https://user:{canary(14)}@storage.example.com/",
    "download": f"https://example.com/a?token={canary(15)}",
    "Authorization": f"Bearer {canary(16)}",
}
HOSTILE_URIS = (
    f"s3://user:{canary(17)}@pol/a.safetensors",
    f"wandb://{canary(18)}@team/arena/policy:v0",
    SIGNED.format(canary(19), canary(19)),
    f"s3://pol/a.safetensors?X-Amz-Signature={canary(19)}",
)


@pytest.fixture
def log_text() -> Any:
    """Gives all that any logger said, at DEBUG."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream.getvalue
    root.removeHandler(handler)
    root.setLevel(level)


def attempt(act: Callable[[], Any], texts: list[str]) -> Any:
    """What `act` gives; an error is kept as the user would see it, its traceback too."""
    try:
        return act()
    except DualPolicyError as error:
        texts.append(str(error))
        texts.append("".join(traceback.format_exception(error)))
    return None


def test_no_planted_secret_turns_up_anywhere(
    wandb_server: WandbServer,  # noqa: F811
    s3_server: S3Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_text: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(http, "RETRIES", Retries(attempts=2, first_wait_s=0.001, max_wait_s=0.001))
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    wandb_server.api_key, wandb_server.url_secret = canary(5) + "00", canary(6)  # a W&B key has 40 characters
    data = policy_bytes(1, **{"win": 0.5}, note=CARELESS["data_url"], secret=canary(7))
    wandb_server.add_artifact(
        "team", "arena", "policy", files={"model.safetensors": data}, metadata={"epoch": 1, **CARELESS}
    )
    wandb_server.add_run("team", "arena", "run1", summary={"win": 0.5, **CARELESS})
    wandb_server.add_artifact("team", "arena", "of_run", files={"model.safetensors": data}, run="run1")
    s3 = s3_server.client()
    s3.create_bucket(Bucket="pol")
    s3.put_object(Bucket="pol", Key="a.safetensors", Body=data)
    cache, lock = Cache(tmp_path / "cache"), tmp_path / "npc.lock.json"
    texts: list[str] = []
    pinned: list[PinnedPolicy] = []
    sources = [
        PolicySource(uri="wandb://team/arena/policy:v0"),
        PolicySource(uri="wandb://team/arena/policy", type="top", metric="epoch"),
        PolicySource(uri="wandb://team/arena", type="latest"),
        PolicySource(uri="s3://pol/a.safetensors"),
    ]
    with wandb_server.client():
        for source in sources:
            (found,) = resolve_all(source, seed=0, cache=cache)
            assert read_verified(found, cache=cache) == data
            pinned.append(found)
        for match in ("GET /storage", "GET /pol", "Artifact"):
            for kind in ("reset", "status:403", "status:503", "truncate", "bitflip"):
                if (match, kind) == ("Artifact", "bitflip"):
                    continue  # crashes the client's service process
                if match == "Artifact" and kind in ("reset", "status:503"):
                    continue  # the client waits for seconds; `truncate` takes the same way
                for server in (wandb_server, s3_server):
                    server.faults.add(match, kind, times=None)
                for source in (sources[0], sources[3]):
                    fresh = Cache(tmp_path / "fresh" / f"{match.replace('/', '')}{kind.partition(':')[0]}")
                    attempt(lambda s=source, c=fresh: resolve_all(s, seed=0, cache=c), texts)
                for server in (wandb_server, s3_server):
                    server.faults.clear()
        for uri in HOSTILE_URIS:
            attempt(lambda u=uri: resolve_all(PolicySource(uri=u), seed=0, cache=cache), texts)
        wandb_server.api_key = "0" * 40  # now the client's key is a wrong one
        import wandb

        wandb.teardown()
        attempt(lambda: resolve_all(sources[0], seed=0, cache=cache), texts)
    unique = {one.uri: one for one in pinned}
    write_lock(lock, lock_entries(unique.values(), "2026-01-01T00:00:00Z"))
    captured = capfd.readouterr()
    kept = {
        "log": log_text(),
        "errors": "\n".join(texts),
        "output": captured.out + captured.err,
        "lock": lock.read_text(),
        "metadata": repr(pinned),
        "cache names": "\n".join(str(path) for path in tmp_path.rglob("*") if "wandb" not in path.parts),
        "cache index": "\n".join(path.read_text() for path in (tmp_path / "cache" / "index").iterdir()),
        "client's logs": "\n".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.log")),
    }
    assert len(texts) >= 20, "of each error its line and its traceback"
    assert len(set(CANARIES)) == 20
    assert {"epoch": 1, "win": 0.5}.items() <= {**pinned[0].metadata, **pinned[2].metadata}.items()
    leaks = [(place, secret[:8]) for place, text in kept.items() for secret in CANARIES if secret in text]
    assert leaks == []
    assert "urllib3" in kept["log"], "the clients did log"
    assert canary(6) in "".join(exchange.target for exchange in wandb_server.exchanges), "and the secrets did travel"
    assert any(canary(2) in str(exchange.headers) for exchange in s3_server.exchanges)
