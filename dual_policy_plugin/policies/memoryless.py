"""Lets a plain net act: one that maps observations to logits, and perhaps a value, and keeps no state.

Between `loading.py`, which gives the net its weights under their own names, and whoever has it act.
"""

from __future__ import annotations

from torch import Tensor, nn


class Memoryless(nn.Module):
    """A Policy that asks `net` anew at every step.

    Attributes:
        net: obs (num_rows, *shape) -> logits (num_rows, num_actions), or a tuple of these and values, (num_rows,) or
            (num_rows, 1).
        state_size: 0.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.state_size = net, 0

    def pack(self) -> None:
        """Nothing to copy."""

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Policy.forward_step; values are zeros where the net gives none."""
        answer = self.net(obs)
        logits, values = (answer, obs.new_zeros(len(obs))) if isinstance(answer, Tensor) else answer
        return logits.float(), values.float().reshape(len(obs)), state


def with_forward_step(net: nn.Module) -> nn.Module:
    """The net itself where it follows the Policy protocol, else as a Memoryless one."""
    return net if hasattr(net, "forward_step") else Memoryless(net)
