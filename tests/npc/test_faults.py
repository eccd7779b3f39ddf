"""Injected faults on the wire to S3 and W&B: right bytes or a clear error, never others, and always an end.

`DUAL_POLICY_TEST_FAULTS=1000` injects a thousand instead of the suite's hundred.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.errors import NpcError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.resolver import read_verified, resolve_all
from dual_policy_plugin.npc.sources import http
from dual_policy_plugin.npc.sources.http import Retries, Transient, with_retries
from tests.npc.policies import policy_bytes
from tests.services.faults import Faults
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

NUM_FAULTS = int(os.environ.get("DUAL_POLICY_TEST_FAULTS", "100"))
ATTEMPTS = 4
KINDS = (
    "status:500",
    "status:503",
    "status:409",
    "status:412",
    "status:429",
    "reset",
    "lost",
    "truncate",
    "wrong_length",
    "bitflip",
    "slow:0.02",
    "stall:0.02",
    "stall:0.4",
    "redirect:http://169.254.169.254/latest/meta-data",
)
PERMANENT = re.compile(
    r"another object stands there|not found|no such object|no checkpoint under|no access|header was misread"
    r"|answered 302|score"
)


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRIES", Retries(attempts=ATTEMPTS, first_wait_s=0.002, max_wait_s=0.01))
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.25)


def under_faults(
    faults: Faults,
    num: int,
    kinds: tuple[str, ...],
    targets: tuple[str, ...],
    act: Callable[[random.Random, str], None],
) -> Counter[str]:
    """Acts under faults until `num` of them fired; counts the outcomes.

    Args:
        act: draws what to ask for, is told the fault, and compares what it got; an NpcError is a refusal.
    """
    draw = random.Random(3)
    outcomes: Counter[str] = Counter()
    start = len(faults.fired)
    while len(faults.fired) - start < num:
        kind, times = draw.choice(kinds), draw.choice((1, 1, 2, 3, None))
        faults.reseed(draw.randrange(1 << 30))
        faults.add(draw.choice(targets), kind, times=times, after=draw.choice((0, 0, 1)))
        begin = time.monotonic()
        try:
            act(draw, kind)
            outcomes["right"] += 1
        except NpcError as error:
            text = str(error)
            assert "\n" not in text
            assert f"gave up after {ATTEMPTS} attempts" in text or PERMANENT.search(text), text
            outcomes["refused"] += 1
            assert times is None or times >= 2 or kind.startswith(("status:412", "bitflip", "redirect")), (
                f"{kind} x {times}: {text}"
            )
        assert time.monotonic() - begin < 20
        faults.clear()
    return outcomes


def test_faults_on_s3_give_right_bytes_or_a_clear_end(s3_server: S3Server, tmp_path: Path) -> None:  # noqa: F811
    s3 = s3_server.client()
    s3.create_bucket(Bucket="pol")
    right = {i: policy_bytes(i, size=3000 + i, score=(i * 3 % 5) / 8) for i in range(5)}
    for i, data in right.items():
        s3.put_object(Bucket="pol", Key=f"run/checkpoints/model_{i:04}.safetensors", Body=data)
    num_caches = iter(range(1 << 30))

    def act(draw: random.Random, kind: str) -> None:
        wanted, source = draw.choice(
            [
                (4, PolicySource(uri="s3://pol/run/")),
                (2, PolicySource(uri="s3://pol/run/checkpoints/model_0002.safetensors")),
                (3, PolicySource(uri="s3://pol/run/", type="top", metric="score")),
            ]
        )
        cache = Cache(tmp_path / f"cache{next(num_caches)}")
        before = len(s3_server.exchanges)
        try:
            (pinned,) = resolve_all(source, seed=0, cache=cache)
            if kind == "bitflip" and source.type == "top":  # plain HTTP vouches for no figure in a header
                wanted = pinned.metadata["epoch"]
            assert read_verified(pinned, cache=cache) == right[wanted]
        finally:
            assert len(s3_server.exchanges) - before <= ATTEMPTS * 14
        assert {path.read_bytes() for path in (cache.root / "blobs").iterdir()} == {right[wanted]}

    outcomes = under_faults(
        s3_server.faults, NUM_FAULTS * 3 // 4, KINDS, ("GET /pol/run", "GET /pol?", "GET /pol"), act
    )
    assert outcomes["right"] >= 10
    assert outcomes["refused"] >= 5
    assert {kind for kind, _ in s3_server.faults.fired} == {kind.partition(":")[0] for kind in KINDS}
    assert s3_server.foreign_hosts == []


def test_faults_on_w_and_b_files_give_right_bytes_or_a_clear_end(
    wandb_server: WandbServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    right = {i: policy_bytes(i, size=3000 + i) for i in range(3)}
    for i, data in right.items():
        wandb_server.add_artifact("team", "arena", "policy", files={"model.safetensors": data}, metadata={"epoch": i})
    num_caches = iter(range(1 << 30))

    def act(draw: random.Random, kind: str) -> None:
        wanted = draw.randrange(3)
        cache = Cache(tmp_path / f"cache{next(num_caches)}")
        before = wandb_server.count("GET /storage")
        try:
            (pinned,) = resolve_all(PolicySource(uri=f"wandb://team/arena/policy:v{wanted}"), seed=0, cache=cache)
            assert read_verified(pinned, cache=cache) == right[wanted]
        finally:
            assert wandb_server.count("GET /storage") - before <= ATTEMPTS
        assert {path.read_bytes() for path in (cache.root / "blobs").iterdir()} == {right[wanted]}

    with wandb_server.client():
        outcomes = under_faults(wandb_server.faults, NUM_FAULTS // 4, KINDS, ("GET /storage",), act)
    assert outcomes["right"] >= 5
    assert outcomes["refused"] >= 2
    assert wandb_server.foreign_hosts == []


def test_faults_on_w_and_b_answers_end_with_the_documented_line(
    wandb_server: WandbServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Flipped bits are left out: they crash the client's service process, which is the next test."""
    data = policy_bytes(1)
    wandb_server.add_artifact("team", "arena", "policy", files={"model.safetensors": data})
    source = PolicySource(uri="wandb://team/arena/policy:v0")
    num_fired = 0
    with wandb_server.client():
        for number, kind in enumerate(("status:409", "truncate", "wrong_length", "slow:0.02", "status:503")):
            for target in ("ArtifactMembershipByName", "ArtifactMembershipFiles")[: 1 if kind == "status:503" else 2]:
                wandb_server.faults.add(target, kind)
                cache = Cache(tmp_path / f"cache{number}{target}")
                (pinned,) = resolve_all(source, seed=0, cache=cache)
                assert read_verified(pinned, cache=cache) == data
                num_fired += 1
        wandb_server.faults.add("ArtifactMembershipByName", "truncate", times=None)
        with pytest.raises(
            NpcError,
            match=r"^Could not load NPC policy from WandB artifact team/arena/policy:v0: no network, .* gave up",
        ):
            resolve_all(source, seed=0, cache=Cache(tmp_path / "none"))
    assert len(wandb_server.faults.fired) == num_fired + ATTEMPTS


