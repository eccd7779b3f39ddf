"""Binding by names: an env that numbers things otherwise gets the same decisions; other names are an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.errors import SpacesError
from dual_policy_plugin.policies.binding import BoundPolicy, bind_policy
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.types import ObservationSpace

ACTIONS = ("noop", "north", "south", "attack")
WINDOW = ObservationSpace(
    kind="window",
    shape=(32,),
    features=("empty", "wall", "mine", "ally", "foe"),
    window=(5, 5),
    own=("ore", "hearts", "time"),
    scales=(3.0, 8.0, 255.0),
)
TOKENS = ObservationSpace(
    kind="tokens", shape=(12, 3), features=("type", "ore", "hp"), window=(5, 5), scales=(1.0, 10.0, 100.0)
)
VECTOR = ObservationSpace(kind="vector", shape=(4,), features=("x", "y", "dx", "dy"))

ENV_ACTIONS = ("attack", "noop", "south", "north")
ENV_WINDOW = replace(
    WINDOW,
    features=("empty", "foe", "wall", "ally", "mine"),
    own=("time", "ore", "hearts"),
    scales=(1.0, 1.0, 1.0),
)
ENV_TOKENS = replace(TOKENS, features=("hp", "type", "ore"), scales=(1.0, 1.0, 1.0))
ENV_VECTOR = replace(VECTOR, features=("dy", "x", "y", "dx"))
PAIRS = {"window": (WINDOW, ENV_WINDOW), "tokens": (TOKENS, ENV_TOKENS), "vector": (VECTOR, ENV_VECTOR)}

# where each of the policy's names stands in the env, worked by hand
FEATURE_IN_ENV = {"window": [0, 2, 4, 3, 1], "tokens": [1, 2, 0], "vector": [1, 2, 3, 0]}
ACTION_IN_ENV = [1, 3, 2, 0]


def observations(kind: str, num_rows: int = 64) -> tuple[Tensor, Tensor]:
    """Observations of the same moments, as the policy numbers them and as the env does."""
    generator = torch.Generator().manual_seed(5)
    if kind == "vector":
        own = torch.randn(num_rows, 4, generator=generator)
        env = torch.empty_like(own)
        env[:, FEATURE_IN_ENV["vector"]] = own
        return own, env
    code = torch.tensor(FEATURE_IN_ENV[kind], dtype=torch.uint8)
    if kind == "tokens":
        own = torch.randint(0, 3, (num_rows, 12, 3), generator=generator, dtype=torch.uint8)
        own[:, :, 0] = torch.randint(0, 5, (num_rows, 12), generator=generator, dtype=torch.uint8) * 16
        own[:, 3, 0] = 0xFE
        env = own.clone()
        env[:, :, 1] = code[own[:, :, 1].long()]
        own[:, 9:] = env[:, 9:] = 0xFF
        return own, env
    own = torch.randint(0, 5, (num_rows, 32), generator=generator, dtype=torch.uint8)
    own[:, 25:28] = torch.randint(0, 256, (num_rows, 3), generator=generator, dtype=torch.uint8)
    own[:, 28:] = 0
    env = code[own.long().clamp(max=4)]
    env[:, 12] = own[:, 12]  # the centre of 5 x 5 carries the facing
    env[:, [26, 27, 25]] = own[:, 25:28]  # ore, hearts, time stand at 1, 2, 0 in the env
    env[:, 28:] = 0
    return own, env


def packed(agent: str, space: ObservationSpace) -> nn.Module:
    torch.manual_seed(7)
    policy = build_policy(agent, {"hidden_size": 16}, space, ACTIONS).requires_grad_(False)
    policy.pack()  # type: ignore[operator]
    return policy


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("agent", ["fast", "mlp"])
def test_another_order_in_the_env_gives_the_same_decisions(kind: str, agent: str) -> None:
    own_space, env_space = PAIRS[kind]
    policy = packed(agent, own_space)
    bound = bind_policy(
        policy, own_space=own_space, own_actions=ACTIONS, env_space=env_space, env_actions=ENV_ACTIONS, where="x"
    )
    assert isinstance(bound, BoundPolicy)
    assert bound.state_size == policy.state_size
    own, env = observations(kind)
    state = torch.randn(64, policy.state_size, generator=torch.Generator().manual_seed(1))
    logits, values, next_state = policy.forward_step(own, state)
    bound_logits, bound_values, bound_state = bound.forward_step(env, state)
    assert torch.equal(bound_logits[:, ACTION_IN_ENV], logits)
    assert torch.equal(bound_values, values)
    assert torch.equal(bound_state, next_state)
    assert not torch.equal(bound_logits, logits)  # the order did matter
    assert not torch.equal(policy.forward_step(env, state)[1], values)

    dones = torch.zeros(4, 16, dtype=torch.bool)
    dones[1, 3] = True
    logits, values = policy.forward_segment(own.view(4, 16, *own.shape[1:]), state[:16], dones)
    bound_logits, bound_values = bound.forward_segment(env.view(4, 16, *env.shape[1:]), state[:16], dones)
    assert torch.equal(bound_logits[..., ACTION_IN_ENV], logits)
    assert torch.equal(bound_values, values)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_policy_that_fits_comes_back_unwrapped(kind: str) -> None:
    space = PAIRS[kind][0]
    policy = packed("mlp", space)
    for env_space in (space, replace(space, scales=())):  # scales are the policy's own business
        bound = bind_policy(
            policy, own_space=space, own_actions=ACTIONS, env_space=env_space, env_actions=ACTIONS, where="x"
        )
        assert bound is policy


class Seen(nn.Module):
    """Answers with what it saw."""

    state_size = 0

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.obs = obs
        return torch.arange(4.0).expand(len(obs), 4), torch.zeros(len(obs)), state


def test_only_the_order_of_actions_may_differ() -> None:
    bound = bind_policy(
        Seen(), own_space=WINDOW, own_actions=ACTIONS, env_space=WINDOW, env_actions=ENV_ACTIONS, where="x"
    )
    obs = observations("window", 2)[0]
    logits, _, _ = bound.forward_step(obs, torch.zeros(2, 0))
    assert logits.tolist() == [[3.0, 0.0, 2.0, 1.0]] * 2  # attack, noop, south, north
    assert torch.equal(bound.policy.obs, obs)


def test_the_centre_cell_and_the_padding_are_left_alone() -> None:
    bound = bind_policy(
        Seen(), own_space=WINDOW, own_actions=ACTIONS, env_space=ENV_WINDOW, env_actions=ACTIONS, where="x"
    )
    env = torch.full((1, 32), 1, dtype=torch.uint8)  # foe everywhere, in the env's numbers
    env[0, 25:] = torch.tensor([10, 20, 30, 1, 2, 3, 4], dtype=torch.uint8)
    bound.forward_step(env, torch.zeros(1, 0))
    expected = [4] * 12 + [1] + [4] * 12 + [20, 30, 10] + [1, 2, 3, 4]
    assert bound.policy.obs[0].tolist() == expected


def test_padding_tokens_stay_padding() -> None:
    bound = bind_policy(
        Seen(), own_space=TOKENS, own_actions=ACTIONS, env_space=ENV_TOKENS, env_actions=ACTIONS, where="x"
    )
    env = torch.full((1, 12, 3), 0xFF, dtype=torch.uint8)
    env[0, 0] = torch.tensor([0x02, 2, 2])  # ore = 2 at row 0, column 2
    bound.forward_step(env, torch.zeros(1, 0))
    assert bound.policy.obs[0].tolist() == [[2, 1, 2]] + [[0xFF] * 3] * 11


@pytest.mark.parametrize(
    ("env_space", "env_actions", "reason"),
    [
        (WINDOW, (*ACTIONS, "jump"), "it has 4 actions, the env 5; only the env has the actions jump"),
        (WINDOW, ("noop", "north", "south"), "it has 4 actions, the env 3; only the policy has the actions attack"),
        (WINDOW, ("noop", "north", "south", "use"), "only the policy has the actions attack; only the env has the act"),
        (replace(WINDOW, features=(*WINDOW.features, "altar")), ACTIONS, "it has 5 features, the env 6; only the env"),
        (
            replace(WINDOW, own=("ore", "hearts", "hp")),
            ACTIONS,
            "the policy has the own-state bytes time; only the env",
        ),
        (replace(WINDOW, shape=(40,)), ACTIONS, "its shape is (32,), the env's (40,)"),
        (replace(WINDOW, window=(3, 3)), ACTIONS, "its window is (5, 5), the env's (3, 3)"),
        (VECTOR, ACTIONS, "its observations are window uint8 (32,), the env's vector float32 (4,); take"),
    ],
)
def test_other_names_are_an_error_that_lists_them(
    env_space: ObservationSpace, env_actions: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(SpacesError) as caught:
        bind_policy(
            Seen(), own_space=WINDOW, own_actions=ACTIONS, env_space=env_space, env_actions=env_actions, where="m.pt"
        )
    message = str(caught.value)
    assert message.startswith("m.pt does not fit the env: ")
    assert reason in message
    assert "\n" not in message


def test_a_long_difference_is_cut_short() -> None:
    features = tuple(f"obs_{i}" for i in range(100))
    space = ObservationSpace(kind="vector", shape=(100,), features=features)
    other = replace(space, features=tuple(f"in_{i}" for i in range(100)))
    with pytest.raises(SpacesError, match=r"features obs_0, obs_1, obs_2, obs_3, obs_4 and 95 more;"):
        bind_policy(Seen(), own_space=space, own_actions=ACTIONS, env_space=other, env_actions=ACTIONS, where="x")
