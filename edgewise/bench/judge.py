"""How far a measurement can be trusted, and why not further."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgewise.bench.record import Latency, Validity
from edgewise.verify.ladder import Rung

GREATEST_CV = 0.025
LEAST_SAMPLES = 30
LEAST_SECONDS = 1.0
MOST_BUSY_CORES = 0.25
MOST_DRIFT = 0.05


def judge_validity(
    latency: Latency,
    accuracy: Rung | None,
    load_average: float | None,
    *,
    busy_cores: float | None = None,
    throttling: Sequence[str] = (),
    stand_in: str | None = None,
) -> tuple[Validity, tuple[str, ...]]:
    """Judge a measurement, and give the reasons.

    `invalid`: the artifact computes something else than its program. `semivalid`: the times are few, or vary, or rose, the
    machine was busy with something else or slowed down, or another runtime stood in for the target's.
    `load_average` counts only where `busy_cores` is not known: it also holds what this process did before.
    """
    wrong, doubts = [], []
    if accuracy is not None and accuracy.passed is False:
        wrong.append("the outputs differ from the golden outputs by more than the threshold")
    if accuracy is None or accuracy.passed is None:
        doubts.append("the accuracy was not checked against a threshold")
    if stand_in is not None:
        doubts.append(f"timed with {stand_in}: these are not the times of a device")
    if latency.n < LEAST_SAMPLES:
        doubts.append(f"{latency.n} samples are fewer than {LEAST_SAMPLES}")
    if sum(latency.samples_ms) < LEAST_SECONDS * 1e3:
        doubts.append(f"the samples took less than {LEAST_SECONDS:g} s in total")
    if latency.cv is not None and latency.cv > GREATEST_CV:
        doubts.append(f"the coefficient of variation is {latency.cv:.1%}, above {GREATEST_CV:.1%}")
    rise = drift(latency)
    if rise is not None and rise > MOST_DRIFT:
        doubts.append(f"the times rose by {rise:.1%} from the first fifth of the samples to the last")
    if busy_cores is not None and busy_cores > MOST_BUSY_CORES:
        doubts.append(f"other processes kept {busy_cores:.1f} cores busy meanwhile")
    elif busy_cores is None and load_average is not None and load_average > 1.0:
        doubts.append(f"the machine was busy: the load average was {load_average:.1f} before the start")
    doubts += [f"throttling: {sign}" for sign in throttling]
    return ("invalid" if wrong else "semivalid" if doubts else "valid"), (*wrong, *doubts)


def drift(latency: Latency) -> float | None:
    """By how much the median of the last fifth of the samples is above that of the first, as a share. None: too few samples."""
    fifth = latency.n // 5
    if fifth < 5:
        return None
    first, last = np.median(latency.samples_ms[:fifth]), np.median(latency.samples_ms[-fifth:])
    return float(last / first) - 1 if first > 0 else None
