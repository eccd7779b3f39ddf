"""What follows an env's step, in one launch: the learner's rewards and dones into their slots of Experience, episode
metrics, the next NPCs, and zeroed recurrent states.

The fused twin of the collector's two stores, `EpisodeMetrics.add` and `MixedPolicy.end_step`, in this order.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803 -- constants of a kernel are written in capitals

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dual_policy_plugin.types import StepResult

BLOCK_ENVS = 32
"""Envs of one program; nothing is shared between envs but the sums."""


@triton.jit
def _sum_of_side(
    rewards, dones, scores, returns, seats, rewards_out, dones_out, envs, is_env, ends,
    NUM_AGENTS: tl.constexpr, NUM_SEATS: tl.constexpr, BLOCK_SEATS: tl.constexpr,
):  # fmt: skip
    """Adds a step to the returns of one side's seats; stores rewards and dones where there is a place for them.

    Returns:
        The side's summed returns and what decides who won, (BLOCK_ENVS,) float64 each.
    """
    places = tl.arange(0, BLOCK_SEATS)
    is_place = is_env[:, None] & (places < NUM_SEATS)[None, :]
    seat = tl.load(seats + places, mask=places < NUM_SEATS, other=0)
    at = envs[:, None] * NUM_AGENTS + seat[None, :]  # (BLOCK_ENVS, BLOCK_SEATS) into (num_envs, num_agents)
    step_rewards = tl.load(rewards + at, mask=is_place, other=0.0)
    if rewards_out is not None:
        row = envs[:, None] * NUM_SEATS + places[None, :]
        tl.store(rewards_out + row, step_rewards, mask=is_place)
        tl.store(dones_out + row, tl.load(dones + at, mask=is_place, other=0), mask=is_place)
    total = tl.load(returns + at, mask=is_place, other=0.0) + step_rewards.to(tl.float64)
    tl.debug_barrier()  # several threads may have read the same return; none is to read it after this
    tl.store(returns + at, tl.where(ends[:, None], 0.0, total), mask=is_place)
    side = tl.sum(total, axis=1)
    if scores is not None:
        return side, tl.sum(tl.load(scores + at, mask=is_place, other=0.0).to(tl.float64), axis=1)
    return side, side


@triton.jit
def _add_counters(
    counters, seats, fields, counted, envs,
    NUM_AGENTS: tl.constexpr, NUM_SEATS: tl.constexpr, BLOCK_SEATS: tl.constexpr, NUM_COUNTERS: tl.constexpr,
):  # fmt: skip
    """Adds the sums over one side's seats to every second field from `fields` (BLOCK_ENVS,) on, a pointer."""
    places = tl.arange(0, BLOCK_SEATS)
    is_place = counted[:, None] & (places < NUM_SEATS)[None, :]
    seat = tl.load(seats + places, mask=places < NUM_SEATS, other=0)
    at = (envs[:, None] * NUM_AGENTS + seat[None, :]) * NUM_COUNTERS
    for i in range(NUM_COUNTERS):
        values = tl.load(counters + at + i, mask=is_place, other=0.0).to(tl.float64)
        tl.atomic_add(fields + 2 * i, tl.sum(values, axis=1), mask=counted, sem="relaxed")


@triton.jit
def _zero_states(
    dones, seats, state, envs, is_env,
    NUM_AGENTS: tl.constexpr, NUM_SEATS: tl.constexpr, STATE_SIZE: tl.constexpr, BLOCK_STATE: tl.constexpr,
):  # fmt: skip
    """Zeroes the rows of one side's `state` (num_envs * NUM_SEATS, STATE_SIZE) that are done; touches no other."""
    for place in range(NUM_SEATS):
        done = tl.load(dones + envs * NUM_AGENTS + tl.load(seats + place), mask=is_env, other=0) != 0
        start = (envs * NUM_SEATS + place).to(tl.int64) * STATE_SIZE
        for first in range(0, STATE_SIZE, BLOCK_STATE):
            columns = first + tl.arange(0, BLOCK_STATE)
            zeros = tl.zeros((envs.shape[0], BLOCK_STATE), state.dtype.element_ty)
            tl.store(
                state + start[:, None] + columns[None, :], zeros, mask=done[:, None] & (columns < STATE_SIZE)[None, :]
            )


