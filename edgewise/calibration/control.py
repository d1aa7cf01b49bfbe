"""Accuracy control: put layers back into floating point, the most sensitive first, until a metric holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.errors import InputError

PROBES = 8
"""Samples that the sensitivity of a layer is measured on."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """An artifact with some layers in floating point: how it runs on a probe, its bytes, and its metric."""

    run: Callable[[Any], Mapping[str, np.ndarray]]
    bytes: int
    measure: Callable[[], float]


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one layer alone does: signal to noise of the outputs in dB (None: exact), and the bytes that it saves."""

    layer: str
    sqnr_db: float | None
    bytes: int


@dataclass(frozen=True)
class Controlled:
    """What was found: the metric of the artifact that nothing is quantised in (`reference`), of the one where every layer is
    (`before`), and of the one that was chosen (`after`); the layers that stay in floating point, the most sensitive first, and what
    they cost; how many artifacts the metric was computed of; the sensitivity of every layer, where it had to be measured."""

    reference: float
    before: float
    after: float
    floating: tuple[Sensitivity, ...]
    evaluations: int
    ranked: tuple[Sensitivity, ...] = ()


def parse_drop(text: str | float) -> float:
    """`1%` or `0.01`: a largest drop of a metric, as a number of 0 to 1. Raises `InputError`."""
    try:
        value = float(text[:-1]) / 100 if isinstance(text, str) and text.strip().endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InputError(f"the largest drop {text!r} is none: give points of the metric, such as 1% (the same as 0.01)")
    return value


def keep_metric(
    layers: Sequence[str],
    make: Callable[[Collection[str]], Candidate],
    probes: Sequence[Any],
    max_drop: float,
    tell: Tell = lambda text: None,
    *,
    errors: bool = False,
) -> Controlled:
    """Find the layers that have to stay in floating point so that the metric is at most `max_drop` below that of the artifact in
    which none is quantised; or above, if it counts `errors`.

    `make`: an artifact with these layers in floating point, which runs until the next is made; the first has them all. A layer is
    the more sensitive, the more the outputs of the probes change when it alone is quantised; the least number of the most sensitive
    layers is found by bisection.
    """
    everything = tuple(layers)
    tell("measure the metric before quantisation")
    plain = make(everything)
    reference = plain.measure()
    wanted = [dict(plain.run(feed)) for feed in probes]
    tell("measure the metric with every layer quantised")
    before = make(()).measure()

    def holds(value: float) -> bool:
        # A count of correct samples over their number is exact to this much.
        return (value - reference if errors else reference - value) <= max_drop + 1e-9

    if holds(before):
        return Controlled(reference, before, before, (), 2)
    found = []
    for number, layer in enumerate(everything):
        tell(f"sensitivity of layer {number + 1} of {len(everything)}")
        one = make([other for other in everything if other != layer])
        found.append(Sensitivity(layer, _sqnr(wanted, [one.run(feed) for feed in probes]), plain.bytes - one.bytes))
    ranked = sorted(found, key=lambda one: float("inf") if one.sqnr_db is None else one.sqnr_db)
    low, high, metrics = 0, len(ranked), {len(ranked): reference}
    while high - low > 1:
        middle = (low + high) // 2
        tell(f"measure the metric with {middle} of {len(ranked)} layers in floating point")
        metrics[middle] = make([one.layer for one in ranked[:middle]]).measure()
        low, high = (low, middle) if holds(metrics[middle]) else (middle, high)
    return Controlled(reference, before, metrics[high], tuple(ranked[:high]), 1 + len(metrics), tuple(ranked))


def _sqnr(wanted: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]]) -> float | None:
    """The worst signal to noise ratio of the outputs over all samples, in dB; None: they are equal."""
    worst: float | None = None
    for name in wanted[0]:
        reference = np.concatenate([one[name].ravel() for one in wanted]).astype(np.float64)
        error = np.concatenate([one[name].ravel() for one in found]).astype(np.float64) - reference
        noise, signal = float(np.sum(error**2)), float(np.sum(reference**2))
        if (noise > 0 and signal > 0) or not np.isfinite(noise):
            ratio = 10 * float(np.log10(signal / noise)) if np.isfinite(noise) else -float("inf")
            worst = ratio if worst is None else min(worst, ratio)
    return worst
