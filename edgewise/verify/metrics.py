"""Error metrics between a reference array and a value. The reference always comes first."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from edgewise.errors import InputError
from edgewise.schema import Strict

_GREATEST = float(np.finfo(np.float64).max)


class Errors(Strict):
    """How far a value is from its reference. None: the metric has no value here.

    - `finite`: neither array holds NaN or infinity. If False, every metric is None, and nothing can pass.
    - `max_abs`: max |value - reference|.
    - `relative`: `max_abs` / max |reference|. None if the reference is all zero and the value is not.
    - `sqnr_db`: signal to noise in dB, 10 log10(sum reference^2 / sum (value - reference)^2). None if exact
      (`max_abs` is 0) or if the reference is all zero.
    - `cosine`: cosine of the angle between the two, flattened. None if exactly one of them is all zero.
    - `top1`: share of rows with the same argmax over the last axis. Only for classifier-like outputs: 2-D,
      floating point, at least two classes.
    """

    finite: bool
    max_abs: float | None = None
    relative: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    top1: float | None = None


def compare(reference: np.ndarray, value: np.ndarray) -> Errors:
    """Compare `value` with `reference`: arrays of one shape, of any real or boolean dtype.

    The order matters: `relative` and `sqnr_db` are measured against the reference. Empty arrays agree
    exactly. Raises `InputError` if the shapes differ.
    """
    reference, value = np.asarray(reference), np.asarray(value)
    if reference.shape != value.shape:
        raise InputError(f"cannot compare shape {value.shape} with its reference of shape {reference.shape}")
    top1 = _top1(reference, value)
    a = reference.astype(np.float64).ravel()
    b = value.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Errors(finite=False)
    if a.size == 0:
        return Errors(finite=True, max_abs=0.0, relative=0.0, cosine=1.0, top1=top1)
    # Scaling by a power of two changes no ratio and keeps every square and sum in range.
    peak = max(float(np.abs(a).max()), float(np.abs(b).max()))
    exponent = math.frexp(peak)[1] if peak else 0
    a, b = np.ldexp(a, -exponent), np.ldexp(b, -exponent)
    error = b - a
    max_abs, peak_a = float(np.abs(error).max()), float(np.abs(a).max())
    signal, noise, power_b = _power(a), _power(error), _power(b)
    exact = max_abs == 0.0
    return Errors(
        finite=True,
        max_abs=_unscaled(max_abs, exponent),
        relative=0.0 if exact else min(max_abs / peak_a, _GREATEST) if peak_a else None,
        sqnr_db=None if exact or not signal or not noise else 10.0 * (math.log10(signal) - math.log10(noise)),
        cosine=_cosine(a, b, signal, power_b, exact),
        top1=top1,
    )


def overlap(kept_a: np.ndarray, kept_b: np.ndarray) -> float:
    """Mean over rows of the Jaccard index |A & B| / |A | B| of two sets of kept token indices.

    Shapes `(..., keep_a)` and `(..., keep_b)`; the order of the indices and repeats do not matter. Two empty
    sets agree. Raises `InputError` if the leading axes differ or there is no row.
    """
    kept_a, kept_b = np.asarray(kept_a), np.asarray(kept_b)
    if kept_a.ndim == 0 or kept_b.ndim == 0 or kept_a.shape[:-1] != kept_b.shape[:-1]:
        raise InputError(f"cannot compare kept sets of shapes {kept_a.shape} and {kept_b.shape}")
    rows = math.prod(kept_a.shape[:-1])
    if rows == 0:
        raise InputError("cannot compare kept sets: there is no row")
    total = 0.0
    for row_a, row_b in zip(kept_a.reshape(rows, -1), kept_b.reshape(rows, -1), strict=True):
        a, b = set(row_a.tolist()), set(row_b.tolist())
        total += len(a & b) / len(a | b) if a | b else 1.0
    return total / rows


def worst(errors: Iterable[Errors]) -> Errors:
    """The worst of each metric over several comparisons. Raises `InputError` if there are none."""
    every = list(errors)
    if not every:
        raise InputError("there is nothing to compare")
    if not all(one.finite for one in every):
        return Errors(finite=False)
    # One relative error that cannot be named (a zero reference) is worse than any number.
    relative = [one.relative for one in every]
    cosine = [one.cosine for one in every]
    return Errors(
        finite=True,
        max_abs=max(_known(one.max_abs for one in every), default=None),
        relative=None if None in relative else max(_known(relative)),
        sqnr_db=min(_known(one.sqnr_db for one in every), default=None),
        cosine=None if None in cosine else min(_known(cosine)),
        top1=min(_known(one.top1 for one in every), default=None),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _power(array: np.ndarray) -> float:
    return float(np.sum(array * array))  # and not np.dot, whose sum depends on the number of threads


def _unscaled(number: float, exponent: int) -> float:
    try:
        return math.ldexp(number, exponent)
    except OverflowError:  # the difference of two finite numbers may be above the greatest float
        return _GREATEST


def _cosine(a: np.ndarray, b: np.ndarray, power_a: float, power_b: float, exact: bool) -> float | None:
    if exact:
        return 1.0
    if not power_a or not power_b:
        return None
    cosine = float(np.sum(a * b)) / (math.sqrt(power_a) * math.sqrt(power_b))
    return min(1.0, max(-1.0, cosine))


def _top1(reference: np.ndarray, value: np.ndarray) -> float | None:
    floating = all(np.issubdtype(array.dtype, np.floating) for array in (reference, value))
    if reference.ndim != 2 or reference.shape[0] == 0 or reference.shape[1] < 2 or not floating:
        return None
    return float(np.mean(reference.argmax(axis=-1) == value.argmax(axis=-1)))