@triton.jit
def _drawn_npc(probabilities, uniforms, envs, is_env, NUM_NPCS: tl.constexpr):
    """How many of the first NUM_NPCS - 1 cumulated probabilities each env's uniform number has reached, int64."""
    uniform = tl.load(uniforms + envs, mask=is_env, other=0.0)
    reached = tl.zeros(envs.shape, tl.int64)
    cumulated = tl.zeros((), tl.float64)  # as torch.cumsum on CPU: added in float64, compared in float32
    for k in range(NUM_NPCS - 1):
        cumulated += tl.load(probabilities + k).to(tl.float64)
        reached += (uniform >= cumulated.to(tl.float32)).to(tl.int64)
    return reached


# Slots of a time-major buffer begin at any element: one compiled kernel is to serve them all.
@triton.jit(do_not_specialize_on_alignment=["rewards_out", "dones_out", "uniforms"])
def end_step_kernel(
    rewards, dones, episode_ends, scores, counters, learner_seats, npc_seats, rewards_out, dones_out,
    returns, is_counting, sums, learner_state, npc_state, npc_of_env, probabilities, uniforms, num_envs,
    NUM_LEARNER: tl.constexpr, NUM_NPC: tl.constexpr, NUM_NPCS: tl.constexpr, NUM_COUNTERS: tl.constexpr,
    LEARNER_STATE: tl.constexpr, NPC_STATE: tl.constexpr, COUNT_LATER: tl.constexpr,
    BLOCK_ENVS: tl.constexpr, BLOCK_LEARNER: tl.constexpr, BLOCK_NPC: tl.constexpr, BLOCK_STATE: tl.constexpr,
):  # fmt: skip
    """One program ends the step of BLOCK_ENVS envs; see `end_step`."""
    num_agents: tl.constexpr = NUM_LEARNER + NUM_NPC
    envs = tl.program_id(0) * BLOCK_ENVS + tl.arange(0, BLOCK_ENVS)
    is_env = envs < num_envs
    ends = tl.load(episode_ends + envs, mask=is_env, other=0) != 0
    counting = tl.load(is_counting + envs, mask=is_env, other=0) != 0
    counted = ends & counting

    learner, learner_verdict = _sum_of_side(
        rewards, dones, scores, returns, learner_seats, rewards_out, dones_out, envs, is_env, ends,
        num_agents, NUM_LEARNER, BLOCK_LEARNER,
    )  # fmt: skip
    npc, npc_verdict = tl.zeros((BLOCK_ENVS,), tl.float64), tl.zeros((BLOCK_ENVS,), tl.float64)
    if NUM_NPC > 0:
        npc, npc_verdict = _sum_of_side(
            rewards, dones, scores, returns, npc_seats, None, None, envs, is_env, ends, num_agents, NUM_NPC, BLOCK_NPC
        )
    # mean_learner > mean_npc, cross-multiplied so that ties are exact. Compared, not subtracted: a fused
    # multiply-subtract would round one product and not the other.
    left, right = learner_verdict * NUM_NPC, npc_verdict * NUM_LEARNER
    wins = tl.where(left > right, 1.0, tl.where(left == right, 0.5, 0.0)).to(tl.float64)

    fields = sums + tl.zeros((BLOCK_ENVS,), tl.int32)
    if NUM_NPCS > 1:
        played = tl.load(npc_of_env + envs, mask=is_env, other=0)  # the NPC of the episode that ended
        fields += played * (4 + 2 * NUM_COUNTERS)
        drawn = _drawn_npc(probabilities, uniforms, envs, is_env, NUM_NPCS)
        tl.debug_barrier()  # all have read it
        tl.store(npc_of_env + envs, tl.where(ends, drawn, played), mask=is_env)
    tl.atomic_add(fields, tl.full((BLOCK_ENVS,), 1.0, tl.float64), mask=counted, sem="relaxed")
    tl.atomic_add(fields + 1, wins, mask=counted, sem="relaxed")
    tl.atomic_add(fields + 2, learner, mask=counted, sem="relaxed")
    tl.atomic_add(fields + 3, npc, mask=counted, sem="relaxed")
    if NUM_COUNTERS > 0:
        _add_counters(
            counters, learner_seats, fields + 4, counted, envs, num_agents, NUM_LEARNER, BLOCK_LEARNER, NUM_COUNTERS
        )
        if NUM_NPC > 0:
            _add_counters(counters, npc_seats, fields + 5, counted, envs, num_agents, NUM_NPC, BLOCK_NPC, NUM_COUNTERS)
    tl.debug_barrier()
    tl.store(is_counting + envs, tl.where(ends, COUNT_LATER, counting), mask=is_env)

    _zero_states(dones, learner_seats, learner_state, envs, is_env, num_agents, NUM_LEARNER, LEARNER_STATE, BLOCK_STATE)
    if NUM_NPC > 0:
        _zero_states(dones, npc_seats, npc_state, envs, is_env, num_agents, NUM_NPC, NPC_STATE, BLOCK_STATE)


