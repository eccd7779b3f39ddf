"""PPO finds known optima, and its pieces do what their formulas say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dual_policy_plugin.errors import DivergedError
from dual_policy_plugin.learning.ppo import FlatParameters, prepare_targets
from dual_policy_plugin.report.iteration import iteration_figures
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.run_state import Counters
from tests.harness import SETTINGS, MemoryTask, make_loop


@pytest.mark.parametrize("seed", range(5))
def test_bandit_reaches_its_optimum(seed: int) -> None:
    loop = make_loop(MemoryTask(32, 2, num_cues=4), agent="mlp", seed=seed, horizon=8)
    for _ in range(60):
        metrics = loop.iterate(3e-3)
    assert loop.num_iterations * 8 * 32 == 15_360  # learner steps
    assert metrics["dual_policy/policy_a_reward"] > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_memory_task_reaches_its_optimum(seed: int) -> None:
    loop = make_loop(MemoryTask(64, 2, delay=4), seed=seed, horizon=20)
    for _ in range(40):
        metrics = loop.iterate(5e-3)
    assert loop.num_iterations * 20 * 64 == 51_200  # learner steps
    assert metrics["dual_policy/policy_a_reward"] > 0.95


def test_memory_task_needs_memory() -> None:
    loop = make_loop(MemoryTask(64, 2, delay=4), agent="mlp", horizon=20)
    rewards = [loop.iterate(5e-3)["dual_policy/policy_a_reward"] for _ in range(40)]
    assert 0.4 < sum(rewards[-10:]) / 10 < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_sees_the_log_probs_of_the_rollout(dtype: torch.dtype) -> None:
    """With episode ends inside the segments: the update's recurrent state is the rollout's."""
    loop = make_loop(MemoryTask(16, 2, delay=4), horizon=17, dtype=dtype)
    loop.collect()
    loop.collect()  # now segments start inside episodes, from a state that is not zero
    experience = loop.experience
    assert experience.dones[:-1].any()
    assert experience.initial_state.abs().max() > 0
    logits, values = loop.mixed.learner.forward_segment(experience.obs[:-1], experience.initial_state, experience.dones)
    log_probs = logits.log_softmax(-1).gather(-1, experience.actions.unsqueeze(-1)).squeeze(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(log_probs.detach(), experience.log_probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.detach(), experience.values, rtol=tolerance, atol=tolerance)


def test_first_minibatch_has_ratio_one() -> None:
    loop = make_loop(MemoryTask(16, 2, delay=4), settings=replace(SETTINGS, num_minibatches=1))
    losses = loop.iterate(1e-3)
    assert abs(losses["approx_kl"]) < 1e-6
    assert losses["clipfrac"] == 0.0
    assert abs(losses["policy_loss"]) < 1e-5  # normalized advantages have mean zero


def test_target_kl_stops_the_updates_of_an_iteration() -> None:
    def moved(target_kl: float | None) -> float:
        loop = make_loop(
            MemoryTask(16, 2, delay=4), settings=replace(SETTINGS, num_minibatches=8, epochs=4, target_kl=target_kl)
        )
        before = loop.ppo.parameters.flat.detach().clone()
        loop.iterate(0.05)
        return float((loop.ppo.parameters.flat.detach() - before).norm())

    assert moved(1e-4) < 0.5 * moved(None)


def test_gradient_is_clipped() -> None:
    loop = make_loop(MemoryTask(16, 2), settings=replace(SETTINGS, num_minibatches=1, max_grad_norm=0.01))
    losses = loop.iterate(1e-3)
    assert losses["grad_norm"] > 0.01
    assert float(loop.ppo.parameters.grad.norm()) == pytest.approx(0.01, rel=1e-3)


def test_advantages_are_normalized_over_the_rollout() -> None:
    loop = make_loop(MemoryTask(16, 2, delay=4))
    loop.collect()
    targets = prepare_targets(loop.experience, SETTINGS, loop.ranks)
    assert float(targets.advantages.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(targets.advantages.std()) == pytest.approx(1.0, abs=1e-3)


def test_rows_of_weight_zero_do_not_train() -> None:
    """Whatever an empty seat holds, the update is the same, bit for bit."""
    parameters = []
    for garbage in (0.0, 1e6):
        loop = make_loop(MemoryTask(16, 2, delay=4))
        loop.collect()
        experience = loop.experience
        experience.weights = torch.ones_like(experience.rewards)
        experience.weights[:, 3] = 0.0
        experience.weights[:9, 7] = 0.0
        empty = experience.weights == 0
        experience.dones[empty] = True
        experience.dones[8, 7] = True
        experience.rewards[empty] = garbage
        experience.values[empty] = garbage / 2
        experience.log_probs[empty] = -garbage * 1e-7
        loop.ppo.update(experience, 1e-3)
        parameters.append(loop.ppo.parameters.flat.detach().clone())
    assert torch.equal(parameters[0], parameters[1])


def test_weights_that_the_last_step_broke_stop_the_run_in_the_same_iteration() -> None:
    """Loss and gradient are finite; nothing but the weights themselves says so."""
    loop = make_loop(MemoryTask(16, 2, delay=4), settings=replace(SETTINGS, epochs=1, num_minibatches=1))
    counters = Counters()

    def iterate() -> dict[str, float]:
        loop.collect()
        losses = loop.ppo.update(loop.experience, 1e-3)
        args = (loop.metrics, loop.experience, loop.env.spec, loop.ranks)
        return iteration_figures(counters, 1e-3, losses, *args)[0]

    weights = loop.ppo.parameters.flat.detach()
    assert iterate()["losses/weight_norm"] == pytest.approx(float(weights.square().sum().sqrt()), rel=1e-5)

    def overflow(*_: object) -> None:
        weights[3] = torch.inf

    loop.ppo.adam.register_step_post_hook(overflow)
    with pytest.raises(DivergedError, match=r"^iteration 2: losses/weight_norm is not finite"):
        iterate()


def test_explained_variance_by_hand() -> None:
    loop = make_loop(MemoryTask(16, 2, delay=4))
    loop.collect()
    targets = prepare_targets(loop.experience, SETTINGS, loop.ranks)
    residual = targets.returns - loop.experience.values
    expected = 1.0 - residual.var(unbiased=False) / targets.returns.var(unbiased=False)
    losses = loop.ppo.update(loop.experience, 0.0)
    torch.testing.assert_close(losses["explained_variance"], expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_views_of_one_tensor() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    flat = FlatParameters(module)
    assert flat.flat.numel() == sum(parameter.numel() for parameter in before)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    flat.flat.data.zero_()
    assert all(parameter.abs().max() == 0 for parameter in module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    assert flat.grad.abs().sum() > 0


def test_all_agents_learn_without_an_npc() -> None:
    loop = make_loop(MemoryTask(16, 3, delay=2), split=assign(3, 1.0))
    assert loop.mixed.pool is None
    metrics = loop.iterate(1e-3)
    assert metrics["dual_policy/policy_a_agent_count"] == 3
    assert not any("npc" in name or "win_rate" in name for name in metrics)


def test_a_rollout_in_which_no_learner_acted_changes_nothing() -> None:
    """All learner agents of a small env may be out for a whole rollout while the NPC's play on."""
    loop = make_loop(MemoryTask(8, 2))
    before = loop.ppo.parameters.flat.detach().clone()
    loop.collect()
    loop.experience.weights = torch.zeros_like(loop.experience.rewards)
    losses = loop.ppo.update(loop.experience, 1e-2)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert torch.equal(loop.ppo.parameters.flat, before)
