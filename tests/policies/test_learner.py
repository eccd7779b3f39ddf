"""The learner's normalization: right far from zero, of acting agents only, and in the net's own order of features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dual_policy_plugin.config import AgentConfig
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.foreign.spaces import save_policy
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve
from dual_policy_plugin.policies.binding import BoundPolicy
from dual_policy_plugin.policies.build import architecture, given_architectures
from dual_policy_plugin.policies.learner import Learner, build_learner
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.types import EnvSpec, ObservationSpace
from tests.harness import CPU

HORIZON, NUM_ROWS = 32, 64


def spec(features: tuple[str, ...]) -> EnvSpec:
    space = ObservationSpace(kind="vector", shape=(len(features),), features=features)
    return EnvSpec(
        name="toy", num_envs=NUM_ROWS, num_agents=1, observation_space=space, actions=("a", "b"),
        max_episode_steps=9, has_weights=True,
    )  # fmt: skip


def learner_of(features: tuple[str, ...], initial: PinnedPolicy | None = None) -> Learner:
    return build_learner(
        AgentConfig(name="mlp", args={"hidden_size": 8}), spec(features), seed=1, initial=initial, initial_agent=None,
        dtype=torch.float32, device=CPU,
    )  # fmt: skip


def experience_of(obs: Tensor) -> Experience:
    """All rows act and see `obs` (HORIZON + 1, NUM_ROWS, num_features)."""
    features = tuple(f"f{i}" for i in range(obs.shape[2]))
    experience = allocate_experience(spec(features), horizon=HORIZON, num_rows=NUM_ROWS, state_size=0, device=CPU)
    experience.obs.copy_(obs)
    experience.weights.fill_(1.0)
    return experience


def test_statistics_of_features_far_from_zero() -> None:
    torch.manual_seed(0)
    learner = learner_of(("f0", "f1"))
    seen = []
    for _ in range(3):
        obs = torch.randn(HORIZON + 1, NUM_ROWS, 2) * torch.tensor([0.5, 0.1]) + torch.tensor([20_000.0, -5000.0])
        learner.update_statistics(experience_of(obs), Ranks())
        seen.append(obs[:-1].flatten(0, 1).double())
    data = torch.cat(seen)
    torch.testing.assert_close(learner.inner.encoder.mean.double(), data.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(learner.inner.encoder.var.double(), data.var(0, unbiased=False), rtol=0.02, atol=0)


def test_empty_seats_have_no_say() -> None:
    learner = learner_of(("f0",))
    experience = experience_of(torch.full((HORIZON + 1, NUM_ROWS, 1), 3.0))
    experience.obs[:, NUM_ROWS // 2 :] = 0.0  # what an empty seat sees
    experience.weights[:, NUM_ROWS // 2 :] = 0.0
    learner.update_statistics(experience, Ranks())
    assert learner.inner.encoder.mean.tolist() == [3.0]
    assert float(learner.inner.encoder.count) == HORIZON * NUM_ROWS / 2


def test_an_initial_policy_keeps_its_own_order_of_features(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    path.write_bytes(learner_of(("hearts", "ore")).encode({"epoch": 0, "step": 0}))
    learner = learner_of(("ore", "hearts"), resolve(str(path)))
    assert isinstance(learner.policy, BoundPolicy)
    obs = torch.tensor([5.0, -2.0]).expand(HORIZON + 1, NUM_ROWS, 2)  # ore 5, hearts -2
    learner.update_statistics(experience_of(obs), Ranks())
    assert learner.inner.encoder.mean.tolist() == [-2.0, 5.0]


@pytest.mark.parametrize(
    ("made_with", "line"),
    [
        ({"hidden_size": 16}, "another net than agent=mlp agent.hidden_size=8; set agent=mlp agent.hidden_size=16$"),
        ({}, "another net than agent=mlp agent.hidden_size=8; set agent=mlp without agent.hidden_size$"),
    ],
)
def test_a_checkpoint_of_another_size_is_told_with_both_sizes(
    tmp_path: Path, made_with: dict[str, int], line: str
) -> None:
    made = build_learner(
        AgentConfig(name="mlp", args=made_with), spec(("f0",)), seed=1, initial=None, initial_agent=None,
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    path = tmp_path / "made.safetensors"
    path.write_bytes(made.encode({}))
    with pytest.raises(ConfigError, match=line):
        learner_of(("f0",), resolve(str(path)))


class PlaysOnly(torch.nn.Linear):
    """A net that may be an NPC, and can do no more."""

    def __init__(self, observation_space: ObservationSpace, actions: tuple[str, ...]) -> None:
        super().__init__(observation_space.shape[0], len(actions))
        self.state_size = 0

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self(obs), torch.zeros(len(obs)), state


@pytest.mark.parametrize("has_initial", [False, True])
def test_a_net_that_cannot_learn_is_one_line(tmp_path: Path, has_initial: bool) -> None:
    space, saved = spec(("f0",)).observation_space, tmp_path / "a.safetensors"
    save_policy(saved, PlaysOnly(space, ("a", "b")), agent="plays_only", observation_space=space, actions=("a", "b"))
    with given_architectures({"plays_only": PlaysOnly}), pytest.raises(ConfigError) as caught:
        build_learner(
            AgentConfig(name="plays_only"), spec(("f0",)), seed=1, initial=resolve(str(saved)) if has_initial else None,
            initial_agent=None, dtype=torch.float32, device=CPU,
        )  # fmt: skip
    assert str(caught.value).startswith("agent.name=plays_only cannot learn: its net has no pack, forward_segment; ")


class TooFew(PlaysOnly):
    """Has every part, and gives one logit for two actions: it would train, and never take the second one."""

    def pack(self) -> None:
        pass

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, values, state = super().forward_step(obs, state)
        return logits[:, :1], values, state

    def forward_segment(self, obs: Tensor, state: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        return self(obs)[..., :1], obs[..., 0]


def test_a_net_that_answers_in_other_shapes_is_one_line() -> None:
    with given_architectures({"too_few": TooFew}), pytest.raises(ConfigError) as caught:
        build_learner(
            AgentConfig(name="too_few"), spec(("f0",)), seed=1, initial=None, initial_agent=None,
            dtype=torch.float32, device=CPU,
        )  # fmt: skip
    assert str(caught.value) == (
        "agent.name=too_few: the policy answers 2 rows with shapes ((2, 1), (2,), (2, 0)), expected "
        "((2, 2), (2,), (2, 0)); docs/own_architecture.md says what is expected"
    )


def test_an_installed_name_that_leads_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "nets-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nets\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dual_policy.policies]\nlost = no_such_module:Net\nfive = math:pi\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^agent=lost stands for no_such_module:Net, which cannot be loaded: No mod"):
        architecture("lost")
    with pytest.raises(ConfigError, match=r"^agent=five stands for math:pi, which is no callable; name a class there"):
        architecture("five")
