"""Each kernel of the policies beside its plain twin, at any size, in float32 or bfloat16, on a GPU or interpreted.

The tests on a GPU (`gpu_checks.py`) call these at real sizes, the fast tests (`tests/kernels/test_gpu_checks.py`) at
tiny ones, so that what checks the GPU is known to work. Random numbers are drawn on the CPU: the same everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dual_policy_plugin.envs.arena_config import ACTIONS, ArenaConfig, observation_space
from dual_policy_plugin.kernels.group_rows import RowGroups, allocate_row_groups, group_rows, group_rows_plain
from dual_policy_plugin.kernels.policy_step import StepRows, policy_step
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.encoders import WindowEncoder
from dual_policy_plugin.policies.lstm import lstm_segment, lstm_segment_plain
from dual_policy_plugin.policies.sampling import log_probs_of
from dual_policy_plugin.policies.stacked import StackedPolicies
from tests.gpu.agreement import assert_as_near, assert_drawn, assert_greedy, assert_same

SPACE = observation_space(ArenaConfig())


def make_net(
    agent: str, seed: int, *, hidden: int, dtype: torch.dtype, device: torch.device, is_decided: bool = True
) -> nn.Module:
    """An arena policy: the same weights on every device; a decided one has logits a few units wide."""
    torch.manual_seed(seed)
    net = build_policy(agent, {"hidden_size": hidden}, SPACE, ACTIONS)
    if is_decided:
        net.heads.weight.data[:-1].mul_(1000.0)
    net.compute_dtype = dtype
    net.to(device).pack()
    return net


def random_observations(num_rows: int, generator: torch.Generator) -> Tensor:
    """(num_rows, 128) uint8: all codes, own state up to 255, and padding that must not count."""
    obs = torch.randint(0, 256, (num_rows, *SPACE.shape), generator=generator, dtype=torch.uint8)
    num_cells = SPACE.window[0] * SPACE.window[1]
    obs[:, :num_cells] %= len(SPACE.features)
    obs[:, num_cells : num_cells + 4] %= 16  # ore, hearts, frozen, cooldown: small numbers in the arena
    return obs


def random_npcs(num_envs: int, num_npcs: int, generator: torch.Generator) -> Tensor:
    """(num_envs,) int64: who plays where; from three NPCs on one of them plays nowhere."""
    npc_of_env = torch.randint(num_npcs, (num_envs,), generator=generator)
    return npc_of_env.where(npc_of_env != 1, 0) if num_npcs >= 3 else npc_of_env


def check_policy_step(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_envs: int,
    num_learner: int,
    num_npc: int,
    num_npcs: int,
    hidden: int,
    tile: int,
    num_steps: int = 3,
) -> None:
    """`policy_step` against `FastPolicy.forward_step`; each step from the states that the kernel left.

    Where there are three NPCs, the last one is greedy.
    """
    generator = torch.Generator().manual_seed(num_envs)
    nets = [make_net("fast", seed, hidden=hidden, dtype=dtype, device=device) for seed in range(1 + num_npcs)]
    exact = [_in_float32(net) for net in nets]
    greedy = {num_npcs} if num_npcs >= 3 else set()
    weights = StackedPolicies(nets[0], len(nets))
    for k, net in enumerate(nets):
        weights.put(k, net, is_greedy=k in greedy)
    seats = torch.randperm(num_learner + num_npc, generator=generator)
    npc_of_env = random_npcs(num_envs, max(num_npcs, 1), generator)
    groups = None
    if num_npcs > 1:
        groups = allocate_row_groups(
            num_envs=num_envs, num_npcs=num_npcs, rows_per_env=num_npc, tile=tile, device=device
        )
        group_rows(npc_of_env.to(device), groups)
    learner = _random_rows(num_envs, seats[:num_learner], hidden, generator, device)
    npc = _random_rows(num_envs, seats[num_learner:], hidden, generator, device) if num_npc else None
    policy_of_row = (1 + npc_of_env).repeat_interleave(num_npc).to(device)
    for _ in range(num_steps):
        learner, npc = _next_rows(learner, generator), None if npc is None else _next_rows(npc, generator)
        before = [learner.state.clone(), None if npc is None else npc.state.clone()]
        actions = torch.full((num_envs, num_learner + num_npc), -1, device=device)
        learner_actions = torch.full((num_envs * num_learner,), -1, device=device)
        log_probs, values = torch.full((2, num_envs * num_learner), torch.nan, device=device)
        policy_step(
            weights, learner, npc, groups, actions=actions, learner_actions=learner_actions, log_probs=log_probs,
            values=values, tile=tile,
        )  # fmt: skip
        plain, truth = (policies[0].forward_step(learner.obs, before[0]) for policies in (nets, exact))
        assert_drawn("learner", learner_actions, truth[0], learner.uniforms, dtype)
        of_actions = [log_probs_of(logits, learner_actions) for logits in (plain[0], truth[0])]
        assert_as_near("log-probs", log_probs, *of_actions, dtype)
        assert_as_near("values", values, plain[1], truth[1], dtype)
        assert_as_near("learner states", learner.state, plain[2], truth[2], dtype)
        assert_same("table", actions[:, learner.seats].flatten(), learner_actions)
        if npc is not None:
            _check_npcs(npc, before[1], actions[:, npc.seats].flatten(), nets, exact, policy_of_row, greedy, dtype)


def _check_npcs(
    npc: StepRows, before: Tensor, actions: Tensor, nets: list[nn.Module], exact: list[nn.Module],
    policy_of_row: Tensor, greedy: set[int], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Every NPC's rows: their actions, and their states after the step."""
    for k in range(1, len(nets)):
        rows = policy_of_row == k
        if not rows.any():
            continue
        plain, truth = (policies[k].forward_step(npc.obs[rows], before[rows]) for policies in (nets, exact))
        assert_as_near(f"states of NPC {k}", npc.state[rows], plain[2], truth[2], dtype)
        if k in greedy:
            assert_greedy(f"NPC {k}", actions[rows], truth[0], dtype)
        else:
            assert_drawn(f"NPC {k}", actions[rows], truth[0], npc.uniforms[rows], dtype)


