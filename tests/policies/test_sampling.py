"""Sampling by inversion: exact borders, masked actions, frequencies."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.policies.sampling import log_probs_of, most_likely_actions, sample_actions


def test_borders_of_a_known_distribution() -> None:
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    assert sample_actions(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 2]


def test_masked_actions_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(4096, 5)
    actions = sample_actions(logits, torch.arange(4096) / 4096)
    assert actions.bincount(minlength=5).tolist() == [0, 2048, 0, 2048, 0]


def test_log_probs() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    expected = torch.tensor([-1.3132616, -2.126928])
    torch.testing.assert_close(log_probs_of(logits, torch.tensor([0, 1])), expected)


def test_the_most_likely_action_is_the_first_of_the_greatest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -torch.inf, 3.0], [-1.0, -2.0, -0.5]])
    assert most_likely_actions(logits).tolist() == [1, 0, 2]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_draws_follow_the_probabilities_in_either_layout(is_transposed: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 512).t() if is_transposed else torch.randn(512, 4)
    logits = logits * 30.0  # far from what exp takes without the greatest taken off
    uniforms = torch.rand(512)
    borders = logits.double().softmax(dim=1).cumsum(dim=1)
    actions = sample_actions(logits, uniforms)
    upper = borders.gather(1, actions.unsqueeze(1)).squeeze(1)
    lower = torch.where(actions == 0, 0.0, borders.gather(1, (actions - 1).clamp(min=0).unsqueeze(1)).squeeze(1))
    assert (uniforms <= upper + 1e-6).all()
    assert (uniforms >= lower - 1e-6).all()
