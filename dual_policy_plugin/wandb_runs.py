"""The runs of a W&B project and the policy that each of them published: what `dual-policy runs` shows.

Asks the W&B client, gives plain rows. Each row's URI is immutable (`...:v7`) and resolves when it is pasted back.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dual_policy_plugin.errors import (
    ConfigError,
    NoLoginError,
    NoNetworkError,
    NoRunsError,
    NpcError,
    NpcNotFoundError,
    WandbError,
)
from dual_policy_plugin.npc.sources.wandb_artifacts import model_uri, newest_model, policy_file
from dual_policy_plugin.npc.sources.wandb_client import ATTEMPT_S, open_client
from dual_policy_plugin.npc.uri import parse_uri

if TYPE_CHECKING:
    import wandb

STATES = ("all", "finished", "running", "crashed", "failed", "killed")
ORDERS = ("-created", "created", "-score", "score")
SCORE_KEYS = ("objective", "score", "dual_policy/win_rate")
"""Keys of a run's summary, the first that is a number is its score: our result, anybody's, the newest iteration's."""
PAGE = 100
DEFAULT_PROJECT = "dual-policy"
"""Where neither the config nor W&B's settings name one."""

_WANDB_MODES = {
    "online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "off", "off": "off",
}  # fmt: skip
"""The values of WANDB_MODE that the client knows, and our own word."""

_NO_NETWORK = re.compile(
    r"giving up after|dial tcp|connection|did not respond|timeout|timed out|EOF|HTTP 5\d\d|no such host|certificate",
    re.IGNORECASE,
)
_NO_ACCESS = re.compile(r"permission denied|forbidden|\b403\b|\b401\b|not logged in|relogin", re.IGNORECASE)
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class WandbRun:
    """One run of a project."""

    id: str
    name: str
    """As W&B shows it."""
    state: str
    created: str
    """ISO 8601, UTC."""
    score: float | None
    """None: its summary has none."""
    uri: str | None
    """wandb://entity/project/type/name:vN of the newest policy that it logged; None: it logged none."""


def list_runs(
    entity: str | None, project: str | None, *, limit: int, state: str = "all", order: str = "-created"
) -> list[WandbRun]:
    """At most `limit` runs of a project.

    Args:
        entity: user or team; None: the one whose login it is.
        project: its name.
        limit: how many runs.
        state: one of STATES.
        order: one of ORDERS. By score, every run of the project is read, and those without one come last.

    Raises:
        NoRunsError: the project has no (such) run.
        NoLoginError: no login, or the login may not see the project.
        NoNetworkError: W&B cannot be reached.
        WandbError: the project does not exist, or the package is missing.
    """
    with one_line_errors():
        api = open_api()
        entity = entity or api.default_entity
        if entity is None:
            raise WandbError("the W&B login has no default entity; name one with --entity")
        where = f"{entity}/{project}"
        filters = {} if state == "all" else {"state": state}
        try:
            ascending = "+created_at" if order == "created" else "-created_at"
            per_page = PAGE if "score" in order else min(limit, PAGE)
            runs = api.runs(where, filters=filters, order=ascending, per_page=per_page, lazy=False)
            found = list(runs) if "score" in order else list(itertools.islice(runs, limit))
        except ValueError as error:
            if "Could not find project" not in str(error):
                raise
            raise WandbError(f"W&B has no project {where}; name another with --entity and --project") from error
        if not found:
            mend = "start one with wandb=online" if state == "all" else "ask for others with --state all"
            kind = "run" if state == "all" else f"{state} run"
            raise NoRunsError(f"no {kind} in the W&B project {where}; {mend}")
        if "score" in order:
            found = _by_score(found, best_first=order == "-score")[:limit]
        return [_describe(run) for run in found]


