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

    `artifacts`: of each bundle; `times`: by the bundle's number and the artifact's label, from interleaved rounds. Gives also the
    artifacts to which none is near.
    """
    ratios, unmatched = [], []
    for number, ours in enumerate(artifacts[1:], 1):
        for one in ours:
            baseline = nearest(one, artifacts[0])
            if baseline is None:
                unmatched.append(f"{one.label} of bundle {number}: the first bundle has no artifact of role {one.base_role}")
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


def nearest(one: Artifact, candidates: Sequence[Artifact]) -> Artifact | None:
    """The artifact of the same component that is most alike: the same compression, where there are several in one file, then of the
    same target, and then of the same precision. None: there is none."""

    def likeness(other: Artifact) -> tuple[bool, bool, bool]:
        return other.role == one.role, other.target == one.target, other.precision == one.precision

    # `max` gives the first of equals, which is the manifest's order.
    return max((other for other in candidates if other.base_role == one.base_role), key=likeness, default=None)
