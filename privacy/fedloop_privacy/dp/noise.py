"""Gaussian noise and Poisson sampling from the operating system's cryptographic source.

The randomness of a private mechanism must not be predictable, and a floating-point sample must not betray the value it
was added to. Seeds of `torch` and `numpy` generators fail the first, one Box-Muller draw the second (Mironov 2012).
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
from fedloop_events.errors import FedloopError
from numpy.typing import NDArray

_BITS = 53
_DRAWS = 4


class NoiseError(FedloopError):
    """A standard deviation or a sampling rate that no draw can honour."""


class RandomSource(Protocol):
    """Where uniform randomness comes from: the operating system, or in tests a known sequence."""

    def uniform53(self, n: int) -> NDArray[np.float64]:
        """`n` independent values k / 2^53, k uniform on 0 .. 2^53 - 1; all exact in float64 and below 1."""
        ...


class SystemSource:
    """`os.urandom`: not seedable, not observable, safe after fork."""

    def uniform53(self, n: int) -> NDArray[np.float64]:
        words = np.frombuffer(os.urandom(8 * n), dtype=np.uint64)
        return (words >> np.uint64(64 - _BITS)).astype(np.float64) * 2.0**-_BITS


SYSTEM = SystemSource()


def gaussian(shape: int | tuple[int, ...], std: float, source: RandomSource = SYSTEM) -> NDArray[np.float64]:
    """Independent draws from N(0, std^2), float64.

    Each is the sum of four Box-Muller normals, divided by 2 (Holohan and Braghin 2021, section 5.1, with n = 2, as in
    Opacus's secure mode): to trace the low bits of one draw back to its uniforms takes about 2^159 trials. Add it to the
    protected value in float64 and round once, afterwards.

    Raises NoiseError if `std` is negative or not finite; 0 is allowed and gives zeros.
    """
    if not (math.isfinite(std) and std >= 0):
        raise NoiseError(f"the standard deviation of noise must be finite and not negative, not {std!r}")
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    draws = _standard_normal(_DRAWS * size, source).reshape(_DRAWS, size)
    noise: NDArray[np.float64] = draws.sum(axis=0) * (std / math.sqrt(_DRAWS))
    return noise.reshape(shape)


def poisson_sample(n: int, rate: float, source: RandomSource = SYSTEM) -> NDArray[np.int64]:
    """Indices of a Poisson sample of `n` examples, ascending: each is in it independently with probability `rate`
    (to 2^-53), and at rate 1 all are. The sample may be empty.

    Raises NoiseError unless 0 < rate <= 1 and n >= 0.
    """
    if not (0 < rate <= 1 and n >= 0):
        raise NoiseError(f"Poisson sampling needs a rate in (0, 1] and n >= 0, not rate {rate!r} and n {n!r}")
    return np.flatnonzero(source.uniform53(n) < rate).astype(np.int64, copy=False)


def _standard_normal(n: int, source: RandomSource) -> NDArray[np.float64]:
    """`n` normals by Box and Muller (1958); 53-bit uniforms reach 8.5 standard deviations."""
    pairs = (n + 1) // 2
    uniform = source.uniform53(2 * pairs)
    radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:pairs]))  # 1 - u is in (0, 1]: its logarithm is finite
    angle = (2.0 * math.pi) * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