def open_api(attempt_s: int = ATTEMPT_S) -> wandb.Api:
    """The client, logged in, as `wandb_client.open_client` opens it; it prints nothing.

    Raises:
        NoLoginError: no login is found.
        WandbError: the package is missing.
        Exception: of the client's own; `one_line_errors` turns them into ours.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        api = open_client(attempt_s)
    except ImportError as error:
        raise WandbError("this needs the package wandb: `pip install 'dual-policy-plugin[wandb]'`") from error
    if api is None:
        raise NoLoginError("no W&B login; run `wandb login` or set WANDB_API_KEY")
    return api


def wandb_defaults() -> tuple[str | None, str | None]:
    """(entity, project) of the W&B settings: environment, `wandb/settings`, ~/.config/wandb/settings."""
    try:
        import wandb
    except ImportError as error:
        raise WandbError("this needs the package wandb: `pip install 'dual-policy-plugin[wandb]'`") from error
    settings = wandb.setup().settings
    return os.environ.get("WANDB_ENTITY") or settings.entity, os.environ.get("WANDB_PROJECT") or settings.project


def _by_score(runs: list[Any], *, best_first: bool) -> list[Any]:
    """Sorted by score; the newest first among equals, those without a score at the end."""
    scored = [(score, run) for run in runs if (score := _score(run)) is not None]
    scored.sort(key=lambda pair: pair[0], reverse=best_first)  # stable: they came newest first
    return [run for _, run in scored] + [run for run in runs if _score(run) is None]


def _score(run: Any) -> float | None:
    summary = run.summary_metrics
    for key in SCORE_KEYS:
        value = summary.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _describe(run: Any) -> WandbRun:
    return WandbRun(
        id=run.id, name=run.name or run.id, state=run.state, created=run.created_at, score=_score(run), uri=_uri(run)
    )


def _uri(run: Any) -> str | None:
    """The newest artifact of type model that the run logged and that can be loaded as a policy."""
    models = [a for a in run.logged_artifacts(per_page=PAGE) if a.state == "COMMITTED"]
    while (newest := newest_model(models)) is not None:
        uri = model_uri(newest)
        if _is_uri(uri) and _has_policy_file(newest, uri):
            return uri
        models.remove(newest)
    return None


def _has_policy_file(artifact: Any, uri: str) -> bool:
    try:
        policy_file(artifact, uri)
    except NpcNotFoundError:
        return False
    return True


def _is_uri(text: str) -> bool:
    """Whether it can be pasted back: W&B allows names that a URI of ours does not."""
    try:
        parse_uri(text)
    except NpcError:
        return False
    return True


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the W&B client raises into ours."""
    try:
        yield
    except WandbError:
        raise
    except Exception as error:
        module = type(error).__module__
        if not module.startswith(("wandb.", "requests.", "urllib3.")) and not isinstance(error, OSError):
            raise
        text = clean(str(error))
        if isinstance(error, OSError) or _NO_NETWORK.search(text):
            raise NoNetworkError(
                f"W&B cannot be reached: {text}; see that the network and WANDB_BASE_URL are right"
            ) from error
        if _NO_ACCESS.search(text):
            raise NoLoginError(
                f"W&B refuses: {text}; run `wandb login --relogin` with a key that may see it"
            ) from error
        if type(error).__name__ in ("AuthenticationError", "UsageError"):
            raise NoLoginError(f"no W&B login: {text}; run `wandb login` or set WANDB_API_KEY") from error
        raise WandbError(f"W&B answers: {text}") from error


def clean(text: str) -> str:
    """An error's text on one line of bounded length, without control characters, queries of URLs and credentials."""
    text = " ".join(text.split()).split(" while retrying:")[0]
    text = re.sub(r"(\w+://)[^/\s@\"']*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?\"']*)\?[^\s\"']*", r"\1?...", text)
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= 300 else text[:297] + "..."


def quieter_mode(mode: str, variable: str) -> str:
    """What becomes of wandb.mode where WANDB_MODE is set: the quieter of the two, which is said where they differ.

    Args:
        mode: off, offline or online.
        variable: the value of WANDB_MODE; empty: not set.

    Raises:
        ConfigError: W&B has no such mode, and wandb.mode is not off.
    """
    if not variable:
        return mode
    asked = _WANDB_MODES.get(variable.lower())
    if asked is None and mode != "off":
        raise ConfigError(f"WANDB_MODE={variable} is not possible; use online, offline or disabled, or unset it")
    quieter = min(mode, asked or mode, key=("off", "offline", "online").index)
    if asked not in (None, mode):
        why = "nothing is sent" if quieter == "off" else "`wandb sync` sends the run later"
        _logger.info("WANDB_MODE=%s and wandb.mode=%s: %s wins, %s", variable, mode, quieter, why)
    return quieter
