"""Binds a policy to an env by names: the env may number features and actions in another order than the policy learned.

Stands between `loading.py` and whoever runs the policy. Where both agree on every number the policy comes back as it
is; where only the order differs it is wrapped; where the names differ it is an error that lists the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dual_policy_plugin.checkpoint import short
from dual_policy_plugin.errors import SpacesError
from dual_policy_plugin.types import ObservationSpace

_NUM_CODES = 256


class BoundPolicy(nn.Module):
    """A policy that sees an env's observations in its own order of features, and answers in the env's order of actions.

    Attributes:
        policy: the policy inside, in its own spaces.
        state_size: as Policy.state_size.
    """

    columns: Tensor | None
    offsets: Tensor | None
    table: Tensor | None
    action_columns: Tensor | None

    def __init__(
        self, policy: nn.Module, *, columns: Tensor | None, codes: Tensor | None, action_columns: Tensor | None
    ) -> None:
        """Wraps `policy`.

        Args:
            policy: follows the Policy protocol.
            columns: (num_entries,) int64, which entry of the env's flat observation goes where; None: all in place.
            codes: (num_entries, 256) uint8, what each byte becomes, after `columns`; None: all stay.
            action_columns: (num_actions,) int64, which of the policy's logits each action of the env has; None: all
                in place.
        """
        super().__init__()
        self.policy = policy
        self.state_size = policy.state_size
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("action_columns", action_columns, persistent=False)
        offsets = table = None
        if codes is not None:  # few rows differ: keep each once, small enough to stay in the cache
            rows, row_of_entry = torch.unique(codes, dim=0, return_inverse=True)
            offsets, table = (row_of_entry * _NUM_CODES).to(torch.int32), rows.flatten()
        self.register_buffer("offsets", offsets, persistent=False)  # (num_entries,) int32
        self.register_buffer("table", table, persistent=False)  # (num_distinct_rows * 256,) uint8

    def pack(self) -> None:
        """As the policy's own `pack`, where it has one."""
        if hasattr(self.policy, "pack"):
            self.policy.pack()  # type: ignore[operator]

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Policy.forward_step, in the env's spaces."""
        logits, values, state = self.policy.forward_step(self.translate(obs, 1), state)  # type: ignore[operator]
        return self._reorder(logits), values, state

    def forward_segment(self, obs: Tensor, state: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        """As Policy.forward_segment, in the env's spaces."""
        logits, values = self.policy.forward_segment(self.translate(obs, 2), state, dones)  # type: ignore[operator]
        return self._reorder(logits), values

    def translate(self, obs: Tensor, num_lead: int) -> Tensor:
        """Observations (*lead, *shape) of the env, with num_lead leading dimensions, as the policy knows them."""
        flat = obs.flatten(num_lead)
        if self.columns is not None:
            flat = flat.index_select(num_lead, self.columns)
        if self.table is not None and self.offsets is not None:
            index = flat + self.offsets  # int32
            flat = self.table.index_select(0, index.flatten()).view(flat.shape)
        return flat.view(obs.shape)

    def _reorder(self, logits: Tensor) -> Tensor:
        return logits if self.action_columns is None else logits.index_select(-1, self.action_columns)


def bind_policy(
    policy: nn.Module,
    *,
    own_space: ObservationSpace,
    own_actions: tuple[str, ...],
    env_space: ObservationSpace,
    env_actions: tuple[str, ...],
    where: str,
) -> nn.Module:
    """`policy` itself where it and the env number everything alike, else a BoundPolicy around it.

    Scales are the policy's own business: they belong to the space that its net was built with.

    Args:
        policy: follows the Policy protocol, made for own_space and own_actions.
        own_space: what the policy was made to see.
        own_actions: the policy's actions, in the order of its logits.
        env_space: what the env shows.
        env_actions: the env's actions, in the order of their numbers.
        where: the policy's file, for messages.

    Raises:
        SpacesError: the sets of names, the kind, the shape or the dtype differ.
    """
    if own_space.kind != env_space.kind:  # then nothing else agrees either
        raise SpacesError(
            f"{where} does not fit the env: its observations are {_show(own_space)}, "
            f"the env's {_show(env_space)}; take a policy made for this env"
        )
    if differences := _differences(own_space, own_actions, env_space, env_actions):
        raise SpacesError(f"{where} does not fit the env: {'; '.join(differences)}; take a policy made for this env")
    columns = codes = action_columns = None
    if env_actions != own_actions:
        action_columns = _positions(env_actions, own_actions)  # env action a has logit action_columns[a]
    if env_space.kind == "vector":
        columns = _positions(own_space.features, env_space.features)
    else:
        columns, codes = _byte_maps(own_space, env_space)
    columns = None if columns is None or torch.equal(columns, torch.arange(len(columns))) else columns
    if env_space.features == own_space.features:
        codes = None
    if columns is None and codes is None and action_columns is None:
        return policy
    return BoundPolicy(policy, columns=columns, codes=codes, action_columns=action_columns)


def _byte_maps(own: ObservationSpace, env: ObservationSpace) -> tuple[Tensor, Tensor]:
    """`columns` and `codes` of BoundPolicy for a window or for tokens."""
    num_bytes = torch.Size(env.shape).numel()
    columns = torch.arange(num_bytes)  # (num_bytes,)
    codes = torch.arange(_NUM_CODES, dtype=torch.uint8).repeat(num_bytes, 1)  # (num_bytes, 256)
    feature_code = codes[0].clone()
    feature_code[: len(env.features)] = _positions(env.features, own.features).to(torch.uint8)
    if env.kind == "tokens":
        codes[1::3] = feature_code  # (location, feature, value): location and value stay
        return columns, codes
    height, width = env.window
    codes[: height * width] = feature_code
    # the centre cell is the agent itself: its byte is no feature's code (the arena writes the facing there)
    centre = (height // 2) * width + width // 2
    codes[centre] = torch.arange(_NUM_CODES, dtype=torch.uint8)
    columns[height * width : height * width + len(env.own)] = height * width + _positions(own.own, env.own)
    return columns, codes


def _positions(names: Sequence[str], among: Sequence[str]) -> Tensor:
    """(len(names),) int64: where each name stands in `among`."""
    place = {name: i for i, name in enumerate(among)}
    return torch.tensor([place[name] for name in names], dtype=torch.int64)


def _differences(
    own: ObservationSpace, own_actions: tuple[str, ...], env: ObservationSpace, env_actions: tuple[str, ...]
) -> list[str]:
    """What keeps a policy from being bound, in words; empty if nothing does."""
    pairs = (
        ("dtype", own.dtype, env.dtype),
        ("shape", own.shape, env.shape),
        ("window", own.window, env.window),
    )
    found = [f"its {what} is {mine}, the env's {theirs}" for what, mine, theirs in pairs if mine != theirs]
    names = (
        ("features", own.features, env.features),
        ("own-state bytes", own.own, env.own),
        ("actions", own_actions, env_actions),
    )
    for what, mine, theirs in names:
        if len(mine) != len(theirs):
            found.append(f"it has {len(mine)} {what}, the env {len(theirs)}")
        if only_mine := [name for name in mine if name not in set(theirs)]:
            found.append(f"only the policy has the {what} {_few(only_mine)}")
        if only_theirs := [name for name in theirs if name not in set(mine)]:
            found.append(f"only the env has the {what} {_few(only_theirs)}")
    return found


def _show(space: ObservationSpace) -> str:
    return f"{space.kind} {space.dtype} {space.shape}"


def _few(names: list[str]) -> str:
    """Up to five names and the count of the others."""
    others = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(short(name) for name in names[:5]) + others
