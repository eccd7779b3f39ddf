"""The hash of `rng.py` for kernels, bit for bit. Called inside the arena's kernels.

Unsigned throughout, so that a right shift is logical. Sums and products wrap on purpose: `sanitize_overflow=False`
keeps Triton's debug mode from taking that for an error.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dual_policy_plugin import rng

GOLDEN = tl.constexpr(rng.GOLDEN % 2**32)
MULTIPLIER_1 = tl.constexpr(rng.MULTIPLIER_1)
MULTIPLIER_2 = tl.constexpr(rng.MULTIPLIER_2 % 2**32)
LOW_31_BITS = tl.constexpr(rng.LOW_31_BITS)


@triton.jit
def extend(state, key):
    """Returns the uint32 hash with one more key folded in, as `rng.extend`; any integers, low 32 bits count."""
    term = tl.mul(tl.cast(key, tl.uint32), GOLDEN, sanitize_overflow=False)
    return finalise(tl.add(tl.cast(state, tl.uint32), term, sanitize_overflow=False))


@triton.jit
def finalise(x):
    """Mixes uint32, as `rng.finalise_`."""
    x ^= x >> 16
    x = tl.mul(x, MULTIPLIER_1, sanitize_overflow=False)
    x ^= x >> 15
    x = tl.mul(x, MULTIPLIER_2, sanitize_overflow=False)
    x ^= x >> 16
    return x


@triton.jit
def distinct_keys(state, ids):
    """Returns int32 keys in [0, 2^31) that are never equal for two ids under one state, as `rng.distinct_keys`."""
    term = tl.mul(tl.cast(ids, tl.uint32), GOLDEN, sanitize_overflow=False)
    x = tl.add(tl.cast(state, tl.uint32), term, sanitize_overflow=False) & LOW_31_BITS
    x ^= x >> 16
    x = tl.mul(x, MULTIPLIER_1, sanitize_overflow=False) & LOW_31_BITS
    x ^= x >> 15
    x = tl.mul(x, MULTIPLIER_2, sanitize_overflow=False) & LOW_31_BITS
    x ^= x >> 16
    return x.to(tl.int32)
