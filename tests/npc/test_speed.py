"""How much resolving costs, on loopback: bytes that are moved, and seconds beyond reading and hashing."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.resolver import read_verified, resolve, resolve_all
from tests.npc.policies import policy_bytes
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

NUM_CHECKPOINTS = 500


@pytest.mark.slow
def test_top_of_500_checkpoints_in_s3_moves_under_5_mb_in_under_5_s(s3_server: S3Server, tmp_path: Path) -> None:  # noqa: F811
    s3 = s3_server.client()
    s3.create_bucket(Bucket="pol")
    scores = {epoch: epoch * 37 % NUM_CHECKPOINTS / NUM_CHECKPOINTS for epoch in range(NUM_CHECKPOINTS)}
    for epoch, score in scores.items():
        body = policy_bytes(epoch, size=100_000, **{"dual_policy/win_rate": score})
        s3.put_object(Bucket="pol", Key=f"run/checkpoints/model_{epoch:04}.safetensors", Body=body)
    source = PolicySource(uri="s3://pol/run/", type="top", metric="dual_policy/win_rate", range=3)
    took_s = float("inf")
    for number in range(3):  # again only if other processes were in the way
        before, begin = s3_server.num_bytes_sent, time.perf_counter()
        pinned = resolve_all(source, seed=0, cache=Cache(tmp_path / f"cache{number}"))
        took_s, moved = min(took_s, time.perf_counter() - begin), s3_server.num_bytes_sent - before
        if took_s < 5:
            break
    print(f"top of {NUM_CHECKPOINTS}: {took_s:.2f} s, {moved / 1e6:.2f} MB")
    best = sorted(scores, key=lambda epoch: -scores[epoch])[:3]
    assert [one.metadata["epoch"] for one in pinned] == best
    assert moved < 5e6, f"{moved / 1e6:.2f} MB"
    assert took_s < 5, f"{took_s:.2f} s"


@pytest.mark.parametrize("scheme", ["s3", "wandb"])
def test_a_warm_100_mb_checkpoint_costs_little_more_than_reading_and_hashing_it(
    scheme: str,
    s3_server: S3Server,  # noqa: F811
    wandb_server: WandbServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = policy_bytes(1, size=100_000_000)
    cache = Cache(tmp_path / "cache")
    if scheme == "s3":
        s3_server.client().create_bucket(Bucket="pol")
        s3_server.client().put_object(Bucket="pol", Key="big.safetensors", Body=data)
        uri, server, is_body = "s3://pol/big.safetensors", s3_server, "GET /pol/big"
    else:
        wandb_server.add_artifact("team", "arena", "policy", files={"model.safetensors": data})
        uri, server, is_body = "wandb://team/arena/policy:v0", wandb_server, "GET /storage"
    with wandb_server.client():
        cold = resolve(uri, cache=cache)
        assert read_verified(cold, cache=cache) == data
        num_bodies, sent = server.count(is_body), server.num_bytes_sent
        plain_s = warm_s = float("inf")
        for _ in range(3):  # the best of three: other processes share the machine
            begin = time.perf_counter()
            assert hashlib.sha256(cache.path(cold.sha256).read_bytes()).hexdigest() == cold.sha256
            plain_s = min(plain_s, time.perf_counter() - begin)
            begin = time.perf_counter()
            warm = resolve(uri, cache=cache)
            again = read_verified(warm, cache=cache)
            warm_s = min(warm_s, time.perf_counter() - begin)
            assert again == data
            del again
    assert warm == cold
    assert server.num_bytes_sent - sent < 60_000, "the policy itself came from the cache"
    assert server.count(is_body) - num_bodies <= 3, "at most the headers"
    print(f"{scheme}: warm {warm_s:.3f} s, reading and hashing {plain_s:.3f} s")
    assert warm_s - plain_s < 0.5, f"{warm_s:.2f} s, reading and hashing alone {plain_s:.2f} s"
