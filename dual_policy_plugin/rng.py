"""Counter-based randomness: integer hashes of keys, the same bit for bit on every device and in every kernel.

Stands below everything that draws: the arena (maps, start places, priorities) and the sampler (actions). There is no
generator and no state: a draw is a function of a seed and some keys (env, episode, step, seat, purpose), so it does
not depend on batch order, on what else was drawn, or on the device.

Arithmetic is int32 that wraps. Shifts are logical: an arithmetic shift followed by a mask. The finaliser is lowbias32
(Wellons, "Prospecting for Hash Functions", 2018); keys are folded in one after the other:

    fold(h, key) = finalise(h + key * 0x9E3779B9)
"""

from __future__ import annotations

import torch
from torch import Tensor

# Purposes: one of these is a key of every draw, so that two purposes never share a stream.
START_PLACE = 1
START_FACING = 2
MAP = 3
PRIORITY = 4
ACTION_LEARNER = 5
ACTION_NPC = 6
NPC_DRAW = 7
SEAT_ORDER = 8
PHASE = 9
LATER_EPISODES = 10  # of a run's env: no seed of an evaluation, which is hash32(seed, round)

GOLDEN = 0x9E3779B9 - 2**32
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B - 2**32
LOW_31_BITS = 0x7FFFFFFF

# The same as 0-d tensors: half the cost of a Python number in a small op, and they mix with tensors of any device.
_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2, _LOW_31_BITS, _15, _16, _LOW_16_BITS, _LOW_17_BITS = torch.tensor(
    [GOLDEN, MULTIPLIER_1, MULTIPLIER_2, LOW_31_BITS, 15, 16, 0xFFFF, 0x1FFFF], dtype=torch.int32, device="cpu"
).unbind()


def hash32(seed: int, *keys: Tensor | int) -> Tensor:
    """Returns an int32 hash of seed and keys, of the keys' broadcast shape; the order of keys matters.

    Args:
        seed: any int, of which the low 32 bits count.
        keys: ints or integer tensors (low 32 bits count). Leading ints are hashed on the host, once, for free.
    """
    state = _finalise_int(seed + GOLDEN)  # so that seed 0 with keys 0 is not the fixed point 0
    for index, key in enumerate(keys):
        if isinstance(key, Tensor):
            first = key.to(torch.int32).mul(_GOLDEN).add_(_signed(state))
            return extend(finalise_(first), *keys[index + 1 :])
        state = _finalise_int(state + key * GOLDEN)
    return torch.tensor(_signed(state), dtype=torch.int32)


def extend(state: Tensor, *keys: Tensor | int) -> Tensor:
    """Returns the int32 hash with further keys folded in; `state` is left as it is.

    What hash32 gives for (seed, a, b) is what extend gives for hash32(seed, a) and b.
    """
    for key in keys:
        term = key.to(torch.int32).mul(_GOLDEN) if isinstance(key, Tensor) else _signed(key * GOLDEN)
        state = finalise_(state + term)
    return state


def uniform(seed: int, *keys: Tensor | int) -> Tensor:
    """Returns float32 draws in [0, 1), multiples of 2^-24, of the keys' broadcast shape."""
    return to_uniform(hash32(seed, *keys))


def to_uniform(hashes: Tensor) -> Tensor:
    """Returns float32 in [0, 1) from the high 24 bits of int32 hashes."""
    return (hashes >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def distinct_keys(state: Tensor, ids: Tensor) -> Tensor:
    """Returns int32 keys in [0, 2^31): random by `state`, and never equal for two ids under one state.

    For a fixed state the key is a bijection of the id's low 31 bits, so sorting or comparing keys has no ties.

    Args:
        state: int32 hashes, broadcast against ids.
        ids: integers, distinct in their low 31 bits.
    """
    x = (state + ids.to(torch.int32).mul(_GOLDEN)).bitwise_and_(_LOW_31_BITS)
    # On 31 bits each line is invertible: xor with a right shift, and an odd multiplier modulo 2^31.
    x ^= x >> _16
    x.mul_(_MULTIPLIER_1).bitwise_and_(_LOW_31_BITS)
    x ^= x >> _15
    x.mul_(_MULTIPLIER_2).bitwise_and_(_LOW_31_BITS)
    x ^= x >> _16
    return x


def finalise_(x: Tensor) -> Tensor:
    """Mixes int32 in place so that every input bit flips every output bit with probability near 1/2; a bijection."""
    x ^= (x >> _16).bitwise_and_(_LOW_16_BITS)
    x.mul_(_MULTIPLIER_1)
    x ^= (x >> _15).bitwise_and_(_LOW_17_BITS)
    x.mul_(_MULTIPLIER_2)
    x ^= (x >> _16).bitwise_and_(_LOW_16_BITS)
    return x


def _finalise_int(x: int) -> int:
    """Returns what `finalise_` gives for one number, as an unsigned int."""
    x &= 0xFFFFFFFF
    x = ((x ^ x >> 16) * MULTIPLIER_1) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * MULTIPLIER_2) & 0xFFFFFFFF
    return x ^ x >> 16


def _signed(x: int) -> int:
    """Returns the int32 that has the low 32 bits of x."""
    return (x + 2**31) % 2**32 - 2**31
