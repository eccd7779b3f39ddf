"""Policies in W&B: an artifact's versions, or the models that a project's finished runs logged. Through `wandb.Api`.

The client names versions, files and signed URLs; the bytes are fetched by `http.get_signed`, because the client's own
download compares no digest and retries for twenty minutes. Nothing is written to the client's artifact cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.candidates import Candidate, flat_metadata
from dual_policy_plugin.npc.sources import http
from dual_policy_plugin.npc.sources.http import Transient, read_checked, with_retries
from dual_policy_plugin.npc.sources.wandb_client import open_client
from dual_policy_plugin.npc.uri import NpcUri, WandbName, wandb_name

MODEL_TYPE = "model"
MAX_VERSIONS = 10_000
MAX_RUNS = 2_000
MAX_FILES = 1_000
PER_PAGE = 100
NUM_CONNECTIONS = 8
LISTER = "`dual-policy runs` lists what there is"

_GONE = re.compile(
    r"not found|could not find|unable to parse '\w+' response|does not exist|but this artifact is of type", re.I
)
_NO_LOGIN = re.compile(r"\b401\b|not logged in|API key|unauthenticated|unauthorized|relogin|No API key", re.I)
_NO_ACCESS = re.compile(r"\b403\b|permission|forbidden|denied", re.I)
_NO_NETWORK = re.compile(
    r"giving up after|\bEOF\b|refused|reset|no such host|unreachable|time.?out|timed out|did not respond"
    r"|HTTP 5\d\d|\b429\b|proxy|tls|x509|certificate|not running",
    re.I,
)

T = TypeVar("T")


def find(uri: NpcUri, base: Path | None) -> Candidate:
    """The version that the URI means now, pinned to its number.

    Raises:
        NpcNotFoundError: there is no such artifact or version, or it holds no policy file.
        NpcError: no login, no access or no network.
    """
    name = wandb_name(uri)
    if name.name is None:
        raise NpcError(
            f"{uri.text} names a project; name an artifact in it (wandb://entity/project/name:version), or choose"
            f" among its runs with type=latest, top, rand or all. {LISTER}"
        )
    api = open_api(uri.text)
    if name.entity is None:
        return _of_run(api, name, uri.text)
    artifact = _ask(lambda: _artifact(api, name), uri.text)
    return _pin(artifact, policy_file(artifact, uri.text))


def collection(uri: NpcUri, base: Path | None) -> list[Candidate]:
    """All versions of an artifact; of a project the newest model of each finished run, with the run's summary.

    Raises:
        NpcNotFoundError: there is none.
        NpcError: no login, no access or no network.
    """
    name = wandb_name(uri)
    if name.version != "latest":
        raise NpcError(
            f"{uri.text} names the version {name.version}, a selector chooses among all of them; leave out either"
            f" :{name.version} or the selector"
        )
    api = open_api(uri.text)
    if name.name is None:
        candidates = _of_finished_runs(api, f"{name.entity}/{name.project}", uri.text)
    elif name.entity is None:
        candidates = [_pin(artifact) for artifact in _run_models(api, name, uri.text)[1]]
    else:
        kind = name.type or str(_ask(lambda: _artifact(api, name), uri.text).type)
        path = f"{name.entity}/{name.project}/{name.name}"
        versions = _ask(lambda: _some_of(api.artifacts(kind, path, per_page=PER_PAGE), MAX_VERSIONS), uri.text)
        candidates = [_pin(artifact) for artifact in versions]
    if not candidates:
        raise NpcNotFoundError(f"{_failed(uri.text)}: not found, no model is there yet; {LISTER}")
    return candidates


def fetch(candidate: Candidate) -> bytes:
    """The bytes of the artifact's policy file, compared with W&B's digest of them.

    Raises:
        DigestError: the version holds other bytes than when it was found.
        NpcError: W&B does not give it; every attempt was used.
    """
    name = wandb_name(NpcUri(text=candidate.uri, scheme="wandb", path=candidate.uri.removeprefix("wandb://")))
    api = open_api(candidate.uri)

    def read() -> tuple[bytes, bool]:
        with _errors(candidate.uri):
            artifact = _artifact(api, name)
        file = policy_file(artifact, candidate.uri)  # anew for each attempt: its signed URL expires
        num_bytes, md5 = int(file.size), http.md5_hex(str(file.md5 or ""))
        if candidate.etag and md5 != candidate.etag:
            raise DigestError(f"{candidate.uri}: this version holds another file than when it was found")
        if num_bytes > http.MAX_BYTES:
            raise NpcError(f"{candidate.uri} has {num_bytes} bytes; a policy has at most {http.MAX_BYTES}")
        service = str(api.settings["base_url"])
        data = http.get_signed(str(file.direct_url), num_bytes=num_bytes, service=service, what=candidate.uri)
        return data, http.check_bytes(data, num_bytes=num_bytes, md5=md5)

    return read_checked(read, _failed(candidate.uri))


def open_api(asked: str) -> Any:
    """A `wandb.Api` whose login was tried, with bounded retries.

    Args:
        asked: the URI, for messages.

    Raises:
        NpcError: W&B is not installed, there is no login, W&B refuses it, or it cannot be reached.
    """

    def once() -> Any:
        with _errors(asked):
            try:
                api = open_client()
            except ImportError:
                raise NpcError(
                    "wandb:// needs W&B's client; install it with: pip install 'dual-policy-plugin[wandb]'"
                ) from None
            if api is None:
                raise NpcError(f"{_failed(asked)}: no access, W&B has no login here; run `wandb login`")
            return api

    return with_retries(once, _failed(asked))


def default_project(api: Any, asked: str) -> tuple[str, str]:
    """Entity and project of W&B's settings.

    Raises:
        NpcError: no project is set.
    """
    entity = api.settings.get("entity") or _ask(lambda: api.default_entity, asked)
    project = api.settings.get("project")
    if not entity or not project:
        raise NpcError(
            f"{asked}: W&B's settings name no {'project' if entity else 'entity'}; set WANDB_ENTITY and WANDB_PROJECT,"
            " or write wandb://entity/project/name:version"
        )
    return str(entity), str(project)


def model_uri(artifact: Any) -> str:
    """The URI that means this version for ever."""
    if str(artifact.project).startswith("wandb-registry-"):  # its members may be read where their source may not
        return f"wandb://{artifact.entity}/{artifact.project}/{artifact.type}/{_collection(artifact.name)}:{artifact.version}"
    place = f"{artifact.source_entity}/{artifact.source_project}/{artifact.type}"
    return f"wandb://{place}/{_collection(artifact.source_name)}:{artifact.source_version}"


def _collection(name: object) -> str:
    """The name of an artifact without its version or alias."""
    return str(name).partition(":")[0]


def newest_model(artifacts: list[Any], kind: str = MODEL_TYPE) -> Any | None:
    """The newest of a run's artifacts of that type, by time and then by version; None where there is none."""
    models = [artifact for artifact in artifacts if artifact.type == kind]
    return max(models, key=lambda a: (str(a.created_at), _version(a) or 0, str(a.name)), default=None)


