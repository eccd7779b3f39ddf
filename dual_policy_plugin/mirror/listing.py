"""What a mirror holds, as its own list (mirror/files.json) says it: for each file the bytes that it may have.

The list is written before files are sent, with the old bytes and the new ones, and after; so whatever is broken off,
each object can be checked against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.mirror.places import Place

LIST_NAME = "mirror/files.json"
STATE_NAME = "state/training.safetensors"
GROWING_NAMES = ("metrics.jsonl", "timing.jsonl")
"""Files that grow by lines, and are otherwise replaced as a whole. They stand in pieces of `PIECE_BYTES`, so that of a
long one only the end is sent: metrics.jsonl, metrics.jsonl.0001, ..., one behind the other."""
PIECE_BYTES = 1 << 23
PIECE_NAME = re.compile(r"(metrics|timing)\.jsonl(\.\d{4,})?")
FILE_NAME = re.compile(r"((checkpoints|state)/)?(?!\.|run\.lock$)[^/\0]+(?<!\.tmp)")
"""Of the files that are mirrored: those of a run directory, without its lock and what a crash left half written."""


def piece_name(name: str, number: int) -> str:
    """Of a growing file; the first has the file's own name."""
    return f"{name}.{number:04d}" if number else name


def join_pieces(name: str, get: Callable[[str], bytes | None]) -> bytes | None:
    """A growing file from its pieces.

    Args:
        name: of the file.
        get: gives a piece by name; None: there is none.

    Returns:
        Its bytes; None: there is no such file. A piece counts where the one before it is full: after a file was cut,
        later ones may still stand there.
    """
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == PIECE_BYTES:
        piece = get(piece_name(name, len(pieces)))
        if piece is None:
            break
        pieces.append(piece)
    return b"".join(pieces) if pieces else None


@dataclass(kw_only=True, slots=True, frozen=True)
class Content:
    """Bytes that a file may have."""

    sha256: str
    num_bytes: int
    iteration: int | None = None
    """Of the run's state only."""


@dataclass(kw_only=True, slots=True)
class FileList:
    """What the mirror holds."""

    contents: dict[str, list[Content]] = field(default_factory=dict)
    """By name; several while it is being replaced."""
    unsure: set[str] = field(default_factory=set)
    """Those that may not have arrived yet."""
    leaving: set[str] = field(default_factory=set)
    """Those that the newest state does not know any more; removed once it is there."""

    def sure(self, name: str) -> Content | None:
        """What a file has for certain; None if that is not known."""
        contents = self.contents.get(name, [])
        return contents[0] if len(contents) == 1 and name not in self.unsure else None

    def drop(self, name: str) -> None:
        """Takes a file out of the list."""
        self.contents.pop(name, None)
        self.unsure.discard(name)

    def newest_iteration(self) -> int:
        """Of the state that may be there; -1: none."""
        return max((one.iteration or 0 for one in self.contents.get(STATE_NAME, [])), default=-1)

    def encode(self) -> bytes:
        """As mirror/files.json has it."""
        contents = {name: [asdict(one) for one in self.contents[name]] for name in sorted(self.contents)}
        lists = {"contents": contents, "unsure": sorted(self.unsure), "leaving": sorted(self.leaving)}
        return (json.dumps({"format": 1, **lists}, indent=1) + "\n").encode()


def read_list(place: Place) -> FileList:
    """The mirror's list; an empty one in a place that was never used.

    Raises:
        RunError: it is damaged, or missing beside a run.
    """
    where = f"{place.where}{LIST_NAME}"
    found = place.get(LIST_NAME)
    if found is None:
        if place.has(STATE_NAME):
            raise RunError(f"{where} is missing, and a run stands there; use another run= name or trainer.sync_uri")
        return FileList()
    try:
        lists = json.loads(found.data)
        contents = {name: [Content(**one) for one in every] for name, every in lists["contents"].items()}
        result = FileList(contents=contents, unsure=set(lists["unsure"]), leaving=set(lists["leaving"]))
        if lists["format"] != 1 or not all(FILE_NAME.fullmatch(name) for name in (*contents, *result.leaving)):
            raise ValueError("of another version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{where} is damaged or of a newer version; continue from a whole run directory with another "
            "trainer.sync_uri, or use another run= name"
        ) from error
    return result
