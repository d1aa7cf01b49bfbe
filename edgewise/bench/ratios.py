"""Which artifacts of several bundles are compared with which, and by how much they differ in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgewise.bench.record import Ratio
from edgewise.bench.statistics import ratio_of_medians
from edgewise.bundle.manifest import Artifact


def match(
    artifacts: Sequence[Sequence[Artifact]], times: Mapping[tuple[int, str], Sequence[float]]
) -> tuple[tuple[Ratio, ...], tuple[str, ...]]:
    """Ratios of every artifact of the later bundles to the one of the first bundle that is nearest to it.

    `artifacts`: of each bundle; `times`: by the bundle's number and the artifact's label, from interleaved rounds. The nearest has
    the same label; else the same target and role; else the same role. Gives also the artifacts that have none.
    """
    ratios, unmatched = [], []
    for number, ours in enumerate(artifacts[1:], 1):
        for one in ours:
            baseline = _nearest(one, artifacts[0])
            if baseline is None:
                unmatched.append(f"{one.label} of bundle {number}: the first bundle has no artifact of role {one.role}")
                continue
            ratio, interval = ratio_of_medians(times[number, one.label], times[0, baseline.label])
            ratios.append(
                Ratio(
                    bundle=number,
                    artifact=one.label,
                    baseline_bundle=0,
                    baseline=baseline.label,
                    ratio=ratio,
                    interval=interval,
                )
            )
    return tuple(ratios), tuple(unmatched)


def _nearest(one: Artifact, candidates: Sequence[Artifact]) -> Artifact | None:
    alike = [other for other in candidates if other.role == one.role]
    # `max` gives the first of equals, which is the manifest's order.
    return max(alike, key=lambda other: (other.target == one.target, other.precision == one.precision), default=None)