def _of_finished_runs(api: Any, path: str, asked: str) -> list[Candidate]:
    """A candidate for each finished run of a project that logged a model: its newest one."""
    runs = _ask(
        lambda: _some_of(
            api.runs(path, filters={"state": "finished"}, order="-created_at", per_page=PER_PAGE, lazy=False), MAX_RUNS
        ),
        asked,
    )
    if not runs:
        return []

    def describe(run: Any) -> Candidate | None:
        model = newest_model(_ask(lambda: _some_of(run.logged_artifacts(per_page=PER_PAGE), MAX_VERSIONS), asked))
        if model is None:
            return None
        summary = flat_metadata({str(key): value for key, value in dict(run.summary).items()})
        pinned = _pin(model)
        metadata = flat_metadata({**summary, **pinned.metadata, "run": str(run.name)})
        # versions of different artifacts say nothing about which is newer
        return replace(pinned, version=None, metadata=metadata, name=_policy_name(f"{run.name}.{pinned.name}"))

    with ThreadPoolExecutor(min(NUM_CONNECTIONS, len(runs))) as pool:
        return [found for found in pool.map(describe, runs) if found is not None]


def _of_run(api: Any, name: WandbName, asked: str) -> Candidate:
    """The model of a run: its newest, or the one with that version or alias."""
    where, models = _run_models(api, name, asked)
    chosen = [a for a in models if name.version in (a.version, *a.aliases)]
    if name.version == "latest":
        chosen = [newest_model(models)]
    if not chosen:
        versions = ", ".join(sorted(str(a.name) for a in models)[:5])
        raise NpcNotFoundError(f"{_failed(asked)}: not found, the run {where} logged no {name.version}, but {versions}")
    if len(chosen) > 1:
        uris = ", ".join(sorted(model_uri(a) for a in chosen)[:5])
        raise NpcError(f"{_failed(asked)}: the run {where} logged several models with it; name one of {uris}")
    return _pin(chosen[0], policy_file(chosen[0], asked))


def _run_models(api: Any, name: WandbName, asked: str) -> tuple[str, list[Any]]:
    """The run of that name (or id) in the default project, and all models that it logged."""
    entity, project = default_project(api, asked)
    wanted = {"$or": [{"display_name": name.name}, {"name": name.name}]}
    runs = _ask(
        lambda: _some_of(api.runs(f"{entity}/{project}", filters=wanted, per_page=PER_PAGE, lazy=False), 100), asked
    )
    runs = [run for run in runs if run.id == name.name] or runs
    where = f"{entity}/{project}/{name.name}"
    if not runs:
        raise NpcNotFoundError(f"{_failed(asked)}: not found, there is no run {where}; {LISTER}")
    if len(runs) > 1:
        ids = ", ".join(str(run.id) for run in runs[:5])
        raise NpcError(f"{_failed(asked)}: {len(runs)} runs are named {where}; use the id of one: {ids}")
    logged = _ask(lambda: _some_of(runs[0].logged_artifacts(per_page=PER_PAGE), MAX_VERSIONS), asked)
    models = [artifact for artifact in logged if artifact.type == MODEL_TYPE]
    if not models:
        raise NpcNotFoundError(f"{_failed(asked)}: not found, the run {where} logged no model; {LISTER}")
    return where, models


