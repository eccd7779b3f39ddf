"""The real `wandb` client under an environment of its own: one server, fresh folders, bounded retries.

The client keeps a service process (wandb-core), settings, credentials and artifacts per Python process; `clean_client`
starts without them and clears them after. Its retries are slow by default; the environment bounds those of the service
process to one retry after one second. The Python part that downloads artifacts (`Artifact.download`,
`get_entry().download`, `Artifact.manifest`) cannot be bounded: 16 retries after 408/409/429/5xx and lost connections,
20 minutes in all, no read timeout, and a warning in urllib3's log that holds the signed URL.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from types import ModuleType

# Retries and timeouts of the client's service process (wandb-core), all of them whole numbers of 1 or more: 0 and 0.01
# mean "the default" (waits from 2 to 60 s).
BOUNDED_RETRIES = {
    f"WANDB__{part}_RETRY_{key}": "1"
    for part in ("GRAPHQL", "FILE_TRANSFER", "FILE_STREAM")
    for key in ("MAX", "WAIT_MIN_SECONDS", "WAIT_MAX_SECONDS")
} | {
    "WANDB_HTTP_TIMEOUT": "5",  # seconds one attempt of a GraphQL request may take
    "WANDB_FILE_PUSHER_TIMEOUT": "5",  # seconds a file transfer may take
    "WANDB__FILE_STREAM_TIMEOUT_SECONDS": "5",
    "WANDB_INIT_TIMEOUT": "15",
}


def client_env(url: str, api_key: str, folder: Path) -> dict[str, str]:
    """The client's environment; makes its folders under `folder`.

    The server is also the HTTP proxy for all other hosts, so that its `foreign_hosts` shows any that were tried.
    """
    folders = {
        f"WANDB_{name}": str(folder / "wandb" / name.lower())
        for name in ("CACHE_DIR", "DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR")
    }
    for path in folders.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    return {
        **folders,
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        **BOUNDED_RETRIES,
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": api_key,
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB__DISABLE_STATS": "true",
        "WANDB__DISABLE_META": "true",
        "NETRC": str(folder / "no-netrc"),
    }


@contextmanager
def clean_client(env: Mapping[str, str]) -> Iterator[ModuleType]:
    """The `wandb` module under `env` (no other WANDB variable counts), clean before and after."""
    import wandb

    # Every wandb.Artifact leaves its staging folder to the garbage collector, which says so; pytest takes the filter
    # away at the end of the test.
    warnings.filterwarnings("ignore", "Implicitly cleaning up <TemporaryDirectory", ResourceWarning)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    _forget()
    with mock.patch.dict(os.environ, {**kept, **env}, clear=True):
        try:
            yield wandb
        finally:
            _forget()


def collect_garbage() -> None:
    """Let staging folders go while their warning is still filtered."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Implicitly cleaning up <TemporaryDirectory", ResourceWarning)
        gc.collect()


def _forget() -> None:
    import wandb
    from wandb.sdk.artifacts import artifact_instance_cache as instances

    wandb.teardown()  # ends the service process; settings and credentials go with it
    instances.artifact_instance_cache.clear()
    instances.artifact_instance_cache_by_client_id.clear()
