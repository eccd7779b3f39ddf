"""Policies in W&B: versions, aliases, runs and bytes, with the real `wandb` client against a loopback service."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_policy_plugin.config import PolicySource
from dual_policy_plugin.errors import NpcError, NpcNotFoundError
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.resolver import read_verified, resolve_all
from dual_policy_plugin.npc.sources import http
from dual_policy_plugin.npc.sources.http import Retries
from dual_policy_plugin.npc.sources.wandb_artifacts import collection, fetch, find
from dual_policy_plugin.npc.uri import parse_uri
from tests.services.fixtures import wandb_server  # noqa: F401
from tests.services.wandb_server import WandbServer

FAILED = "^Could not load NPC policy from WandB artifact "


def weights(number: int) -> bytes:
    return bytes((i * 31 + number) % 256 for i in range(5000 + number))


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRIES", Retries(attempts=3, first_wait_s=0.01, max_wait_s=0.02))


@pytest.fixture
def service(wandb_server: WandbServer) -> Iterator[WandbServer]:  # noqa: F811
    """A service with three versions of a policy, under whose environment this process's client is."""
    for index in range(3):
        wandb_server.add_artifact(
            "team",
            "arena",
            "policy",
            files={"model.safetensors": weights(index), "notes.txt": b"same"},
            metadata={"epoch": index * 10, "metrics": {"dual_policy/win_rate": index / 4}},
            aliases=["best"] if index == 1 else [],
            created_at=f"2026-01-0{index + 1}T00:00:00",
        )
    with wandb_server.client(WANDB_ENTITY="team", WANDB_PROJECT="arena"):
        yield wandb_server


def found(text: str) -> Candidate:
    return find(parse_uri(text), None)


def all_of(text: str) -> list[Candidate]:
    return collection(parse_uri(text), None)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("wandb://team/arena/model/policy:v0", 0),
        ("wandb://team/arena/policy:best", 1),
        ("wandb://team/arena/policy:latest", 2),
        ("wandb://team/arena/model/policy", 2),
    ],
)
def test_versions_aliases_and_none_are_pinned_to_a_number(service: WandbServer, text: str, version: int) -> None:
    candidate = found(text)
    assert candidate.uri == f"wandb://team/arena/model/policy:v{version}"
    assert (candidate.name, candidate.version) == (f"policy.v{version}", version)
    assert (candidate.num_bytes, candidate.created) == (5000 + version, f"2026-01-0{version + 1}T00:00:00Z")
    assert dict(candidate.metadata) == {"epoch": version * 10, "dual_policy/win_rate": version / 4}
    assert candidate.etag == hashlib.md5(weights(version), usedforsecurity=False).hexdigest()
    assert service.count("GET /storage") == 0, "nothing is downloaded to choose"
    assert fetch(candidate) == weights(version)
    assert service.count("GET /storage") == 1
    assert not list(Path(service.env["WANDB_CACHE_DIR"]).rglob("obj/**/*"))


def test_all_versions_are_listed_with_what_selectors_read(service: WandbServer) -> None:
    candidates = sorted(all_of("wandb://team/arena/policy:latest"), key=lambda c: c.version or 0)
    assert [c.uri for c in candidates] == [f"wandb://team/arena/model/policy:v{i}" for i in range(3)]
    assert [c.metadata["dual_policy/win_rate"] for c in candidates] == [0.0, 0.25, 0.5]
    assert [c.num_bytes for c in candidates] == [0, 0, 0], "of several files the sum says nothing"
    assert fetch(candidates[1]) == weights(1)


def test_a_link_is_pinned_to_what_it_links(service: WandbServer) -> None:
    import wandb

    wandb.Api().artifact("team/arena/policy:v1").link("team/shelf/chosen", aliases=["prod"])
    assert found("wandb://team/shelf/chosen:prod").uri == "wandb://team/arena/model/policy:v1"


