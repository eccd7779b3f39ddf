"""What the W&B stand-in remembers: projects with their runs, artifact collections, versions, aliases and file bytes.

Plain data and the rules of the real service on it: versions v0, v1, ... in the order of committing, `latest` on the
newest one, an alias on one version of a collection at a time, same digest as the newest version = no new version.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.services.graphql_execution import GraphqlError


@dataclass(kw_only=True, slots=True)
class Artifact:
    """One version; `contents` is the manifest's map from file name to digest, size and place of birth."""

    id: str
    entity: str
    project: str
    collection: str
    type: str
    description: str | None = None
    metadata: str = "{}"
    digest: str = ""
    state: str = "PENDING"
    created_at: str = ""
    client_id: str = ""
    run_id: str | None = None
    version_index: int | None = None
    wanted_aliases: list[str] = field(default_factory=list)
    manifest_path: str = ""
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Sum of the files' sizes."""
        return sum(entry.get("size", 0) for entry in self.contents.values())


@dataclass(kw_only=True, slots=True)
class Collection:
    """A named sequence of versions (`is_portfolio`: of links to versions of other collections)."""

    id: str
    entity: str
    project: str
    name: str
    type: str
    is_portfolio: bool = False
    created_at: str = ""
    members: dict[int, Artifact] = field(default_factory=dict)  # version index -> artifact
    aliases: dict[str, int] = field(default_factory=dict)  # alias -> version index
    num_ever: int = 0

    def add(self, artifact: Artifact) -> int:
        """The version index under which the artifact is now the newest member."""
        index = self.num_ever
        self.num_ever += 1
        self.members[index] = artifact
        self.aliases["latest"] = index
        return index

    def find(self, alias: str) -> tuple[int, Artifact] | None:
        """The member that carries an alias or is that version."""
        index = self.aliases.get(alias)
        if index is None and alias.startswith("v") and alias[1:].isdigit():
            index = int(alias[1:])
        return (index, self.members[index]) if index in self.members else None

    def aliases_of(self, index: int) -> list[str]:
        """The aliases that a member carries, sorted."""
        return sorted(alias for alias, at in self.aliases.items() if at == index)


@dataclass(kw_only=True, slots=True)
class Run:
    """One run; `config` as the service keeps it: key -> {"value": ...}."""

    id: str
    run_id: str
    display_name: str
    entity: str
    project: str
    state: str = "running"
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    created_at: str = ""
    heartbeat_at: str = ""
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    description: str | None = None
    commit: str | None = None
    tags: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)  # artifact ids
    used: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Project:
    """A project and all that is in it."""

    id: str
    entity: str
    name: str
    created_at: str
    runs: dict[str, Run] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)