SCRIPT = """
import sys
from pathlib import Path
from dual_policy_plugin.errors import NpcError
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.npc.cache import Cache
try:
    resolve("wandb://team/arena/policy:v0", cache=Cache(Path(sys.argv[1])))
except NpcError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_flipped_bit_in_an_answer_of_w_and_b_ends_clearly_too(
    wandb_server: WandbServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = policy_bytes(1)
    wandb_server.add_artifact("team", "arena", "policy", files={"model.safetensors": data})
    wandb_server.faults.add("ArtifactMembership", "bitflip", times=None)
    done = wandb_server.run_script(SCRIPT, str(tmp_path / "cache"))
    assert "Traceback" not in done.stderr, done.stderr
    blobs = tmp_path / "cache" / "blobs"
    if done.stdout:
        line = r"Could not load NPC policy from WandB artifact team/arena/(model/)?policy:v0: .*; gave up after \d .*\n"
        assert re.fullmatch(line, done.stdout)
        assert not blobs.exists()
    else:
        assert {path.read_bytes() for path in blobs.iterdir()} == {data}


def test_waits_grow_are_drawn_and_are_bounded() -> None:
    retries = Retries(attempts=6, first_wait_s=0.2, max_wait_s=1.0)
    waits = [[retries.wait_s(attempt) for _ in range(200)] for attempt in range(5)]
    for attempt, drawn in enumerate(waits):
        most = min(1.0, 0.2 * 2**attempt)
        assert most / 2 <= min(drawn) < 0.6 * most
        assert 0.9 * most < max(drawn) <= most
    assert http.RETRIES.attempts == ATTEMPTS


def test_jitter_leaves_the_global_generator_alone() -> None:
    random.seed(5)
    before = random.getstate()
    calls = []

    def once() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise Transient("not yet")
        return 7

    assert (with_retries(once, "x"), len(calls)) == (7, 3)
    assert random.getstate() == before
    calls.clear()

    def never() -> Any:
        calls.append(1)
        raise Transient("no luck")

    with pytest.raises(NpcError, match=r"^x: no luck; gave up after 4 attempts, try again later$"):
        with_retries(never, "x")
    assert len(calls) == 4
