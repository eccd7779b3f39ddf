"""The W&B stand-in's answers to queries: each object of the service's graph as a dict of fields."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.services.graphql_execution import GraphqlError, Node, connection
from tests.services.wandb_filters import MISSING, matches, ordered, run_value
from tests.services.wandb_store import Artifact, Collection, Project, Run, WandbStore


@dataclass(kw_only=True, slots=True)
class Graph:
    """Makes nodes from what the store holds."""

    store: WandbStore
    url_of: Callable[[str], str]
    """Storage path -> signed URL."""
    viewer: str
    features: frozenset[str]
    is_denied: Callable[[str, str], bool]
    """(entity, project) -> whether this key may not see it."""

    def query_root(self) -> Node:
        """The fields of `query { ... }`."""
        return {
            "__typename": "Query",
            "viewer": self.viewer_node,
            "serverInfo": {
                "__typename": "ServerInfo",
                "features": [{"__typename": "Feature", "name": f, "isEnabled": True} for f in sorted(self.features)],
            },
            "entity": lambda name=None: self.entity_node(name or self.viewer),
            "project": self.find_project,
            "model": self.find_project,
            "artifact": lambda id: self.artifact_node(self.store.artifacts[id]) if id in self.store.artifacts else None,
            "artifactCollection": lambda id: self.collection_node(self.store.find_collection(id)),
            "clientIDMapping": self.client_id_node,
            "organization": lambda name=None: None,
        }

    def viewer_node(self) -> Node:
        """The user whose key it is."""
        none_of_them = {"__typename": "Connection", "edges": []}
        return {
            "__typename": "User",
            "id": "VXNlcjox",
            "entity": self.viewer,
            "username": self.viewer,
            "name": self.viewer,
            "email": f"{self.viewer}@example.com",
            "admin": False,
            "flags": "{}",
            "deletedAt": None,
            "apiKeys": none_of_them,
            "teams": none_of_them,
        }

    def entity_node(self, name: str) -> Node:
        """A user or team; any name exists."""
        return {
            "__typename": "Entity",
            "id": base64.b64encode(f"Entity:{name}".encode()).decode(),
            "name": name,
            "isTeam": name != self.viewer,
            "organization": None,
            "user": None,
            "xxhashDigestsEnabled": False,
        }

    def client_id_node(self, clientID: str) -> Node | None:  # noqa: N803 (the argument's name in the schema)
        """Client-side id -> the service's id."""
        found = next((a for a in self.store.artifacts.values() if a.client_id == clientID), None)
        return {"__typename": "ClientIDMapping", "serverID": found.id} if found else None

    def find_project(self, name: str | None = None, entityName: str | None = None) -> Node | None:  # noqa: N803
        """The project or None; 403 where the key may not see it."""
        entity = entityName or self.viewer
        if self.is_denied(entity, name or ""):
            raise GraphqlError("permission denied", status=403, code="PERMISSION_ERROR")
        project = self.store.projects.get((entity, name or ""))
        return self.project_node(project) if project else None

    def project_node(self, project: Project) -> Node:
        """A project with its runs and artifacts."""

        def runs(
            filters: str | None = None, order: str | None = None, first: int | None = None, after: str | None = None
        ) -> Node:
            return connection(self.list_runs(project, filters, order), first=first, after=after, to_node=self.run_node)

        def find_run(name: str, missingOk: bool = False) -> Node | None:  # noqa: N803
            return self.run_node(project.runs[name]) if name in project.runs else None

        def collection(name: str) -> Node | None:
            return self.collection_node(project.collections.get(name))

        def membership(name: str) -> Node | None:
            collection_name, _, alias = name.partition(":")
            return self.membership_node(project.collections.get(collection_name), alias or "latest")

        def artifact(name: str) -> Node | None:
            node = membership(name)
            return node["artifact"] if node else None

        def collections(first: int | None = None, after: str | None = None, **_: Any) -> Node:
            return connection(
                list(project.collections.values()), first=first, after=after, to_node=self.collection_node
            )

        types = sorted({c.type for c in project.collections.values()})
        return {
            "__typename": "Project",
            "id": project.id,
            "internalId": base64.b64encode(f"ProjectInternalId:{self.number_of(project)}".encode()).decode(),
            "name": project.name,
            "entityName": project.entity,
            "entity": self.entity_node(project.entity),
            "createdAt": project.created_at,
            "isBenchmark": False,
            "readOnly": False,
            "user": self.viewer_node,
            "runCount": lambda filters=None: len(self.list_runs(project, filters, None)),
            "runs": runs,
            "run": find_run,
            "bucket": find_run,
            "artifactType": lambda name: self.type_node(project, name) if name in types else None,
            "artifactTypes": lambda first=None, after=None: connection(
                types, first=first, after=after, to_node=lambda name: self.type_node(project, name)
            ),
            "artifactCollection": collection,
            "artifactCollections": collections,
            "artifactCollectionMembership": membership,
            "artifact": artifact,
        }

    @staticmethod
    def number_of(project: Project) -> int:
        """The project's number, from its id."""
        return int(base64.b64decode(project.id).decode().split(":")[1])

    def list_runs(self, project: Project, filters: str | None, order: str | None) -> list[Run]:
        """The project's runs that pass the filters, in order (oldest first where none is given)."""
        wanted = json.loads(filters or "{}")
        runs = [r for r in project.runs.values() if matches(wanted, lambda key, run=r: run_value(run, key))]
        return ordered(runs, order or "+created_at", run_value)

    def run_node(self, run: Run) -> Node:
        """A run with all its fields."""
        project = self.store.projects[run.entity, run.project]

        def artifacts(ids: list[str], first: int | None, after: str | None) -> Node:
            found = [self.store.artifacts[i] for i in ids]
            committed = [a for a in found if a.state == "COMMITTED"]
            return connection(committed, first=first, after=after, to_node=self.artifact_node)

        def history(minStep: int = 0, maxStep: int = 1 << 60, samples: int = 1000) -> list[str]:  # noqa: N803
            rows = [row for row in run.history if minStep <= row.get("_step", 0) < maxStep]
            return [json.dumps(row) for row in rows[:samples]]

        return {
            "__typename": "Run",
            "id": run.id,
            "projectId": str(self.number_of(project)),
            "name": run.run_id,
            "displayName": run.display_name,
            "state": run.state,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "tags": run.tags,
            "sweepName": None,
            "group": run.group,
            "jobType": run.job_type,
            "commit": run.commit,
            "readOnly": False,
            "createdAt": run.created_at,
            "heartbeatAt": run.heartbeat_at,
            "description": run.description,
            "notes": run.notes,
            "user": self.viewer_node,
            "project": lambda: self.project_node(project),
            "historyLineCount": len(run.history),
            "logLineCount": len(run.output),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": lambda keys=None: "{}",
            "historyKeys": {"lastStep": run.history[-1].get("_step", 0) if run.history else -1, "keys": {}},
            "history": history,
            "outputArtifacts": lambda first=None, after=None: artifacts(run.logged, first, after),
            "inputArtifacts": lambda first=None, after=None: artifacts(run.used, first, after),
        }

    def type_node(self, project: Project, name: str) -> Node:
        """An artifact type of a project."""
        collections = {c.name: c for c in project.collections.values() if c.type == name}

        def of_type(first: int | None = None, after: str | None = None, **_: Any) -> Node:
            return connection(list(collections.values()), first=first, after=after, to_node=self.collection_node)

        return {
            "__typename": "ArtifactType",
            "id": base64.b64encode(f"ArtifactType:{project.id}:{name}".encode()).decode(),
            "name": name,
            "description": None,
            "createdAt": project.created_at,
            "artifactCollection": lambda name: self.collection_node(collections.get(name)),
            "artifactCollections": of_type,
        }

    def collection_node(self, collection: Collection | None) -> Node | None:
        """A collection with its versions."""
        if collection is None:
            return None
        project = self.store.projects[collection.entity, collection.project]

        def artifacts(
            first: int | None = None, after: str | None = None, order: str | None = None, filters: str | None = None
        ) -> Node:
            def value_of(member: tuple[int, Artifact], key: str) -> Any:
                known = {"state": member[1].state, "createdAt": member[1].created_at, "versionIndex": member[0]}
                return known.get(key, MISSING)

            wanted = json.loads(filters or "{}")
            # The real service lists the newest version first.
            members = sorted(collection.members.items(), reverse=True)
            members = [m for m in members if matches(wanted, lambda key, member=m: value_of(member, key))]
            return connection(
                ordered(members, order, value_of),
                first=first,
                after=after,
                to_node=lambda member: self.artifact_node(member[1]),
                extra=lambda member: {"version": f"v{member[0]}"},
            )

        def aliases(first: int | None = None, after: str | None = None) -> Node:
            return connection(
                sorted(collection.aliases),
                first=first,
                after=after,
                to_node=lambda alias: self.alias_node(collection, alias),
            )

        return {
            "__typename": "ArtifactPortfolio" if collection.is_portfolio else "ArtifactSequence",
            "__interfaces": ("ArtifactCollection",),
            "id": collection.id,
            "name": collection.name,
            "description": None,
            "state": "READY",
            "createdAt": collection.created_at,
            "updatedAt": collection.created_at,
            "project": lambda: self.project_node(project),
            "defaultArtifactType": lambda: self.type_node(project, collection.type),
            "tags": {"__typename": "Connection", "edges": []},
            "digestAlgorithm": None,
            "aliases": aliases,
            "artifacts": artifacts,
            "artifactMembership": lambda aliasName: self.membership_node(collection, aliasName),  # noqa: N803
            "latestArtifact": lambda: self.latest_node(collection),
        }

    def latest_node(self, collection: Collection) -> Node | None:
        """The version that `latest` is on."""
        found = collection.find("latest")
        return self.artifact_node(found[1]) if found else None

    def alias_node(self, collection: Collection, alias: str) -> Node:
        """An alias of a collection."""
        return {
            "__typename": "ArtifactAlias",
            "id": base64.b64encode(f"ArtifactAlias:{collection.id}:{alias}".encode()).decode(),
            "alias": alias,
            "artifactCollection": lambda: self.collection_node(collection),
        }

    def membership_node(self, collection: Collection | None, alias: str) -> Node | None:
        """A version's place in a collection."""
        found = collection.find(alias) if collection else None
        if collection is None or found is None:
            return None
        index, artifact = found
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": base64.b64encode(f"ArtifactCollectionMembership:{collection.id}:{index}".encode()).decode(),
            "versionIndex": index,
            "createdAt": artifact.created_at,
            "aliases": [self.alias_node(collection, name) for name in collection.aliases_of(index)],
            "artifactCollection": lambda: self.collection_node(collection),
            "artifact": self.artifact_node(artifact),
            "files": lambda **page: self.files(artifact, **page),
        }

    def artifact_node(self, artifact: Artifact) -> Node:
        """A version with all its fields."""
        in_collections = [
            (collection, index)
            for project in self.store.projects.values()
            for collection in project.collections.values()
            for index, member in collection.members.items()
            if member.id == artifact.id
        ]

        def created_by() -> Node | None:
            run = self.store.projects[artifact.entity, artifact.project].runs.get(artifact.run_id or "")
            return self.run_node(run) if run else None

        def used_by() -> Node:
            runs = [r for p in self.store.projects.values() for r in p.runs.values() if artifact.id in r.used]
            return connection(runs, first=None, after=None, to_node=self.run_node)

        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "artifactSequence": lambda: self.collection_node(self.store.source_collection(artifact)),
            "versionIndex": artifact.version_index,
            "artifactType": lambda: self.type_node(
                self.store.projects[artifact.entity, artifact.project], artifact.type
            ),
            "description": artifact.description,
            "metadata": artifact.metadata,
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": artifact.state,
            "size": str(artifact.size),
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": artifact.client_id[:20],
            "fileCount": len(artifact.contents),
            "createdAt": artifact.created_at,
            "updatedAt": artifact.created_at,
            "aliases": [self.alias_node(c, alias) for c, index in in_collections for alias in c.aliases_of(index)],
            "currentManifest": lambda: self.manifest_node(artifact),
            "files": lambda **page: self.files(artifact, **page),
            "createdBy": created_by,
            "usedBy": used_by,
        }

    def manifest_node(self, artifact: Artifact) -> Node:
        """The manifest with the URL of its file."""
        file = {"__typename": "File", "id": artifact.id, "directUrl": self.url_of(artifact.manifest_path)}
        return {"__typename": "ArtifactManifest", "id": artifact.id, "file": file}

    def files(
        self, artifact: Artifact, names: list[str] | None = None, first: int | None = None, after: str | None = None
    ) -> Node:
        """The version's files with signed URLs."""

        def file_node(name: str) -> Node:
            entry = artifact.contents[name]
            path = f"{artifact.entity}/{artifact.project}/{entry.get('birthArtifactID') or artifact.id}/{name}"
            return {
                "__typename": "File",
                "id": base64.b64encode(f"File:{path}".encode()).decode(),
                "name": name,
                "displayName": name,
                "url": self.url_of(path),
                "directUrl": self.url_of(path),
                "sizeBytes": str(entry["size"]),
                "storagePath": path,
                "mimetype": "application/octet-stream",
                "updatedAt": artifact.created_at,
                "digest": entry["digest"],
                "md5": base64.b64decode(entry["digest"]).hex(),
            }

        wanted = [name for name in artifact.contents if names is None or name in names]
        return connection(wanted, first=first, after=after, to_node=file_node)