def end_step(
    result: StepResult,
    *,
    learner_seats: Tensor,
    npc_seats: Tensor,
    rewards: Tensor,
    dones: Tensor,
    returns: Tensor,
    is_counting: Tensor,
    count_later: bool,
    sums: Tensor,
    learner_state: Tensor,
    npc_state: Tensor | None = None,
    npc_of_env: Tensor | None = None,
    probabilities: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> None:
    """Ends a step in place: everything below is updated, nothing is allocated. All tensors are contiguous.

    Rows are env-major, row = env * num_learner + j for seat learner_seats[j], likewise for NPCs.

    Args:
        result: what the env's step gave; rewards and dones (num_envs, num_agents), episode_ends (num_envs,); scores
            and counters where it has them, truncated and weights are not read.
        learner_seats: (num_learner,) int64.
        npc_seats: (num_npc,) int64; with learner_seats all seats, each once.
        rewards: (num_envs * num_learner,) float32, the slot of Experience that is filled.
        dones: (num_envs * num_learner,) bool, likewise.
        returns: (num_envs, num_agents) float64, of the running episodes; zeroed where an episode ended.
        is_counting: (num_envs,) bool, whether the running episode counts; `count_later` from an episode's end on.
        count_later: fixed in a captured graph.
        sums: (num_npcs, 4 + 2 * num_counters) float64, added to as EpisodeMetrics.add does, by atomics: the order of
            additions is open, so float32 rewards are summed exactly or to the last bit of a float64.
        learner_state: (num_envs * num_learner, state size), zeroed in the rows that are done.
        npc_state: (num_envs * num_npc, state size), likewise; None without NPCs.
        npc_of_env: (num_envs,) int64, drawn anew where an episode ended; this and the next two only with num_npcs > 1.
        probabilities: (num_npcs,) float32.
        uniforms: (num_envs,) float32 in [0, 1).
    """
    num_learner, num_npc, num_npcs = len(learner_seats), len(npc_seats), sums.shape[0]
    counters = result.counters if sums.shape[1] > 4 else None
    tensors = (
        result.rewards, result.dones, result.episode_ends, result.scores, counters, learner_seats, npc_seats,
        rewards, dones, returns, is_counting, sums, learner_state, npc_state,
        npc_of_env, probabilities, uniforms,
    )  # fmt: skip
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    assert result.rewards.shape == result.dones.shape == returns.shape == (len(is_counting), num_learner + num_npc)
    assert sums.shape[1] == 4 + 2 * (0 if counters is None else counters.shape[2])
    state_sizes = learner_state.shape[1], 0 if npc_state is None else npc_state.shape[1]
    end_step_kernel[(triton.cdiv(len(is_counting), BLOCK_ENVS),)](
        *tensors,
        len(is_counting),
        NUM_LEARNER=num_learner,
        NUM_NPC=num_npc,
        NUM_NPCS=num_npcs,
        NUM_COUNTERS=0 if counters is None else counters.shape[2],
        LEARNER_STATE=state_sizes[0],
        NPC_STATE=state_sizes[1],
        COUNT_LATER=count_later,
        BLOCK_ENVS=BLOCK_ENVS,
        BLOCK_LEARNER=triton.next_power_of_2(num_learner),
        BLOCK_NPC=triton.next_power_of_2(max(num_npc, 1)),
        BLOCK_STATE=min(64, triton.next_power_of_2(max(*state_sizes, 1))),
    )
