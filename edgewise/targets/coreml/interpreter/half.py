"""Rounding to half precision of arrays that stay float32: the bits of `numpy.float16`, in less than half the time."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 14  # elements whose temporaries stay in the cache
_SIGN, _EXPONENT = np.uint32(0x80000000), np.uint32(0x7F800000)
_LEAST = np.uint32(0x38800000)  # 2^-14, below which the spacing of halves is that at 2^-14
_SHIFT = np.float32(1.5 * 2**13)


def to_half(array: np.ndarray) -> np.ndarray:
    """Round floats to the nearest half, ties to even, and hold them as float32. Beyond the largest half lies infinity.

    A float32 has 13 bits more than a half. Adding and taking away 1.5 * 2^13 times the power of two below a number leaves it
    without them, rounded by the addition itself.
    """
    if array.dtype != np.float32 or array.size < _CHUNK:
        return array.astype(np.float16).astype(np.float32)
    flat = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(flat.shape, np.float32)
    scratch = np.empty(_CHUNK, np.uint32)
    for start in range(0, flat.size, _CHUNK):
        x, rounded = flat[start : start + _CHUNK], result[start : start + _CHUNK]
        bits, work = x.view(np.uint32), scratch[: x.size]
        np.bitwise_and(bits, _EXPONENT, out=work)
        np.maximum(work, _LEAST, out=work)
        shift = work.view(np.float32)
        np.multiply(shift, _SHIFT, out=shift)
        np.add(x, shift, out=rounded)
        np.subtract(rounded, shift, out=rounded)
        # Not so where halves end; a NaN fails both comparisons.
        if not (rounded.min() > -(2.0**16) and rounded.max() < 2.0**16):
            rounded[...] = x.astype(np.float16)
            continue
        # What is rounded to zero keeps its sign.
        np.bitwise_and(bits, _SIGN, out=work)
        np.bitwise_or(rounded.view(np.uint32), work, out=rounded.view(np.uint32))
    return result.reshape(array.shape)