def test_a_run_means_the_newest_model_that_it_logged(service: WandbServer) -> None:
    service.add_run("team", "arena", "id1", name="first_run")
    for index in range(11):
        service.add_artifact(
            "team", "arena", "first_policy", files={"model.pt": weights(index)}, run="id1", aliases=[f"epoch-{index}"]
        )
    service.add_artifact("team", "arena", "history", type="table", files={"h.json": b"{}"}, run="id1")
    assert found("wandb://run/first_run").uri == "wandb://team/arena/model/first_policy:v10"
    assert found("wandb://run/id1:latest").uri == "wandb://team/arena/model/first_policy:v10"
    assert found("wandb://run/first_run:v9").uri == "wandb://team/arena/model/first_policy:v9"
    assert found("wandb://run/first_run:epoch-3").num_bytes == 5003
    assert len(all_of("wandb://run/first_run")) == 11
    with pytest.raises(NpcNotFoundError, match=FAILED + r"run/first_run:v99: not found, the run .* logged no v99, but"):
        found("wandb://run/first_run:v99")
    with pytest.raises(
        NpcNotFoundError, match=FAILED + r"run/none: not found, there is no run team/arena/none; .*runs"
    ):
        found("wandb://run/none")
    service.add_run("team", "arena", "id2", name="first_run")
    with pytest.raises(NpcError, match=r"2 runs are named team/arena/first_run; use the id of one: id\d, id\d"):
        found("wandb://run/first_run")
    assert found("wandb://run/id1").version == 10, "an id is one run"


@pytest.mark.parametrize("version", ["v0", "best"])
def test_a_version_beside_a_selector_is_not_ignored(service: WandbServer, version: str) -> None:
    with pytest.raises(NpcError, match=f"policy:{version} names the version {version}, .*leave out either :{version}"):
        all_of(f"wandb://team/arena/model/policy:{version}")


def test_a_job_of_a_sweep_is_found_by_its_runs_name(service: WandbServer) -> None:
    service.add_run("team", "arena", "id3", name="sweep/3")
    service.add_artifact("team", "arena", "sweep-3", files={"model.safetensors": weights(7)}, run="id3")
    service.add_artifact("sweep", "3", "model", files={"model.safetensors": weights(8)})
    candidate = found("wandb://run/sweep/3")
    assert (candidate.uri, candidate.num_bytes) == ("wandb://team/arena/model/sweep-3:v0", 5007)
    assert [c.uri for c in all_of("wandb://run/sweep/3")] == [candidate.uri]


def test_bytes_of_another_server_or_a_recreated_version_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for server, source in (
        (1, PolicySource(uri="wandb://team/arena/model/policy", type="latest")),
        (2, PolicySource(uri="wandb://team/arena/model/policy", type="latest")),
        (3, PolicySource(uri="wandb://team/arena/model/policy", type="all")),
        (4, PolicySource(uri="wandb://team/arena/policy:v0")),
        (5, PolicySource(uri="wandb://team/arena", type="latest")),
    ):
        data = bytes([server]) * 1000  # one name, one version, one size: only the bytes differ
        (tmp_path / str(server)).mkdir()
        with WandbServer(tmp_path / str(server)) as service:
            service.add_run("team", "arena", "id1", name="first_run", state="finished")
            service.add_artifact("team", "arena", "policy", files={"model.safetensors": data}, run="id1")
            with service.client():
                for _ in range(2):
                    (pinned,) = resolve_all(source, seed=0, cache=cache)
                    assert pinned.uri == "wandb://team/arena/model/policy:v0"
                    assert pinned.sha256 == hashlib.sha256(data).hexdigest()
                    assert read_verified(pinned, cache=cache) == data
            assert service.count("GET /storage") == 1, "what is here is not fetched twice"


def test_a_project_gives_the_newest_model_of_each_finished_run_with_its_summary(service: WandbServer) -> None:
    for index, state in enumerate(("finished", "crashed", "finished", "finished")):
        service.add_run("team", "lab", f"r{index}", name=f"run {index}", state=state, summary={"score": index / 8})
        for version in range(2 if index < 3 else 0):
            service.add_artifact(
                "team",
                "lab",
                f"p{index}",
                files={"model.safetensors": weights(version)},
                metadata={"epoch": version},
                run=f"r{index}",
            )
    candidates = all_of("wandb://team/lab")
    assert {c.uri: (c.metadata["run"], c.metadata["score"], c.metadata["epoch"], c.num_bytes) for c in candidates} == {
        "wandb://team/lab/model/p0:v1": ("run 0", 0.0, 1, 5001),
        "wandb://team/lab/model/p2:v1": ("run 2", 0.25, 1, 5001),
    }
    assert {c.name for c in candidates} == {"run_0.p0.v1", "run_2.p2.v1"}
    with pytest.raises(
        NpcError, match=r"names a project; name an artifact in it .* or choose among its runs with type="
    ):
        found("wandb://team/lab")


