"""Proximal policy optimization (Schulman et al. 2017) over whole segments.

Takes filled Experience; changes the learner's parameters; gives the losses. Names follow the field's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from dual_policy_plugin.cuda_graph import CapturedCall
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.learning.advantage import compute_gae
from dual_policy_plugin.ranks.distributed import Ranks, sum_over_ranks

LOSS_NAMES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


@dataclass(kw_only=True, slots=True, frozen=True)
class PpoSettings:
    """The hyperparameters of an update; meanings stand at TrainerConfig's fields of the same names."""

    epochs: int
    num_minibatches: int
    gamma: float
    gae_lambda: float
    clip_coef: float
    clip_vloss: bool
    vf_clip_coef: float
    vf_coef: float
    ent_coef: float
    max_grad_norm: float
    norm_adv: bool
    target_kl: float | None


class FlatParameters:
    """A module's parameters and gradients as one tensor each, so that clip, optimizer and all-reduce are one operation.

    Attributes:
        flat: (num_parameters,) the parameters; the module's own are views of it.
        grad: (num_parameters,) their gradients, likewise.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        self.grad = torch.zeros_like(self.flat)
        self.flat.grad = self.grad
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.flat.data[start:end].view_as(parameter)
            parameter.grad = self.grad[start:end].view_as(parameter)
            start = end


@dataclass(slots=True)
class _Targets:
    """What the losses compare with: advantages and returns (horizon, num_rows), mean weight (None: no weights)."""

    advantages: Tensor
    returns: Tensor
    weight_mean: Tensor | None


def prepare_targets(
    experience: Experience, settings: PpoSettings, ranks: Ranks, *, use_kernels: bool = False
) -> _Targets:
    """Advantages (normalized over the rollout of all ranks) and returns."""
    advantages = compute_gae(
        experience.rewards,
        experience.values,
        experience.dones,
        experience.final_values,
        experience.last_values,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        use_kernels=use_kernels,
    )
    returns = advantages + experience.values
    weights = experience.weights
    weighted = advantages if weights is None else advantages * weights
    count = torch.full((), float(advantages.numel()), device=advantages.device) if weights is None else weights.sum()
    rows = torch.full((), float(advantages.numel()), device=advantages.device)
    # one reduction for everything that must be global: sum A, sum A^2, sum w, number of row-steps
    sums = torch.stack([weighted.sum(), (weighted * advantages).sum(), count, rows]).double()
    total, total_square, count, rows = sum_over_ranks(sums, ranks)
    count = count.clamp(min=1.0)  # a rollout in which no learner agent acted has nothing to teach
    if settings.norm_adv:
        mean = total / count
        std = ((total_square / count - mean.square()).clamp(min=0.0) * count / (count - 1).clamp(min=1.0)).sqrt()
        advantages = (advantages - mean.float()) / (std.float() + 1e-8)
    return _Targets(advantages, returns, None if weights is None else (count / rows).float())


def _minibatch_loss(
    learner: nn.Module, experience: Experience, targets: _Targets, rows: slice, settings: PpoSettings
) -> tuple[Tensor, Tensor]:
    """The loss of a range of segments, and what is reported: (5,) in the order of LOSS_NAMES without grad_norm."""
    logits, values = learner.forward_segment(  # type: ignore[operator]
        experience.obs[:-1, rows], experience.initial_state[rows], experience.dones[:, rows]
    )
    all_log_probs = logits.log_softmax(dim=-1)
    log_probs = all_log_probs.gather(-1, experience.actions[:, rows].unsqueeze(-1)).squeeze(-1)
    log_ratio = log_probs - experience.log_probs[:, rows]
    ratio = log_ratio.exp()
    advantages = targets.advantages[:, rows]
    # L_clip = -min(r * A, clip(r, 1 - eps, 1 + eps) * A)
    policy_loss = torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1.0 - settings.clip_coef, 1.0 + settings.clip_coef)
    )
    value_loss = (values - targets.returns[:, rows]).square()
    if settings.clip_vloss:
        old_values = experience.values[:, rows]
        clipped = old_values + (values - old_values).clamp(-settings.vf_clip_coef, settings.vf_clip_coef)
        value_loss = torch.maximum(value_loss, (clipped - targets.returns[:, rows]).square())
    entropy = -(all_log_probs.exp() * all_log_probs).sum(dim=-1)
    with torch.no_grad():
        approx_kl = (ratio - 1.0) - log_ratio  # k3 of Schulman, "Approximating KL divergence"
        clipfrac = ((ratio - 1.0).abs() > settings.clip_coef).float()
    terms = torch.stack([policy_loss, 0.5 * value_loss, entropy, approx_kl, clipfrac])  # (5, horizon, rows)
    if targets.weight_mean is not None and experience.weights is not None:
        # dividing by the global mean weight, not by this minibatch's, keeps ranks and minibatches equal in say
        terms = terms * (experience.weights[:, rows] / targets.weight_mean)
    means = terms.mean(dim=(1, 2))
    loss = means[0] + settings.vf_coef * means[1] - settings.ent_coef * means[2]
    return loss, means.detach()


class PpoUpdate:
    """The learner's optimizer and its update; state that lives between iterations is Adam's.

    On CUDA the whole update (every minibatch's forward, backward, clip and Adam step) is one captured graph, unless it
    is told not to; so nothing in it asks the device, and the learning rate is a tensor there.
    """

    def __init__(
        self,
        learner: nn.Module,
        settings: PpoSettings,
        *,
        betas: tuple[float, float],
        eps: float,
        ranks: Ranks,
        use_kernels: bool = False,
        capture: bool = True,
    ) -> None:
        """Args as TrainerConfig's; on CUDA `use_kernels` runs the advantages' scan as one kernel, `capture` records."""
        self.learner, self.settings, self.ranks, self.use_kernels = learner, settings, ranks, use_kernels
        self.parameters = FlatParameters(learner)
        self.buffers = frozenset(name for name, _ in learner.named_buffers())
        flat = self.parameters.flat
        self.learning_rate = torch.zeros((), device=flat.device)
        self.adam = torch.optim.Adam(
            [flat], lr=self.learning_rate, betas=betas, eps=eps, fused=True, capturable=flat.is_cuda
        )
        # Adam makes its moments at its first step; made here, they can be saved and restored at any time
        self.adam.state[flat] = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }
        self.is_stopped = torch.zeros((), device=flat.device)  # 1 once approx_kl has passed target_kl in this update
        if settings.target_kl is not None:
            self.adam.found_inf = self.is_stopped  # type: ignore[attr-defined]  # a fused step with 1 changes nothing
        self._is_capturing = capture and flat.is_cuda
        # an update is recorded for each Experience that comes, and reads that one's tensors
        self._captured: list[tuple[Experience, CapturedCall[dict[str, Tensor]]]] = []

    def adam_state(self) -> dict[str, Tensor]:
        """Adam's moments and step count; copying into them changes the optimizer."""
        return dict(self.adam.state[self.parameters.flat])

    def update(self, experience: Experience, learning_rate: float) -> dict[str, Tensor]:
        """Improves the learner on one rollout.

        Args:
            experience: filled; not changed. On CUDA one graph is recorded for each object, and kept.
            learning_rate: of Adam, for this whole update.

        Returns:
            Scalars on the device: LOSS_NAMES as means over the minibatches that were used, explained_variance, and
            weight_norm, the Euclidean norm of all weights after the update.
        """
        self.learning_rate.fill_(learning_rate)
        if not self._is_capturing:
            return self._update(experience)
        for known, captured in self._captured:
            if known is experience:
                return captured()
        captured = CapturedCall(lambda: self._update(experience), "the update")
        self._captured.append((experience, captured))
        return captured()

    def release(self) -> None:
        """Gives the recorded updates back. They must be gone before the ranks part: NCCL's communicator waits."""
        for _, captured in self._captured:
            captured.release()
        self._captured.clear()

    def _update(self, experience: Experience) -> dict[str, Tensor]:
        settings = self.settings
        targets = prepare_targets(experience, settings, self.ranks, use_kernels=self.use_kernels)
        bounds = [experience.num_rows * i // settings.num_minibatches for i in range(settings.num_minibatches + 1)]
        ranges = [slice(start, end) for start, end in pairwise(bounds)] * settings.epochs
        report = torch.zeros(len(LOSS_NAMES), device=experience.rewards.device)
        num_used = torch.zeros_like(self.is_stopped)
        self.is_stopped.zero_()
        for rows in ranges:
            means, grad_norm = self._step(experience, targets, rows)
            is_used = 1.0 - self.is_stopped
            report += torch.cat([means, grad_norm.view(1)]) * is_used
            num_used += is_used
            if settings.target_kl is not None:
                self.is_stopped.copy_((self.is_stopped + (means[3] > settings.target_kl)).clamp(max=1.0))
                if self.is_stopped.device.type == "cpu" and self.is_stopped.item():
                    break  # the rest would change nothing
        return self._report(report / num_used, experience, targets)

    def _step(self, experience: Experience, targets: _Targets, rows: slice) -> tuple[Tensor, Tensor]:
        """One minibatch: forward, backward, all-reduce, clip, Adam."""
        self.parameters.grad.zero_()
        loss, means = _minibatch_loss(self.learner, experience, targets, rows, self.settings)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.ranks.world_size > 1:
            sum_over_ranks(self.parameters.grad, self.ranks).div_(self.ranks.world_size)
            means = sum_over_ranks(means, self.ranks) / self.ranks.world_size
        grad_norm = self.parameters.grad.norm()
        self.parameters.grad.mul_((self.settings.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        self.adam.step()
        return means, grad_norm

    def _report(self, report: Tensor, experience: Experience, targets: _Targets) -> dict[str, Tensor]:
        losses = dict(zip(LOSS_NAMES, report, strict=True))
        # 1 - Var(return - value) / Var(return), over the rows of all ranks that acted
        weights = torch.ones_like(targets.returns) if experience.weights is None else experience.weights
        both = torch.stack([targets.returns - experience.values, targets.returns]).double() * weights
        moments = torch.stack([weights.double().sum().expand(2), both.sum(dim=(1, 2)), both.square().sum(dim=(1, 2))])
        count, total, total_square = sum_over_ranks(moments, self.ranks)
        count = count.clamp(min=1.0)
        variance = total_square / count - (total / count).square()
        losses["explained_variance"] = (1.0 - variance[0] / variance[1].clamp(min=1e-8)).float()
        losses["weight_norm"] = self.parameters.flat.detach().norm()
        return losses
