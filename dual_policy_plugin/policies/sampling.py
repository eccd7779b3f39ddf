"""Draws actions from logits with uniform numbers that the caller supplies: the sampler holds no random state.

Works on the transposed logits: a reduction over a handful of actions then runs along rows of many agents, several times
as fast. Logits that are a transposed view already, as those of our nets, are not copied.
"""

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
    columns = logits.t().contiguous()  # (num_actions, num_rows)
    cumulative = (columns - columns.amax(dim=0)).exp_().cumsum(dim=0)
    drawn = uniforms * cumulative[-1]
    # the last action is left out: rounding must not give one beyond it
    return (drawn >= cumulative[:-1]).sum(dim=0)


def most_likely_actions(logits: Tensor) -> Tensor:
    """The actions of the greatest logits: (num_rows, num_actions) -> (num_rows,) int64."""
    return logits.t().contiguous().max(dim=0).indices  # argmax gives the same, slower by far


def log_probs_of(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probabilities of the actions: logits (..., num_actions), actions (...) -> (...)."""
    return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
