"""Where policies come from: three functions per scheme, in one table. Second step: NpcUri -> Candidate -> resolver.

A new scheme is a module with these three functions and a line in SOURCES (and a word in `uri.SCHEMES`). Whatever a URI
means at the moment (a directory, an alias) is decided here, once: a Candidate names one thing that does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.sources import builtin, local, s3_objects, wandb_artifacts
from dual_policy_plugin.npc.uri import NpcUri


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """How policies of one scheme are found and fetched. The second argument is what a relative path is relative to."""

    find: Callable[[NpcUri, Path | None], Candidate]
    """The one that the URI names now."""
    collection: Callable[[NpcUri, Path | None], list[Candidate]]
    """All that it may mean: versions of an artifact, runs of a project, keys of a prefix, files of a directory."""
    fetch: Callable[[Candidate], bytes]
    """The bytes, of the candidate's size and etag; bounded retries; NpcError at the end."""


SOURCES: dict[str, Source] = {
    "file": Source(find=local.find, collection=local.collection, fetch=local.fetch),
    "builtin": Source(find=builtin.find, collection=builtin.collection, fetch=builtin.fetch),
    "wandb": Source(find=wandb_artifacts.find, collection=wandb_artifacts.collection, fetch=wandb_artifacts.fetch),
    "s3": Source(find=s3_objects.find, collection=s3_objects.collection, fetch=s3_objects.fetch),
}
