"""The interval of confidence of a ratio: how often it holds the true one, and what it does with few or bad samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.bench.statistics import ratio_of_medians, summarise


def drifting(random: np.random.Generator, n: int, memory: float) -> np.ndarray:
    """Slowdowns in time: log-normal, each like the one before by `memory`."""
    noise = random.normal(size=n)
    for i in range(1, n):
        noise[i] = memory * noise[i - 1] + np.sqrt(1 - memory**2) * noise[i]
    return np.exp(0.1 * noise)


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_the_interval_holds_the_true_ratio(memory: float) -> None:
    """In about 95 of 100 runs on a machine that drifts, with noise of each series' own."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        slow = drifting(random, 100, memory)
        a, b = (slow * np.exp(0.03 * random.normal(size=100)) for _ in range(2))
        ratio, interval = ratio_of_medians(0.012 * a, 0.010 * b)
        assert interval.low <= ratio <= interval.high
        held += interval.low <= 1.2 <= interval.high
    assert held >= 88


def test_drift_that_both_have_does_not_widen_the_interval() -> None:
    random = np.random.default_rng(2)
    slow = np.where(np.arange(400) // 50 % 2 == 0, 1.0, 1.5)
    a, b = (slow * (1 + 0.01 * random.random(400)) for _ in range(2))
    paired = ratio_of_medians(a, b)[1]
    apart = ratio_of_medians(a, random.permutation(b))[1]
    assert paired.high - paired.low < 0.05 < apart.high - apart.low


def test_the_same_samples_give_the_same_interval() -> None:
    a, b = [0.011, 0.012, 0.010, 0.013], [0.020, 0.022, 0.021, 0.019]
    assert ratio_of_medians(a, b) == ratio_of_medians(a, b)
    assert ratio_of_medians(a, b)[0] == pytest.approx(summarise(a).p50_ms / summarise(b).p50_ms)


def test_one_sample_has_no_width() -> None:
    ratio, interval = ratio_of_medians([0.01], [0.02])
    assert (ratio, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_many_samples() -> None:
    random = np.random.default_rng(3)
    a, b = 1 + random.random(50_001), 2 + random.random(50_001)
    ratio, interval = ratio_of_medians(a, b)
    assert interval.low < ratio < interval.high and interval.high - interval.low < 0.05


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_turned_round_the_ratio_is_its_inverse(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.random(n) + 0.1, random.random(n) + 0.1
    (ratio, interval), (other, turned) = ratio_of_medians(a, b), ratio_of_medians(b, a)
    assert ratio == pytest.approx(1 / other)
    assert 0.1 < interval.low <= interval.high and turned.low > 0


def test_of_series_of_different_length_the_first_rounds_count() -> None:
    a, b = [0.01, 0.02, 0.03, 0.9, 0.9, 0.9], [0.02, 0.04, 0.06]
    assert ratio_of_medians(a, b) == ratio_of_medians(a[:3], b)
    assert ratio_of_medians(b, a)[0] == pytest.approx(2)


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], []), ([0.0], [1.0]), ([1.0], [-1.0]), ([[1.0]], [[1.0]])]
)
def test_what_is_no_pair_of_series(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="two series"):
        ratio_of_medians(a, b)
