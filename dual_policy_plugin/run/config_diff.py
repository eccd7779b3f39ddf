"""What differs between the config a run was made by and the config of now, and what is added to it; used by
`directory.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.files import encode_json

_NUM_KEYS_SHOWN = 5


def diff_configs(old_yaml: str, new_yaml: str, path: Path) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ, each with its old and new value, in the order of the new config.

    A key that is missing and one that is null are the same: both mean the default.

    Args:
        old_yaml: the stored text.
        new_yaml: the text of now.
        path: where the old one is from, for the error.
    """
    try:
        old = _flatten(OmegaConf.to_container(OmegaConf.create(old_yaml), resolve=False))
    except (OmegaConfBaseException, YAMLError) as error:
        raise RunError(f"{path} cannot be read as YAML; restore it, or use another run= name") from error
    new = _flatten(OmegaConf.to_container(OmegaConf.create(new_yaml), resolve=False))
    return {key: (old.get(key), new.get(key)) for key in {**new, **old} if old.get(key) != new.get(key)}


def add_to_config(text: str, key: str, value: Mapping[str, Any]) -> str:
    """The YAML text with `value` at a dotted key, in place of what stood there."""
    cfg = OmegaConf.create(text)
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return OmegaConf.to_yaml(cfg)


def show_diff(changes: Mapping[str, tuple[object, object]]) -> str:
    """The first few changes on one line as `key: old -> new`, then the count of the others."""
    shown = [f"{key}: {_show(old)} -> {_show(new)}" for key, (old, new) in list(changes.items())[:_NUM_KEYS_SHOWN]]
    if len(changes) > _NUM_KEYS_SHOWN:
        shown.append(f"and {len(changes) - _NUM_KEYS_SHOWN} more")
    return ", ".join(shown)


def _show(value: object) -> str:
    text = encode_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(value: Any, prefix: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted key; lists are leaves, empty mappings have none."""
    if isinstance(value, dict):
        leaves: dict[str, object] = {}
        for key, item in value.items():
            leaves.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return leaves
    return {prefix: value}
