"""Draws actions from logits with uniform numbers that the caller supplies: the sampler holds no random state."""

from __future__ import annotations

from torch import Tensor


def sample_actions(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Actions drawn by inverting the cumulative distribution.

    Args:
        logits: (num_rows, num_actions) float32; a masked action is -inf or very negative.
        uniforms: (num_rows,) float32 in [0, 1).

    Returns:
        (num_rows,) int64.
    """
    cumulative = logits.softmax(dim=1).cumsum(dim=1)
    drawn = uniforms.unsqueeze(1) * cumulative[:, -1:]
    # the last column is left out: rounding must not give an action beyond the last
    return (drawn >= cumulative[:, :-1]).sum(dim=1)


def log_probs_of(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probabilities of the actions: logits (..., num_actions), actions (...) -> (...)."""
    return logits.log_softmax(dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
