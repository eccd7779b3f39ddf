"""The W&B stand-in's answers to mutations: what a run and `log_artifact` write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.services.graphql_execution import GraphqlError, Node
from tests.services.wandb_queries import Graph
from tests.services.wandb_store import Artifact, Run, WandbStore

SUCCESS: Node = {"__typename": "Payload", "success": True}


@dataclass(kw_only=True, slots=True)
class Mutations:
    """Each public method is one mutation; its argument is GraphQL's `input`."""

    store: WandbStore
    graph: Graph
    upload_url_of: Callable[[str], str]
    """Storage path -> signed URL for a PUT."""

    def mutation_root(self) -> Node:
        """The fields of `mutation { ... }`."""
        answers: dict[str, Callable[[dict[str, Any]], Node]] = {
            "upsertBucket": self.upsert_run,
            "createRunFiles": self.create_run_files,
            "markRunFilesUploaded": lambda _: SUCCESS,
            "createArtifact": self.create_artifact,
            "createArtifactManifest": self.create_manifest,
            "updateArtifactManifest": self.update_manifest,
            "createArtifactFiles": self.create_files,
            "commitArtifact": self.commit_artifact,
            "updateArtifact": self.update_artifact,
            "useArtifact": self.use_artifact,
            "addAliases": self.add_aliases,
            "deleteAliases": self.delete_aliases,
            "linkArtifact": self.link_artifact,
            "deleteArtifact": self.delete_artifact,
        }
        return {"__typename": "Mutation"} | {
            name: (lambda input, answer=answer: answer(input)) for name, answer in answers.items()
        }

    def check(self, entity: str | None, project: str | None) -> None:
        """403 where this key may not write."""
        if self.graph.is_denied(entity or self.graph.viewer, project or ""):
            raise GraphqlError("permission denied", status=403, code="PERMISSION_ERROR")

    def artifact(self, artifact_id: str) -> Artifact:
        """The artifact with that id (the client's own id serves too)."""
        found = self.store.artifacts.get(artifact_id)
        found = found or next((a for a in self.store.artifacts.values() if a.client_id == artifact_id), None)
        if found is None:
            raise GraphqlError(f"artifact {artifact_id!r} not found", status=404)
        self.check(found.entity, found.project)
        return found

    def upsert_run(self, given: Mapping[str, Any]) -> Node:
        """A new run, or new fields of one (found by storage id or by name)."""
        known = self.store.find_run(given.get("id") or "")
        entity = given.get("entityName") or (known.entity if known else self.graph.viewer)
        project = given.get("modelName") or (known.project if known else "uncategorized")
        self.check(entity, project)
        fields = {
            "display_name": given.get("displayName"),
            "config": json.loads(given["config"]) if given.get("config") else None,
            "summary": json.loads(given["summaryMetrics"]) if given.get("summaryMetrics") else None,
            "group": given.get("groupName"),
            "job_type": given.get("jobType"),
            "notes": given.get("notes"),
            "commit": given.get("commit"),
            "tags": given.get("tags"),
            "state": given.get("state"),
        }
        name = known.run_id if known else given.get("name") or f"run{len(self.store.project(entity, project).runs):05}"
        run, is_new = self.store.upsert_run(entity, project, name, fields)
        return {"__typename": "UpsertBucketPayload", "bucket": self.graph.run_node(run), "inserted": is_new}

    def create_run_files(self, given: Mapping[str, Any]) -> Node:
        """URLs for a run's own files (config.yaml, requirements.txt, ...)."""
        run, _ = self.store.upsert_run(given["entityName"], given["projectName"], given["runName"], {})
        run.file_names += [name for name in given["files"] if name not in run.file_names]
        files = [
            {
                "__typename": "File",
                "name": name,
                "uploadUrl": self.upload_url_of(f"{run.entity}/{run.project}/runs/{run.run_id}/{name}"),
            }
            for name in given["files"]
        ]
        return {"__typename": "CreateRunFilesPayload", "runID": run.id, "uploadHeaders": [], "files": files}

    def run_of(self, given: Mapping[str, Any]) -> Run | None:
        """The run that a mutation names."""
        project = self.store.projects.get((given.get("entityName") or "", given.get("projectName") or ""))
        return project.runs.get(given.get("runName") or "") if project else None

    def create_artifact(self, given: Mapping[str, Any]) -> Node:
        """A pending artifact, or the newest version where it has the same digest."""
        entity, project = given["entityName"], given["projectName"]
        self.check(entity, project)
        name = given.get("artifactCollectionName") or given["artifactCollectionNames"][0]
        collection = self.store.collection(entity, project, name, given["artifactTypeName"])
        wanted = [alias["alias"] for alias in given.get("aliases") or [] if alias["alias"] != "latest"]
        run = self.run_of(given)
        latest = collection.find("latest")
        if latest and given.get("enableDigestDeduplication") and latest[1].digest == given["digest"]:
            artifact = latest[1]
            collection.aliases.update(dict.fromkeys(wanted, latest[0]))
        else:
            artifact = self.store.new_artifact(
                entity,
                project,
                name,
                given["artifactTypeName"],
                digest=given["digest"],
                description=given.get("description"),
                metadata=given.get("metadata") or "{}",
                client_id=given.get("clientID") or "",
                run_id=run.run_id if run else None,
                wanted_aliases=wanted,
            )
        self.store.log(run, artifact)
        return {"__typename": "CreateArtifactPayload", "artifact": self.graph.artifact_node(artifact)}

    def manifest(self, artifact: Artifact) -> Node:
        """A manifest to upload to."""
        artifact.manifest_path = f"{artifact.entity}/{artifact.project}/{artifact.id}/wandb_manifest.json"
        url = self.upload_url_of(artifact.manifest_path)
        file = {"__typename": "File", "id": artifact.id, "uploadUrl": url, "uploadHeaders": []}
        return {
            "__typename": "ManifestPayload",
            "artifactManifest": {"__typename": "ArtifactManifest", "id": artifact.id, "file": file},
        }

    def create_manifest(self, given: Mapping[str, Any]) -> Node:
        """The manifest's id is its artifact's."""
        return self.manifest(self.artifact(given["artifactID"]))

    def update_manifest(self, given: Mapping[str, Any]) -> Node:
        """The same manifest once more."""
        return self.manifest(self.artifact(given["artifactManifestID"]))

    def create_files(self, given: Mapping[str, Any]) -> Node:
        """An upload URL for each file, none for one that an earlier version of the collection already has."""
        edges = []
        for spec in given["artifactFiles"]:
            artifact = self.artifact(spec["artifactID"])
            birth = self.birth_of(artifact, spec["name"], spec["md5"])
            path = f"{artifact.entity}/{artifact.project}/{birth.id}/{spec['name']}"
            node = {
                "__typename": "File",
                "name": spec["name"],
                "displayName": spec["name"],
                "storagePath": path,
                "uploadUrl": self.upload_url_of(path) if birth is artifact else None,
                "uploadHeaders": [f"Content-MD5:{spec['md5']}"],
                "uploadMultipartUrls": None,
                "artifact": {"__typename": "Artifact", "id": birth.id},
            }
            edges.append({"__typename": "Edge", "node": node})
        connection = {"__typename": "Connection", "edges": edges}
        return {"__typename": "CreateArtifactFilesPayload", "files": connection}

    def birth_of(self, artifact: Artifact, name: str, md5: str) -> Artifact:
        """The earlier version of the collection that brought the same file, else the artifact itself."""
        for member in self.store.source_collection(artifact).members.values():
            entry = member.contents.get(name)
            if entry and entry["digest"] == md5:
                return self.store.artifacts[entry.get("birthArtifactID") or member.id]
        return artifact

    def commit_artifact(self, given: Mapping[str, Any]) -> Node:
        """From here on it has a version."""
        artifact = self.artifact(given["artifactID"])
        self.store.commit(artifact)
        return {"__typename": "CommitArtifactPayload", "artifact": self.graph.artifact_node(artifact)}

    def update_artifact(self, given: Mapping[str, Any]) -> Node:
        """New metadata, description or aliases; None leaves one alone."""
        artifact = self.artifact(given["artifactID"])
        artifact.metadata = given.get("metadata") or artifact.metadata
        artifact.description = given.get("description") or artifact.description
        for alias in given.get("aliases") or []:
            self.move_alias(artifact, {**alias, "entityName": artifact.entity, "projectName": artifact.project})
        return {"__typename": "UpdateArtifactPayload", "artifact": self.graph.artifact_node(artifact)}

    def use_artifact(self, given: Mapping[str, Any]) -> Node:
        """Note the artifact as an input of the run."""
        artifact = self.artifact(given["artifactID"])
        run = self.run_of(given)
        if run is not None and artifact.id not in run.used:
            run.used.append(artifact.id)
        return {"__typename": "UseArtifactPayload", "artifact": self.graph.artifact_node(artifact)}

    def move_alias(self, artifact: Artifact, alias: Mapping[str, Any], *, remove: bool = False) -> None:
        """Put an alias of one collection on that artifact, or take it off."""
        project = self.store.projects.get((alias["entityName"], alias["projectName"]))
        collection = project.collections.get(alias["artifactCollectionName"]) if project else None
        indices = [i for i, member in collection.members.items() if member is artifact] if collection else []
        if collection is None or not indices:
            raise GraphqlError(f"artifact is not in collection {alias['artifactCollectionName']!r}", status=404)
        if not remove:
            collection.aliases[alias["alias"]] = indices[-1]
        elif collection.aliases.get(alias["alias"]) in indices:
            del collection.aliases[alias["alias"]]

    def add_aliases(self, given: Mapping[str, Any]) -> Node:
        """`artifact.aliases.append(...)` and `save()`."""
        for alias in given["aliases"]:
            self.move_alias(self.artifact(given["artifactID"]), alias)
        return SUCCESS

    def delete_aliases(self, given: Mapping[str, Any]) -> Node:
        """`artifact.aliases.remove(...)` and `save()`."""
        for alias in given["aliases"]:
            self.move_alias(self.artifact(given["artifactID"]), alias, remove=True)
        return SUCCESS

    def link_artifact(self, given: Mapping[str, Any]) -> Node:
        """A membership in a portfolio of that or another project."""
        artifact = self.artifact(given.get("artifactID") or given["clientID"])
        entity, project = given["entityName"], given["projectName"]
        self.check(entity, project)
        collection = self.store.collection(
            entity, project, given["artifactPortfolioName"], artifact.type, is_portfolio=True
        )
        known = next((i for i, member in collection.members.items() if member is artifact), None)
        index = collection.add(artifact) if known is None else known
        collection.aliases.update({alias["alias"]: index for alias in given.get("aliases") or []})
        return {
            "__typename": "LinkArtifactPayload",
            "versionIndex": index,
            "artifactMembership": self.graph.membership_node(collection, f"v{index}"),
        }

    def delete_artifact(self, given: Mapping[str, Any]) -> Node:
        """Take a version out; its number is never used again."""
        artifact = self.artifact(given["artifactID"])
        collection = self.store.source_collection(artifact)
        index = artifact.version_index
        if collection.aliases_of(index or 0) and not given.get("deleteAliases"):
            raise GraphqlError("artifact has aliases", status=409)
        collection.aliases = {alias: at for alias, at in collection.aliases.items() if at != index}
        collection.members.pop(index or 0, None)
        artifact.state = "DELETED"
        return {"__typename": "DeleteArtifactPayload", "artifact": self.graph.artifact_node(artifact)}
