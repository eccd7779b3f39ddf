"""Sampling by inversion: exact borders, masked actions, frequencies."""

from __future__ import annotations

import torch

from dual_policy_plugin.policies.sampling import log_probs_of, sample_actions


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
