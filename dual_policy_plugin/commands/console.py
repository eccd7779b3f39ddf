"""What a command says besides its answer: log lines, and the one line of an error."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from dual_policy_plugin.errors import ConfigError, DualPolicyError

ONE_LINE = "DUAL_POLICY_ONE_LINE"
"""Set where HYDRA_FULL_ERROR=1 is our wish and not the user's."""
_shown: list[BaseException] = []


def show_error(error: DualPolicyError, job: str = "") -> None:
    """Prints the one line of a user's error to stderr; with HYDRA_FULL_ERROR=1 or LOG_LEVEL=DEBUG its traceback too."""
    is_full = os.environ.get("HYDRA_FULL_ERROR") == "1" and ONE_LINE not in os.environ
    if is_full or os.environ.get("LOG_LEVEL", "").upper() == "DEBUG":
        traceback.print_exception(error)
    print(f"error: {job}{error}", file=sys.stderr, flush=True)


def show_page(path: Path) -> None:
    """Opens a page in the user's browser; without one it says where the page is."""
    import webbrowser

    if not webbrowser.open(path.absolute().as_uri()):
        print(f"note: no browser was found; open {path} in one", file=sys.stderr)


def is_shown(error: BaseException) -> bool:
    """Whether the line of an error is on stderr already: of a job, which told it before whoever waited for it."""
    return error in _shown


def mark_shown(error: BaseException) -> None:
    """Notes that nothing is to be said of an error any more."""
    _shown.append(error)


def forget_shown() -> None:
    """Forgets the errors of an earlier command of this process."""
    _shown.clear()


def configure_logging() -> None:
    """Sends log lines to stderr from the level that LOG_LEVEL names (INFO).

    Raises:
        ConfigError: LOG_LEVEL names no level.
    """
    name = os.environ.get("LOG_LEVEL") or "INFO"
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        raise ConfigError(f"LOG_LEVEL={name} is no log level; use DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(levels[name.upper()])
    logging.getLogger("alembic").setLevel(max(logging.WARNING, levels[name.upper()]))  # Optuna's store, at its import
