"""The ways by which a policy file comes in, and what a refusal must say: shared by the tests and by `make fuzz`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dual_policy_plugin.errors import CheckpointError
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.policies.loading import import_policy, load_policy, load_policy_from_checkpoint
from tests.security.mutations import ACTIONS, ARGS, SPACE


def load_for_run(path: Path) -> Any:
    """As a run does: resolved, pinned, verified, decoded, built, bound."""
    return load_policy(
        resolve(str(path)),
        observation_space=SPACE,
        actions=ACTIONS,
        default_agent="mlp",
        default_args=ARGS,
        device=torch.device("cpu"),
    )


def load_by_public_function(path: Path) -> Any:
    """As a user's own script does."""
    return load_policy_from_checkpoint(
        str(path), observation_space=SPACE, actions=ACTIONS, agent="mlp", agent_args=ARGS
    )


def convert(path: Path) -> Any:
    """As `dual-policy import` does."""
    new = path.with_name("new.safetensors")
    return import_policy(path, new, agent="mlp", args=ARGS, observation_space=SPACE, actions=ACTIONS)


DOORS: tuple[Callable[[Path], Any], ...] = (load_for_run, load_by_public_function, convert)


def complaint(path: Path, door: Callable[[Path], Any]) -> str | None:
    """What is wrong with how the file at `path` was met; None where it was refused with its name and a reason."""
    try:
        door(path)
    except CheckpointError as error:
        message = str(error)
    except Exception as error:  # any other kind is a defect
        return f"{type(error).__name__}: {error}"
    else:
        return "it was loaded"
    reason = message.split(str(path), 1)[-1].split("; what works", 1)[0].lstrip(": ")
    is_good = str(path) in message and len(reason) > 15 and "\n" not in message and len(message) < 900
    return None if is_good else f"poor message: {message!r}"


def complaints(files: Iterable[tuple[str, str, bytes]], canary: Path, folder: Path) -> list[str]:
    """What is wrong with how `files`, each by one of the doors in turn, were met; a canary that fired first of all.

    Args:
        files: (label, file name, bytes) of each.
        canary: what a file leaves if anything in it runs; its folder is empty before.
        folder: where the files are put, one after the other.
    """
    found = []
    for index, (label, name, data) in enumerate(files):
        path = folder / name
        path.write_bytes(data)
        if (problem := complaint(path, DOORS[index % len(DOORS)])) is not None:
            found.append(f"{label}: {problem}")
        path.unlink()
        if any(canary.parent.iterdir()) or "canary_module" in sys.modules:
            return [f"{label}: THE CANARY FIRED", *found]
    return found
