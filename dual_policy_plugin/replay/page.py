"""Writes a Recording as one HTML file that needs no network: the parts in `assets/`, and the games as JSON inside.

Arrays are base64 of little-endian numbers, a third of what their digits would take.
"""

from __future__ import annotations

import base64
import html
import json
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.replay.record import Episode, Recording
from dual_policy_plugin.report.tables import printable

PAGE_NAME = "replay.html"
SCRIPTS = ("data.js", "board.js", "chart.js", "player.js")
KINDS = {"uint8": "u8", "uint16": "u16", "float32": "f32"}
DIGEST_LETTERS = 12


def write_page(recording: Recording) -> bytes:
    """The page of a recording."""
    names = [printable(policy.name) for policy in recording.policies]
    parts = {
        "TITLE": html.escape(f"{names[0]} against {names[1]}: replay"),
        "STYLE": _asset("replay.css"),
        "DATA": embed_json(page_data(recording)),
        "SCRIPT": "{\n" + "\n".join(map(_asset, SCRIPTS)) + "}\n",  # a block: nothing of it is global
    }
    before, *rest = _asset("replay.html").split("@@")
    page = [before]
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        page += [parts[name], text]
    return "".join(page).encode()


def embed_json(value: Any) -> str:
    """`value` as JSON that may stand in a script element, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(recording: Recording) -> dict[str, Any]:
    """What the page's script reads."""
    return {
        "env": recording.env,
        "actions": list(recording.actions),
        "seed": recording.seed,
        "capacity": recording.capacity,
        "teams": list(recording.teams),
        "policies": [_policy(policy) for policy in recording.policies],
        "episodes": [_episode(episode) for episode in recording.episodes],
    }


def _policy(policy: PinnedPolicy) -> dict[str, str]:
    digest = "" if policy.script is not None else policy.sha256[:DIGEST_LETTERS]
    return {"name": printable(policy.name), "uri": printable(policy.uri), "digest": digest}


def _episode(episode: Episode) -> dict[str, Any]:
    frames = episode.frames
    return {
        "start": episode.start,
        "seats": list(episode.policy_of_seat),
        "share": episode.share,
        "height": frames.height,
        "width": frames.width,
        "walls": frames.walls,
        "mines": frames.mines,
        "altars": frames.altars,
        "state": {name: _packed(values) for name, values in frames.state.items()},
        **{name: _packed(getattr(frames, name)) for name in ("cells", "facings", "actions", "returns", "stocks")},
    }


def _packed(array: NDArray[Any]) -> dict[str, str]:
    """The numbers by their kind; those of 16 bits in 8 where they fit."""
    if array.dtype == np.uint16 and (array.size == 0 or array.max() < 256):
        array = array.astype(np.uint8)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {KINDS[array.dtype.name]: base64.b64encode(data).decode("ascii")}


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")
