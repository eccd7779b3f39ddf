"""Train a new policy against a frozen one in any multi-agent environment: the package's public face.

Importing this is light (no torch): every Hydra app that has the plugin installed does so at its start. What is heavy
is imported when it is asked for. To train from Python: `from dual_policy_plugin.train import train`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dual_policy_plugin.errors import (
    CheckpointError,
    ConfigError,
    DigestError,
    DivergedError,
    DualPolicyError,
    EnvError,
    NpcError,
    NpcNotFoundError,
    RunError,
    SpacesError,
)

if TYPE_CHECKING:
    from dual_policy_plugin.dual_policy import DualPolicy
    from dual_policy_plugin.foreign.spaces import save_policy
    from dual_policy_plugin.hydra_app.dual_policy_node import load_dual_policy
    from dual_policy_plugin.hydra_app.loading import load_config
    from dual_policy_plugin.policies.loading import load_policy_from_checkpoint
    from dual_policy_plugin.types import ObservationSpace

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "ConfigError",
    "DigestError",
    "DivergedError",
    "DualPolicy",
    "DualPolicyError",
    "EnvError",
    "NpcError",
    "NpcNotFoundError",
    "ObservationSpace",
    "RunError",
    "SpacesError",
    "load_config",
    "load_dual_policy",
    "load_policy_from_checkpoint",
    "save_policy",
]

_LAZY = {
    "DualPolicy": "dual_policy_plugin.dual_policy",
    "ObservationSpace": "dual_policy_plugin.types",
    "load_config": "dual_policy_plugin.hydra_app.loading",
    "load_dual_policy": "dual_policy_plugin.hydra_app.dual_policy_node",
    "load_policy_from_checkpoint": "dual_policy_plugin.policies.loading",
    "save_policy": "dual_policy_plugin.foreign.spaces",
}


if not TYPE_CHECKING:  # type checkers read the imports above

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_LAZY[name]), name)