def _artifact(api: Any, name: WandbName) -> Any:
    return api.artifact(f"{name.entity}/{name.project}/{name.name}:{name.version}", type=name.type)


def policy_file(artifact: Any, asked: str) -> Any:
    """The one policy file of an artifact: its .safetensors, else its .pt.

    Raises:
        NpcNotFoundError: it holds none, or several and none of them is named model.
    """
    files = _ask(lambda: _some_of(artifact.files(per_page=PER_PAGE), MAX_FILES), asked)
    for ending in (".safetensors", ".pt"):
        fitting = [file for file in files if str(file.name).endswith(ending)]
        named = [file for file in fitting if file.name == f"model{ending}"]
        if len(fitting) == 1 or named:
            return (named or fitting)[0]
        if fitting:
            raise NpcNotFoundError(
                f"{_failed(asked)}: it holds several {ending} files ({_names(fitting)}) and none is model{ending}"
            )
    raise NpcNotFoundError(
        f"{_failed(asked)}: it holds no .safetensors or .pt file, but {_names(files) or 'nothing'}; {LISTER}"
    )


def _pin(artifact: Any, file: Any = None) -> Candidate:
    """The candidate that a version is."""
    version = _version(artifact)
    is_single = artifact.file_count == 1
    return Candidate(
        name=_policy_name(f"{_collection(artifact.source_name)}.{artifact.source_version}"),
        uri=model_uri(artifact),
        version=version,
        created=_time(str(artifact.created_at or "")),
        num_bytes=int(file.size) if file is not None else int(artifact.size or 0) if is_single else 0,
        metadata=flat_metadata(dict(artifact.metadata or {})),
        etag=http.md5_hex(str(file.md5 or "")) if file is not None else "",
    )


def _version(artifact: Any) -> int | None:
    match = re.fullmatch(r"v(\d{1,18})", str(artifact.source_version))
    return int(match[1]) if match else None


def _some_of(items: Any, most: int) -> list[Any]:
    """All of a paged list; an NpcError where there are more than `most`."""
    found: list[Any] = []
    for item in items:
        if len(found) == most:
            raise NpcError(f"W&B lists more than {most} there; name a single artifact")
        found.append(item)
    return found


def _ask(question: Callable[[], T], asked: str) -> T:
    """What the client answers, with retries."""

    def once() -> T:
        with _errors(asked):
            return question()

    return with_retries(once, _failed(asked))


def _failed(asked: str) -> str:
    return f"Could not load NPC policy from WandB artifact {asked.removeprefix('wandb://')}"


@contextmanager
def _errors(asked: str) -> Iterator[None]:
    """Turns what the client raises into a Transient or an NpcError; shows nothing of its text."""
    try:
        yield
    except (NpcError, Transient):
        raise
    except Exception as error:
        kind, texts = type(error), _texts(error)
        if not kind.__module__.startswith(("wandb", "requests")) and not isinstance(error, ValueError | OSError):
            raise
        what = _failed(asked)
        if _NO_NETWORK.search(texts) or isinstance(error, OSError):
            raise Transient(f"no network, W&B cannot be reached ({_status(texts) or kind.__name__})") from None
        if _NO_ACCESS.search(texts):
            raise NpcError(
                f"{what}: no access, this W&B login may not read it; check the entity and the login"
            ) from None
        if _NO_LOGIN.search(texts) or kind.__name__ == "UsageError":
            raise NpcError(f"{what}: no access, W&B refuses the login; run `wandb login`") from None
        if _GONE.search(texts):
            raise NpcNotFoundError(f"{what}: not found; {LISTER}") from None
        raise Transient(f"no network, W&B answered with an error ({_status(texts) or kind.__name__})") from None


def _texts(error: BaseException) -> str:
    """The messages of an error and of what led to it; to be searched, never to be shown."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 8:
        texts.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return "\n".join(texts)


def _status(texts: str) -> str:
    match = re.search(r"HTTP (\d{3})\b", texts)
    return f"HTTP {match[1]}" if match else ""


def _time(text: str) -> str:
    """ISO 8601 in UTC; W&B leaves the zone out in places."""
    return text if not text or text.endswith("Z") or "+" in text else f"{text}Z"


def _policy_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:64] or "npc"


def _names(files: list[Any]) -> str:
    others = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return ", ".join(ascii(str(file.name)[:80])[1:-1] for file in files[:5]) + others
