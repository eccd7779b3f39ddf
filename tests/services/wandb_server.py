"""A loopback stand-in for the W&B service, for tests with the real `wandb` 0.31 client. No cloud, no account.

    with WandbServer(tmp_path) as server, server.client() as wandb:
        server.add_artifact("team", "arena", "policy", files={"model.safetensors": b"..."}, aliases=["best"])
        artifact = wandb.Api().artifact("team/arena/policy:best", type="model")

Answered (GraphQL, by field, so that any selection and paging of these works):
    queries     viewer, serverInfo.features, entity, project/model (runs, run/bucket, runCount, artifactType(s),
                artifactCollection(s), artifactCollectionMembership, artifact), artifact(id), artifactCollection(id),
                clientIDMapping. That serves Viewer, GetViewer, GetDefaultEntity, ServerFeaturesQuery, Run, Runs,
                RunState, RunResumeStatus, HistoryPage, RunOutputArtifacts, RunInputArtifacts, ArtifactType,
                ArtifactByID, ArtifactMembershipByName, ArtifactMembershipFiles, GetArtifactMembershipFileUrls,
                FetchArtifactManifest, ProjectArtifacts, ProjectArtifactCollection(s), ProjectArtifactType(s),
                ArtifactTypeArtifactCollections, ArtifactCollectionAliases, ArtifactUsedBy, ArtifactCreatedBy.
    mutations   UpsertBucket, CreateRunFiles, MarkRunFilesUploaded, CreateArtifact, CreateArtifactManifest,
                UpdateArtifactManifest, CreateArtifactFiles, CommitArtifact, UpdateArtifact, UseArtifact, AddAliases,
                DeleteAliases, LinkArtifact, DeleteArtifact.
    HTTP        file_stream (history, summary, log lines, end of run), signed GET and PUT of files (`/storage/...`; a
                PUT with a wrong Content-MD5 is refused), the `/artifactsV2/...` download by digest with the API key.
Left out: sweeps, launch, reports, automations, organizations and registries, sampled and parquet history, system
metrics, code saving, reference artifacts, multipart uploads (files over 2 GB), xxhash digests, TTL and tags of
artifacts.
A field or path that is not answered is an error to the client (GraphQL 400, HTTP 404) and stands in `unanswered`.

Like the service: an unknown project or artifact is null (the client's "not found"); a wrong key is 401; what `deny`
names is 403; files are fetched by signed URLs that need no key and stop working after `expire_urls`.

How the client is pointed here, kept clean and bounded: wandb_client.py.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from tests.services.faulty_http import Exchange, FaultyHttpServer, Request, Response
from tests.services.graphql_execution import GraphqlError, UnansweredError, execute
from tests.services.wandb_client import clean_client, client_env, collect_garbage
from tests.services.wandb_mutations import Mutations
from tests.services.wandb_queries import Graph
from tests.services.wandb_store import Run, WandbStore, md5_base64

if TYPE_CHECKING:
    from types import ModuleType

FEATURES = frozenset({"ARTIFACT_COLLECTIONS_FILTERING_SORTING", "ARTIFACT_V2_DOWNLOAD_HANDLER_SUPPORTS_ARTIFACT_ID"})


class WandbServer:
    """The service on a free port of 127.0.0.1, with fresh client folders under `folder`."""

    def __init__(self, folder: Path, *, viewer: str = "team", seed: int = 0) -> None:
        self.store = WandbStore()
        self.viewer = viewer
        self.api_key = hashlib.sha256(f"key {seed} {folder}".encode()).hexdigest()[:40]
        self.url_secret = hashlib.sha256(f"url {seed} {folder}".encode()).hexdigest()[:32]
        self.unanswered: list[str] = []
        self._denied: set[tuple[str, str]] = set()
        self._folder = folder
        self._http = FaultyHttpServer(self._answer)
        self.faults = self._http.faults
        self.faults.reseed(seed)
        self.url = self._http.url

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server; an error inside it, or a request that it could not answer, fails the test here."""
        self._http.close()
        collect_garbage()
        if self._http.errors:
            raise self._http.errors[0]
        if self.unanswered:
            raise AssertionError(f"the W&B stand-in was asked what it does not know: {self.unanswered}")

    # ---- What the client needs ----

    @property
    def env(self) -> dict[str, str]:
        """The client's environment: this server alone, fresh folders, bounded retries."""
        return client_env(self.url, self.api_key, self._folder)

    def client(self, **changes: str) -> AbstractContextManager[ModuleType]:
        """The `wandb` module in this process under `env` and `changes` to it, clean before and after."""
        return clean_client({**self.env, **changes})

    def run_script(self, script: str, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A Python process of its own under `env`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**kept, **self.env},
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    # ---- What tests plant and read ----

    def add_artifact(
        self,
        entity: str,
        project: str,
        name: str,
        *,
        type: str = "model",
        files: Mapping[str, bytes],
        metadata: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
        created_at: str | None = None,
        run: str | None = None,
    ) -> str:
        """Plant a version; returns it as "v0", "v1", ... `run` is the id of the planted run that logged it."""
        with self.store.lock:
            artifact = self.store.new_artifact(
                entity,
                project,
                name,
                type,
                metadata=json.dumps(dict(metadata or {})),
                created_at=created_at,
                run_id=run,
                wanted_aliases=list(aliases),
            )
            for file_name, content in files.items():
                self.store.put_blob(artifact, file_name, content)
                artifact.contents[file_name] = {
                    "digest": md5_base64(content),
                    "size": len(content),
                    "birthArtifactID": artifact.id,
                }
            self.store.write_manifest(artifact)
            self.store.commit(artifact)
            self.store.log(self.store.project(entity, project).runs[run] if run else None, artifact)
            return f"v{artifact.version_index}"

    def add_run(
        self,
        entity: str,
        project: str,
        run_id: str,
        *,
        name: str | None = None,
        state: str = "finished",
        config: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
        created_at: str | None = None,
        tags: Sequence[str] = (),
        history: Sequence[Mapping[str, Any]] = (),
    ) -> Run:
        """Plant a run."""
        fields = {
            "display_name": name,
            "state": state,
            "config": {key: {"value": value} for key, value in (config or {}).items()},
            "summary": dict(summary or {}),
            "created_at": created_at,
            "tags": list(tags),
            "history": [dict(row) for row in history],
        }
        with self.store.lock:
            return self.store.upsert_run(entity, project, run_id, fields)[0]

    def run(self, entity: str, project: str, run_id: str) -> Run:
        """What the service knows about a run."""
        return self.store.projects[entity, project].runs[run_id]

    def aliases(self, entity: str, project: str, name: str) -> dict[str, str]:
        """Alias -> version of a collection."""
        found = self.store.projects[entity, project].collections[name].aliases
        return {alias: f"v{index}" for alias, index in found.items()}

    def add_project(self, entity: str, name: str) -> None:
        """Plant an empty project."""
        with self.store.lock:
            self.store.project(entity, name)

    def deny(self, entity: str, project: str = "*") -> None:
        """From now on this key may neither read nor write that project (`*`: any of the entity)."""
        self._denied.add((entity, project))

    def expire_urls(self) -> None:
        """No signed URL that was given out works any more (403)."""
        self.url_secret = hashlib.sha256(self.url_secret.encode()).hexdigest()[:32]

    @property
    def exchanges(self) -> list[Exchange]:
        """All requests so far."""
        return self._http.exchanges

    @property
    def foreign_hosts(self) -> list[str]:
        """Every host other than this one that a client under `env` tried to reach."""
        return self._http.foreign_hosts

    def count(self, match: str) -> int:
        """How many requests had `match` in `METHOD /path?query operation`."""
        return sum(match in f"{e.method} {e.target} {e.operation}" for e in self.exchanges)

    @property
    def num_bytes_sent(self) -> int:
        """All body bytes that went to clients."""
        return sum(exchange.num_bytes_sent for exchange in self.exchanges)

    # ---- Answers ----

    def _answer(self, request: Request) -> Response:
        head = request.path.strip("/").split("/")[0]
        if head == "storage":
            return self._answer_storage(request)
        if not self._has_key(request):
            errors = [{"message": "user is not logged in", "extensions": {"code": "PERMISSION_ERROR"}}]
            return _json({"errors": errors, "data": None}, status=401)
        with self.store.lock:
            match head:
                case "graphql":
                    return self._answer_graphql(request)
                case "files" if request.path.endswith("/file_stream"):
                    return self._answer_file_stream(request)
                case "artifactsV2" | "artifacts":
                    return self._answer_download_by_digest(request)
        self.unanswered.append(f"{request.method} {request.path}")
        return Response(status=404, body=b"not found")

    def _has_key(self, request: Request) -> bool:
        kind, _, value = request.headers.get("Authorization", "").partition(" ")
        return kind == "Basic" and base64.b64decode(value).decode() == f"api:{self.api_key}"

    def _answer_graphql(self, request: Request) -> Response:
        asked = json.loads(_plain(request))
        graph = Graph(
            store=self.store,
            url_of=self._signed_url,
            viewer=self.viewer,
            features=FEATURES,
            is_denied=lambda entity, project: bool(self._denied & {(entity, project), (entity, "*")}),
        )
        mutations = Mutations(store=self.store, graph=graph, upload_url_of=self._signed_url)
        try:
            data = execute(
                asked["query"],
                asked.get("variables") or {},
                query=graph.query_root(),
                mutation=mutations.mutation_root(),
            )
        except GraphqlError as error:
            if isinstance(error, UnansweredError):
                self.unanswered.append(f"{request.operation}: {error}")
            details = {"message": str(error), "extensions": {"code": error.code}}
            return _json({"errors": [details], "data": None}, status=error.status)
        return _json({"data": data})

    def _signed_url(self, path: str) -> str:
        # HTTP clients resolve `..` in a URL themselves: hostile file names travel encoded twice.
        return f"{self.url}/storage/{quote(path).replace('..', '%252E%252E')}?X-Signature={self.url_secret}"

    def _answer_storage(self, request: Request) -> Response:
        path = unquote(request.path.removeprefix("/storage/")).replace("%2E%2E", "..")
        if request.query.get("X-Signature") != self.url_secret:
            return Response(status=403, body=b"<Error><Code>AccessDenied</Code></Error>")
        if request.method == "PUT":
            expected = request.headers.get("Content-Md5") or request.headers.get("Content-MD5")
            if expected and expected != md5_base64(request.body):
                return Response(status=400, body=b"<Error><Code>BadDigest</Code></Error>")
            self.store.blobs[path] = request.body
            return Response()
        return self._blob(self.store.blobs.get(path), request)

    def _answer_download_by_digest(self, request: Request) -> Response:
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        entity, hex_digest = (parts[2], parts[-2]) if parts[0] == "artifactsV2" else (parts[1], parts[-1])
        digest = base64.b64encode(bytes.fromhex(hex_digest)).decode()
        for artifact in self.store.artifacts.values():
            for name, entry in artifact.contents.items():
                if entity == artifact.entity and entry["digest"] == digest:
                    owner = entry.get("birthArtifactID") or artifact.id
                    return self._blob(self.store.blobs.get(f"{entity}/{artifact.project}/{owner}/{name}"), request)
        return self._blob(None, request)

    @staticmethod
    def _blob(content: bytes | None, request: Request) -> Response:
        if content is None:
            return Response(status=404, body=b"<Error><Code>NoSuchKey</Code></Error>")
        unit, _, span = request.headers.get("Range", "").partition("=")
        if unit != "bytes":
            return Response(body=content, headers={"Accept-Ranges": "bytes"})
        first, _, last = span.partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        if start >= stop:
            return Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        part = f"bytes {start}-{stop - 1}/{len(content)}"
        return Response(status=206, body=content[start:stop], headers={"Content-Range": part})

    def _answer_file_stream(self, request: Request) -> Response:
        entity, project, run_id = (unquote(part) for part in request.path.split("/")[2:5])
        sent = json.loads(_plain(request))
        run, _ = self.store.upsert_run(entity, project, run_id, {})
        for name, chunk in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
            elif name == "output.log":
                run.output[chunk["offset"] :] = chunk["content"]
        if sent.get("complete"):
            run.state = "finished" if not sent.get("exitcode") else "failed"
        return _json({"exitcode": None, "limits": {}})


def _plain(request: Request) -> bytes:
    if request.headers.get("Content-Encoding") == "gzip":
        return gzip.decompress(request.body)
    return request.body


def _json(answer: Mapping[str, Any], status: int = 200) -> Response:
    return Response(status=status, body=json.dumps(answer).encode(), headers={"Content-Type": "application/json"})
