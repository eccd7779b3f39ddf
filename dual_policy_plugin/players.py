"""Who plays in a run: the policies that its config names, pinned and locked, loaded, and each in its role.

Between `policies/npcs.py`, which pins and loads one at a time, and `parts.py`, which seats them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dual_policy_plugin.config import Config
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.npc.holds import Hold
from dual_policy_plugin.npc.lock import LockEntry, check_held_out
from dual_policy_plugin.npc.resolver import PinnedPolicy, hold_pinned, unique_names
from dual_policy_plugin.policies.npcs import Pins, Wish, load_npc, pin_policies
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.roster import Entry
from dual_policy_plugin.types import EnvSpec


@dataclass(kw_only=True, slots=True, frozen=True)
class Players:
    """Every policy that a run was given, as it was pinned; the same on every rank and after every restart."""

    wishes: list[Wish]
    """What the config asks for."""
    pins: Pins
    """What that came to."""
    hold: Hold
    """Keeps them in the cache while the run lives."""

    @property
    def npcs(self) -> list[PinnedPolicy]:
        """The NPCs of the config."""
        return self.pins.of_role("npc", self.wishes)

    @property
    def initial(self) -> PinnedPolicy | None:
        """What trainer.initial_policy named."""
        return next(iter(self.pins.of_role("initial", self.wishes)), None)

    @property
    def lock(self) -> tuple[LockEntry, ...]:
        """All of them, for the run's record."""
        return self.pins.entries

    def load(self, role: str, config: Config, spec: EnvSpec, *, dtype: torch.dtype, device: torch.device) -> list[Npc]:
        """The policies of a role, frozen and bound to the env.

        Raises:
            CheckpointError: one cannot be read, or was made for another env.
        """
        return [
            load_npc(wish.source, pin, spec, config.agent, dtype=dtype, device=device)
            for wish, found in zip(self.wishes, self.pins.policies, strict=True)
            for pin in found
            if wish.role == role
        ]

    def entries(self) -> list[Entry]:
        """The NPCs of the config, as a roster begins with them."""
        return [
            Entry(
                name=pin.name,
                sha256=pin.sha256,
                weight=1.0 if wish.source.weight is None else wish.source.weight,
                born=-place if wish.source.type == "latest" else 0,  # that selector gives the newest first
            )
            for wish, found in zip(self.wishes, self.pins.policies, strict=True)
            for place, pin in enumerate(found)
            if wish.role == "npc"
        ]


def pin_players(config: Config, run_path: Path | None, ranks: Ranks, device: torch.device, stack: ExitStack) -> Players:
    """Pins what the config names, and holds it in the cache until `stack` is left.

    Raises:
        NpcError: a policy cannot be had, or is not the one that the run began with; on every rank.
        ConfigError: one is named twice, or is held out and an NPC.
    """
    wishes = _wishes(config)
    pins = pin_policies(
        wishes, run_path, given=config.trainer.dual_policy.lock, seed=config.seed, ranks=ranks, device=device
    )
    check_held_out(pins.of_role("held_out", wishes), _first_npcs(config, wishes, pins))
    hold = stack.enter_context(hold_pinned([one for found in pins.policies for one in found]))
    return Players(wishes=wishes, pins=pins, hold=hold)


def _wishes(config: Config) -> list[Wish]:
    """Every policy that the config names, with what it is to the run."""
    wishes = [Wish(source=source, role=role) for role, source in config.policies]
    asked = [wish.requested for wish in wishes if wish.role == "npc"]
    if twice := next((one for one in asked if asked.count(one) > 1), None):
        raise ConfigError(
            f"trainer.dual_policy.pool names {twice} twice; name it once, with a weight if it is to count"
        )
    return wishes


def _first_npcs(config: Config, wishes: list[Wish], pins: Pins) -> dict[str, str]:
    """sha256 -> name of the NPCs that a run begins with; where self-play has no other, the learner as it begins."""
    is_learner = config.trainer.dual_policy.self_play is not None and not pins.of_role("npc", wishes)
    return {pin.sha256: pin.name for pin in pins.of_role("initial" if is_learner else "npc", wishes)}


def choose_opponents(
    config: Config, npcs: list[Npc], named: list[Npc], held_out: list[Npc], assignment: Assignment
) -> tuple[list[Npc], frozenset[str]]:
    """Whom the learner is evaluated against, each with a name of its own, and which of those names are held out.

    Raises:
        ConfigError: there is no seat for an opponent that was named.
    """
    for key, uris in (("opponents", config.evals.opponents), ("held_out", config.evals.held_out)):
        if uris and assignment.num_npc == 0:
            raise ConfigError(
                f"evals.{key}={uris} would find no seat: all agents learn; "
                f"switch an NPC on (trainer.dual_policy), or use evals.{key}=[]"
            )
    opponents = named or npcs
    interval = config.trainer.evaluate_interval
    if interval and config.evals.episodes and not opponents and not held_out:
        mend = (
            "name some in evals.opponents, for example [builtin://arena/medium]" if assignment.num_npc else "use null"
        )
        raise ConfigError(
            f"trainer.evaluate_interval={interval} has nobody to evaluate against, no NPC is named; {mend}"
        )
    names = unique_names([npc.name for npc in [*opponents, *held_out]])
    renamed = [replace(npc, name=name) for npc, name in zip([*opponents, *held_out], names, strict=True)]
    return renamed, frozenset(names[len(opponents) :])
