"""Schedules: counts that are legal, costs that are met, and losses that are near the least that there is."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.calibration.schedule import Sites, along, best_schedule, exchanged, power_curve, quadratic_curve, shares


def every(sites: Sites) -> list[tuple[int, ...]]:
    """All legal schedules."""
    found = []
    for counts in product(range(sites.free + 1), repeat=sites.count):
        path = list(pairwise((sites.free, *counts)))
        if all(sites.floor(a) <= b <= a for a, b in path):
            found.append(counts)
    return found


def drawn(sites: Sites, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    half = max(sites.floor(sites.free), 1)
    points = [(half, float(generator.lognormal(0, 1.5))) for _ in range(sites.count)]
    return np.stack([power_curve(sites.free, [(n, loss), (sites.free - 1, loss * 0.05)]) for n, loss in points])


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("budget", [0.45, 0.6, 0.9])
def test_the_best_schedule_is_nearly_as_good_as_the_best_of_all(halves: bool, budget: float) -> None:
    sites = Sites(3, 12, halves)
    cost = shares(sites)
    costs = {counts: 1 + along(cost, sites, counts) for counts in every(sites)}
    for seed in range(12):
        loss = drawn(sites, seed)
        counts = best_schedule(sites, loss, cost, budget)
        assert counts is not None and costs[counts] <= budget + 1e-9
        losses = [along(loss, sites, other) for other, share in costs.items() if share <= budget + 1e-9]
        # A price on the cost finds what is on the convex hull; the rest of the budget is used up greedily.
        assert along(loss, sites, counts) <= min(losses) + 0.1 * (max(losses) - min(losses))
        assert sum(o < along(loss, sites, counts) for o in losses) <= 0.05 * len(losses)


def test_a_site_that_costs_by_itself_is_used_less() -> None:
    sites = Sites(4, 40, True)
    loss, cost = drawn(sites, 3), shares(sites)
    free, dear = (best_schedule(sites, loss, cost, 0.7, each) for each in (0.0, 0.04))
    assert free is not None and dear is not None
    assert 1 + along(cost, sites, dear, 0.04) <= 0.7 + 1e-9
    assert sum(map(bool, sites.removed(dear))) <= sum(map(bool, sites.removed(free)))


def test_a_cost_that_cannot_be_met_has_no_schedule() -> None:
    sites = Sites(2, 16, True)
    assert sites.fewest == (8, 4)
    assert best_schedule(sites, drawn(sites, 0), shares(sites), 0.37) is None
    assert best_schedule(sites, drawn(sites, 0), shares(sites), 0.375) == (8, 4)


def test_the_cost_of_tokens_is_their_mean() -> None:
    sites = Sites(3, 10, False)
    for counts in ((10, 10, 10), (5, 5, 1), (9, 4, 2), (1, 1, 1)):
        assert 1 + along(shares(sites), sites, counts) == pytest.approx(sum(counts) / 30)


def test_curves_go_through_what_was_measured() -> None:
    curve = power_curve(100, [(75, 0.1), (50, 0.4)])
    assert curve[[100, 75, 50]] == pytest.approx([0, 0.1, 0.4]) and (np.diff(curve) < 0).all()
    assert power_curve(100, [(50, 0.4)])[[100, 50, 25]] == pytest.approx([0, 0.4, 1.6])
    assert power_curve(100, [(75, 0.0), (50, 0.4)])[[100, 50]] == pytest.approx([0, 0.4])
    assert quadratic_curve(100, [(75, -0.2), (50, -0.3)])[[100, 75, 50]] == pytest.approx([0, -0.2, -0.3])
    assert quadratic_curve(100, [(50, -0.3)])[[100, 75]] == pytest.approx([0, -0.15])
    assert np.isfinite(power_curve(1, [(0, 0.0)])).all()


REMOVED = st.lists(st.integers(0, 80), min_size=6, max_size=6)


@given(st.integers(1, 6), st.integers(1, 60), st.booleans(), REMOVED, st.integers(0, 99))
def test_exchanges_are_legal_and_cost_no_more(count: int, free: int, halves: bool, removed: list[int], seed: int) -> None:
    sites = Sites(count, free, halves)
    counts = sites.clipped(removed[:count])
    assert all(sites.floor(a) <= b <= a for a, b in pairwise((free, *counts)))
    assert sites.clipped(sites.removed(counts)) == counts
    budget = 1 + along(shares(sites), sites, counts)

    def predict(one: object) -> float:
        return 1 + along(shares(sites), sites, one)  # type: ignore[arg-type]

    other = exchanged(sites, counts, predict, budget, np.random.default_rng(seed))
    if other is not None:
        assert other != counts
        assert predict(other) <= budget + 1e-9
        assert all(sites.floor(a) <= b <= a for a, b in pairwise((free, *other)))
