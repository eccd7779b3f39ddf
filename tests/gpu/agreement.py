"""What "the same" means between a kernel and its plain twin, where their roundings differ."""

from __future__ import annotations

import torch
from torch import Tensor

from dual_policy_plugin.policies.sampling import sample_actions

FLOOR = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
"""Error, as a fraction of the exact numbers' size, that is always allowed: plain torch may round less often."""
DRAW_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far a uniform number may lie outside the piece of the cumulative distribution that its action stands for."""
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""How far below the greatest logit that of a greedy policy's action may lie; the logits here are a few units wide."""
OTHER_ACTIONS = {torch.float32: 0.001, torch.bfloat16: 0.05}
"""Fraction of the rows whose action may be another than that of the exact logits, beside five rows."""


def assert_as_near(name: str, fused: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The fused numbers are about as near to the exact ones as the plain ones are.

    At most twice the plain error in the mean square, and four times its largest, FLOOR not counted.

    Args:
        name: for the message.
        fused, plain: computed in `dtype`.
        exact: the same in float32 by plain torch.
        dtype: of the matrix products.
    """
    fused, plain, exact = (tensor.detach().double().cpu() for tensor in (fused, plain, exact))
    assert fused.shape == plain.shape == exact.shape, f"{name}: {fused.shape}, {plain.shape}, {exact.shape}"
    assert exact.numel(), f"{name}: nothing to compare"
    assert fused.isfinite().all(), f"{name}: not finite"
    size = _root_mean_square(exact)
    ours, theirs, floor = fused - exact, plain - exact, FLOOR[dtype] * size
    mean, allowed = _root_mean_square(ours), 2.0 * _root_mean_square(theirs) + floor
    assert mean <= allowed, f"{name}: mean error {mean:.2e}, allowed {allowed:.2e}, numbers of size {size:.2e}"
    most, allowed = float(ours.abs().max()), 4.0 * float(theirs.abs().max()) + 10.0 * floor
    assert most <= allowed, f"{name}: largest error {most:.2e}, allowed {allowed:.2e}, numbers of size {size:.2e}"


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same(name: str, ours: Tensor, wanted: Tensor) -> None:
    """Equal bit for bit, wherever they lie."""
    ours, wanted = ours.cpu(), wanted.cpu()
    assert ours.shape == wanted.shape, f"{name}: {ours.shape}, not {wanted.shape}"
    differing = int((ours != wanted).sum())
    assert differing == 0, f"{name}: {differing} of {wanted.numel()} numbers differ"


def assert_drawn(name: str, actions: Tensor, logits: Tensor, uniforms: Tensor, dtype: torch.dtype) -> None:
    """The actions are those that the uniform numbers draw from the logits; near a boundary either side will do.

    Args:
        name: for the message.
        actions: (num_rows,) int64, by logits in `dtype`.
        logits: (num_rows, num_actions) exact.
        uniforms: (num_rows,) float32.
        dtype: of the products that the actions come from.
    """
    actions, logits, uniforms = actions.cpu(), logits.detach().float().cpu(), uniforms.cpu()
    chances = logits.double().softmax(dim=1)
    upper = chances.cumsum(dim=1).gather(1, actions.unsqueeze(1)).squeeze(1)
    lower = upper - chances.gather(1, actions.unsqueeze(1)).squeeze(1)
    outside = float(torch.maximum(lower - uniforms, uniforms - upper).max())
    assert outside <= DRAW_TOLERANCE[dtype], f"{name}: a uniform number lies {outside:.3f} outside its action's piece"
    _assert_few_differ(name, actions, sample_actions(logits, uniforms), dtype)


def assert_greedy(name: str, actions: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    """The actions have the greatest logits, or nearly; arguments as for `assert_drawn`."""
    actions, logits = actions.cpu(), logits.detach().double().cpu()
    below = float((logits.amax(dim=1) - logits.gather(1, actions.unsqueeze(1)).squeeze(1)).max())
    assert below <= LOGIT_TOLERANCE[dtype], f"{name}: an action's logit lies {below:.3f} below the greatest"
    _assert_few_differ(name, actions, logits.argmax(dim=1), dtype)


def _assert_few_differ(name: str, actions: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    differing = int((actions != wanted).sum())
    allowed = 5 + OTHER_ACTIONS[dtype] * len(wanted)
    assert differing <= allowed, f"{name}: {differing} of {len(wanted)} actions are not those of the exact logits"


def assert_near_as_vectors(name: str, ours: Tensor, wanted: Tensor, *, relative: float) -> None:
    """The length of the difference is at most `relative` times that of `wanted`."""
    ours, wanted = ours.detach().double(), wanted.detach().double()
    difference = float((ours - wanted).norm() / wanted.norm())
    assert difference <= relative, f"{name}: differs by {difference:.2e} of its length, allowed {relative:.0e}"
