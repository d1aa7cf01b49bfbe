"""Statistics of a series of times, and of the ratio of two series that were taken in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgewise.bench.record import Interval, Latency

CONFIDENCE = 0.95
_RESAMPLES = 1000
_MOST_ROUNDS = 4000
_AT_ONCE = 2**22


def summarise(seconds: Sequence[float]) -> Latency:
    """Summarise samples in seconds, one or more, in the order in which they were taken.

    Percentiles are of the nearest rank: the least sample that at least that share of the samples does not
    exceed, so that each is a time that was measured.
    """
    samples = np.asarray(seconds, dtype=np.float64) * 1e3
    n = len(samples)
    mean = float(samples.mean())
    p50, p90, p95, p99 = (float(np.percentile(samples, q, method="inverted_cdf")) for q in (50, 90, 95, 99))
    return Latency(
        n=n,
        mean_ms=mean,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        min_ms=float(samples.min()),
        max_ms=float(samples.max()),
        cv=float(samples.std(ddof=1)) / mean if n > 1 and mean > 0 else None,
        samples_ms=tuple(samples.tolist()),
    )


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, confidence: float = CONFIDENCE
) -> tuple[float, Interval]:
    """Median of one series / median of another, and the interval of confidence by a bootstrap over rounds.

    Round i took the i-th sample of both, one after the other; where one has fewer, only its rounds count. Blocks of neighbouring
    rounds are drawn with replacement, of about the cube root of their number (Künsch 1989): what slows the machine for a while
    slows a whole block, of both series. From `_MOST_ROUNDS` on, every k-th round is drawn from, which makes the interval wider.
    The same samples give the same interval.

    Raises `ValueError` if one of the two has no samples, or one that is not above 0.
    """
    rounds = min(len(numerator), len(denominator))
    above, below = (np.asarray(series[:rounds], dtype=np.float64) for series in (numerator, denominator))
    if not rounds or above.ndim != 1 or below.ndim != 1 or min(above.min(), below.min()) <= 0:
        raise ValueError("a ratio needs two series of samples, all of them above 0")
    ratio = float(_median(above) / _median(below))
    step = -(-len(above) // _MOST_ROUNDS)
    above, below = above[::step], below[::step]
    n = len(above)
    length = max(1, round(n ** (1 / 3)))
    random = np.random.default_rng(0)
    found: list[np.ndarray] = []
    at_once = max(1, _AT_ONCE // n)
    for first in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - first)
        starts = random.integers(0, n, size=(count, -(-n // length)))
        # Blocks go round the end of the series, so that each round is drawn as often as the others.
        drawn = (starts[..., None] + np.arange(length)).reshape(count, -1)[:, :n] % n
        found.append(_median(above[drawn]) / _median(below[drawn]))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return ratio, Interval(low=float(low), high=float(high), confidence=confidence)


def _median(samples: np.ndarray) -> np.ndarray:
    """Of the last axis, of the nearest rank, as in `summarise`."""
    middle = (samples.shape[-1] - 1) // 2
    return np.partition(samples, middle, axis=-1)[..., middle]
