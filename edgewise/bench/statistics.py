"""Statistics of a series of times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgewise.bench.record import Latency


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