class WandbStore:
    """Everything, under one lock that the server holds while it answers."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.projects: dict[tuple[str, str], Project] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.blobs: dict[str, bytes] = {}  # storage path -> bytes
        self._ids = itertools.count(1)
        self._clock = itertools.count()

    def new_id(self, kind: str) -> str:
        """An id as the service makes them: base64 of `Kind:number`."""
        return base64.b64encode(f"{kind}:{next(self._ids)}".encode()).decode()

    def now(self) -> str:
        """A time of creation; a second later at every call, so that order is never a matter of luck."""
        return datetime.fromtimestamp(1_780_000_000 + next(self._clock), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def project(self, entity: str, name: str) -> Project:
        """The project, made where there is none."""
        if (entity, name) not in self.projects:
            self.projects[entity, name] = Project(
                id=self.new_id("Project"), entity=entity, name=name, created_at=self.now()
            )
        return self.projects[entity, name]

    def collection(self, entity: str, project: str, name: str, type: str, *, is_portfolio: bool = False) -> Collection:
        """The collection, made where there is none; another type than it has is refused."""
        collections = self.project(entity, project).collections
        if name not in collections:
            collections[name] = Collection(
                id=self.new_id("ArtifactCollection"),
                entity=entity,
                project=project,
                name=name,
                type=type,
                is_portfolio=is_portfolio,
                created_at=self.now(),
            )
        if collections[name].type != type:
            raise GraphqlError(
                f"artifact collection {name!r} already exists with type {collections[name].type!r}", status=409
            )
        return collections[name]

    def find_run(self, storage_id: str) -> Run | None:
        """The run with that storage id."""
        return next((r for p in self.projects.values() for r in p.runs.values() if r.id == storage_id), None)

    def find_collection(self, collection_id: str) -> Collection | None:
        """The collection with that id."""
        collections = (c for p in self.projects.values() for c in p.collections.values())
        return next((c for c in collections if c.id == collection_id), None)

    def source_collection(self, artifact: Artifact) -> Collection:
        """The sequence that the artifact was logged to."""
        return self.projects[artifact.entity, artifact.project].collections[artifact.collection]

    def put_blob(self, artifact: Artifact, name: str, content: bytes) -> str:
        """Store a file of an artifact; returns its storage path."""
        path = f"{artifact.entity}/{artifact.project}/{artifact.id}/{name}"
        self.blobs[path] = content
        return path

    def write_manifest(self, artifact: Artifact) -> None:
        """Make the manifest and the digest as the client does (seeding only)."""
        digest = hashlib.md5(b"wandb-artifact-manifest-v1\n", usedforsecurity=False)
        for name, entry in sorted(artifact.contents.items()):
            digest.update(f"{name}:{entry['digest']}\n".encode())
        artifact.digest = digest.hexdigest()
        manifest = {
            "version": 1,
            "storagePolicy": "wandb-storage-policy-v1",
            "storagePolicyConfig": {"storageLayout": "V2"},
            "contents": artifact.contents,
        }
        artifact.manifest_path = self.put_blob(artifact, "wandb_manifest.json", json.dumps(manifest).encode())

    def commit(self, artifact: Artifact) -> None:
        """Give the artifact its version and its aliases."""
        if artifact.state == "COMMITTED":
            return
        if not artifact.contents and artifact.manifest_path:
            artifact.contents = json.loads(self.blobs[artifact.manifest_path])["contents"]
        artifact.state = "COMMITTED"
        collection = self.source_collection(artifact)
        artifact.version_index = collection.add(artifact)
        for alias in artifact.wanted_aliases:
            collection.aliases[alias] = artifact.version_index

    def log(self, run: Run | None, artifact: Artifact) -> None:
        """Note that a run logged the artifact."""
        if run is not None and artifact.id not in run.logged:
            run.logged.append(artifact.id)

    def new_artifact(self, entity: str, project: str, name: str, type: str, **fields: Any) -> Artifact:
        """A pending artifact in its collection."""
        self.collection(entity, project, name, type)
        fields.setdefault("created_at", None)
        fields["created_at"] = fields["created_at"] or self.now()
        artifact = Artifact(
            id=self.new_id("Artifact"), entity=entity, project=project, collection=name, type=type, **fields
        )
        self.artifacts[artifact.id] = artifact
        return artifact

    def upsert_run(self, entity: str, project: str, run_id: str, fields: Mapping[str, Any]) -> tuple[Run, bool]:
        """The run with the given fields set (None leaves one alone), and whether it is new."""
        runs = self.project(entity, project).runs
        is_new = run_id not in runs
        if is_new:
            runs[run_id] = Run(
                id=self.new_id("Run"),
                run_id=run_id,
                display_name=run_id,
                entity=entity,
                project=project,
                created_at=self.now(),
            )
        run = runs[run_id]
        for key, value in fields.items():
            if value is not None:
                setattr(run, key, value)
        run.heartbeat_at = run.heartbeat_at or run.created_at
        return run, is_new


def md5_base64(content: bytes) -> str:
    """The digest that manifests hold."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