def _in_float32(net: nn.Module) -> nn.Module:
    exact = copy.deepcopy(net)
    exact.compute_dtype = torch.float32
    exact.pack()
    return exact


def _random_rows(
    num_envs: int, seats: Tensor, hidden: int, generator: torch.Generator, device: torch.device
) -> StepRows:
    num_rows = num_envs * len(seats)
    return StepRows(
        obs=torch.zeros(num_rows, *SPACE.shape, dtype=torch.uint8, device=device),
        state=(torch.randn(num_rows, 2 * hidden, generator=generator) * 0.5).to(device),
        uniforms=torch.zeros(num_rows, device=device),
        seats=seats.to(device),
    )


def _next_rows(rows: StepRows, generator: torch.Generator) -> StepRows:
    """The same rows and states with new observations and uniform numbers."""
    num_rows, device = len(rows.obs), rows.obs.device
    obs = random_observations(num_rows, generator).to(device)
    return replace(rows, obs=obs, uniforms=torch.rand(num_rows, generator=generator).to(device))


def check_group_rows(device: torch.device, *, num_envs: int, num_npcs: int, rows_per_env: int, tile: int) -> None:
    """`group_rows` against a stable argsort, the second time over what the first one left."""
    generator = torch.Generator().manual_seed(num_envs)
    sizes = {"num_npcs": num_npcs, "rows_per_env": rows_per_env, "tile": tile}
    groups: RowGroups = allocate_row_groups(num_envs=num_envs, device=device, **sizes)
    for _ in range(2):
        npc_of_env = random_npcs(num_envs, num_npcs, generator)
        group_rows(npc_of_env.to(device), groups)
        row_of_slot, policy_of_tile = group_rows_plain(npc_of_env, **sizes)
        assert_same("row_of_slot", groups.row_of_slot, row_of_slot)
        assert_same("policy_of_tile", groups.policy_of_tile, policy_of_tile)


def check_lstm(
    device: torch.device, dtype: torch.dtype, *, horizon: int, num_rows: int, size: int, done_fraction: float = 0.05
) -> None:
    """The LSTM's kernels, outputs and gradients, against the plain segment and autograd in float32."""
    generator = torch.Generator().manual_seed(horizon + num_rows)
    gates_x = torch.randn(horizon, num_rows, 4 * size, generator=generator).to(device, dtype)
    weight_hh = (torch.randn(size, 4 * size, generator=generator) / size**0.5).to(device, dtype)
    state = (torch.randn(num_rows, 2 * size, generator=generator) * 0.5).to(device)
    dones = (torch.rand(horizon, num_rows, generator=generator) < done_fraction).to(device)
    wanted = torch.randn(horizon, num_rows, size, generator=generator).to(device, dtype)

    def run(segment: Callable[..., Tensor], dtype: torch.dtype, **keywords: bool) -> list[Tensor]:
        x, weight = gates_x.to(dtype).requires_grad_(), weight_hh.to(dtype).requires_grad_()
        outputs = segment(x, weight, state, dones, **keywords)
        return [outputs, *torch.autograd.grad(outputs, (x, weight), wanted.to(dtype))]

    fused, plain = run(lstm_segment, dtype, use_kernels=True), run(lstm_segment, dtype, use_kernels=False)
    exact = run(lstm_segment_plain, torch.float32)
    names = ("outputs", "gradient of gates_x", "gradient of weight_hh")
    for name, *three in zip(names, fused, plain, exact, strict=True):
        assert_as_near(f"LSTM {name}", *three, dtype)


def check_window(device: torch.device, dtype: torch.dtype, *, num_rows: int, width: int) -> None:
    """The window encoder's kernels, encoding and gradients, against the plain encoder; twice bit for bit the same."""
    generator = torch.Generator().manual_seed(num_rows)
    torch.manual_seed(0)
    encoder = WindowEncoder(SPACE, width)
    nn.init.normal_(encoder.bias)
    encoder.to(device)
    obs = random_observations(num_rows, generator).to(device)
    wanted = torch.randn(num_rows, width, generator=generator).to(device, dtype)

    def run(dtype: torch.dtype, *, use_kernels: bool) -> list[Tensor]:
        encoded = encoder(obs, dtype, use_kernels=use_kernels)
        return [encoded, *torch.autograd.grad(encoded, list(encoder.parameters()), wanted.to(dtype))]

    fused, again = (run(dtype, use_kernels=True) for _ in range(2))
    plain, exact = run(dtype, use_kernels=False), run(torch.float32, use_kernels=False)
    names = ("encoding", *(f"gradient of {name}" for name, _ in encoder.named_parameters()))
    for name, first, second, *others in zip(names, fused, again, plain, exact, strict=True):
        assert_same(f"window {name}, twice", second, first)
        assert_as_near(f"window {name}", first, *others, dtype)