def test_what_cannot_be_had_is_said_which_why_and_where_to_look(service: WandbServer) -> None:
    service.add_project("team", "empty")
    service.add_artifact("secret", "hidden", "policy", files={"model.safetensors": b"x"})
    service.deny("secret")
    service.add_artifact("team", "arena", "texts", files={"a.txt": b"", "b.md": b""})
    service.add_artifact("team", "arena", "two", files={"a.safetensors": b"", "b.safetensors": b""})
    not_found = "not found; `dual-policy runs` lists what there is$"
    for name in ("team/arena/model/policy:v9", "team/arena/policy:prod", "team/arena/nope", "team/none/policy:v0"):
        with pytest.raises(NpcNotFoundError, match=f"{FAILED}{name}: {not_found}"):
            found(f"wandb://{name}")
        name = name.partition(":")[0]
        if name != "team/arena/model/policy" and name != "team/arena/policy":
            with pytest.raises(NpcNotFoundError, match=f"{FAILED}{name}: {not_found}"):
                all_of(f"wandb://{name}")
    with pytest.raises(NpcNotFoundError, match=f"{FAILED}team/arena/table/policy:v0: {not_found}"):
        found("wandb://team/arena/table/policy:v0")
    for ask, uri in ((found, "secret/hidden/policy:v0"), (all_of, "secret/hidden/policy")):
        with pytest.raises(NpcError, match=f"{FAILED}{uri}: no access, this W&B login may not read"):
            ask(f"wandb://{uri}")
    with pytest.raises(NpcError, match=f"{FAILED}secret/hidden: no access"):
        all_of("wandb://secret/hidden")
    with pytest.raises(NpcNotFoundError, match=f"{FAILED}team/empty: not found, no model is there yet"):
        all_of("wandb://team/empty")
    with pytest.raises(NpcNotFoundError, match=r"it holds no .safetensors or .pt file, but a.txt, b.md"):
        found("wandb://team/arena/texts")
    with pytest.raises(NpcNotFoundError, match=r"several .safetensors files \(a.safetensors, b.safetensors\)"):
        found("wandb://team/arena/two")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"WANDB_API_KEY": ""}, "no access, W&B has no login here; run `wandb login`$"),
        ({"WANDB_API_KEY": "0" * 40}, "no access, W&B refuses the login; run `wandb login`$"),
        ({"WANDB_API_KEY": "short"}, "no access, W&B refuses the login; run `wandb login`$"),
        (
            {"WANDB_BASE_URL": "http://127.0.0.1:1"},
            r"no network, W&B cannot be reached \(.*\); gave up after 3 attempts",
        ),
    ],
)
def test_no_login_a_wrong_one_and_no_network(
    wandb_server: WandbServer,  # noqa: F811
    changes: dict[str, str],
    why: str,
) -> None:
    with wandb_server.client(**changes), pytest.raises(NpcError, match=f"{FAILED}team/arena/policy:v0: {why}"):
        found("wandb://team/arena/policy:v0")


def test_the_default_project_must_be_known(wandb_server: WandbServer) -> None:  # noqa: F811
    with wandb_server.client(), pytest.raises(NpcError, match="name no project; set WANDB_ENTITY and WANDB_PROJECT"):
        found("wandb://run/first_run")


def test_the_clients_own_settings_are_as_before(service: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    settings = wandb.setup().settings
    settings.x_graphql_retry_max = None
    found("wandb://team/arena/policy:v0")
    assert settings.x_graphql_retry_max is None
    assert settings.x_graphql_retry_wait_min_seconds == 1
