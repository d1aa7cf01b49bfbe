from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.errors import InputError
from edgewise.verify import Errors, compare, overlap, worst


def test_values_by_hand() -> None:
    errors = compare(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert errors.finite
    assert errors.max_abs == 1.0
    assert errors.relative == 0.25
    assert errors.sqnr_db == pytest.approx(10 * math.log10(21 / 1))
    assert errors.cosine == pytest.approx(17 / math.sqrt(21 * 14))
    assert errors.top1 is None


def test_the_reference_comes_first() -> None:
    a, b = np.array([1.0, 1.0]), np.array([3.0, 1.0])
    assert compare(a, b).relative == 2.0
    assert compare(b, a).relative == pytest.approx(2 / 3)
    assert compare(a, b).sqnr_db == pytest.approx(10 * math.log10(2 / 4))
    assert compare(b, a).sqnr_db == pytest.approx(10 * math.log10(10 / 4))


def test_equal_arrays_are_exact() -> None:
    for array in (
        np.arange(6.0).reshape(2, 3),
        np.zeros(4),
        np.full(3, 7.0),
        np.array(2.0),
        np.array([True]),
    ):
        errors = compare(array, array)
        assert (errors.max_abs, errors.relative, errors.sqnr_db, errors.cosine) == (0.0, 0.0, None, 1.0)


def test_a_zero_reference_has_no_relative_error() -> None:
    errors = compare(np.zeros(3), np.array([0.0, 1e-9, 0.0]))
    assert errors.finite
    assert errors.max_abs == 1e-9
    assert (errors.relative, errors.sqnr_db, errors.cosine) == (None, None, None)


def test_a_value_of_zeros_lost_everything() -> None:
    errors = compare(np.array([2.0, -2.0]), np.zeros(2))
    assert (errors.relative, errors.sqnr_db, errors.cosine) == (1.0, 0.0, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_has_no_metric(bad: float, side: int) -> None:
    arrays = [np.ones(3), np.ones(3)]
    arrays[side][1] = bad
    assert compare(*arrays) == Errors(finite=False)
    both = np.array([1.0, bad])
    assert not compare(both, both).finite


def test_empty_arrays_agree() -> None:
    errors = compare(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (errors.finite, errors.max_abs, errors.relative) == (True, 0.0, 0.0)


def test_extreme_numbers_do_not_overflow() -> None:
    huge = np.array([1e308, -1e308])
    assert compare(huge, -huge).relative == 2.0
    assert compare(huge, -huge).cosine == pytest.approx(-1.0)
    tiny = np.array([5e-324, 0.0])
    assert compare(tiny, 2 * tiny).relative == 1.0
    assert compare(np.array([1e-129, 0.0]), np.array([0.0, 1e180])).relative == np.finfo(float).max
    assert compare(np.float32([3e38]), np.float32([-3e38])).relative == 2.0


def test_integers_and_booleans_do_not_wrap_around() -> None:
    assert compare(np.uint8([0]), np.uint8([255])).max_abs == 255.0
    assert compare(np.array([True]), np.array([False])).max_abs == 1.0
    assert compare(np.int64([2**40]), np.int64([-(2**40)])).relative == 2.0


def test_top1_is_for_rows_of_class_scores() -> None:
    a = np.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    b = np.array([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1], [0.1, 0.2]])
    assert compare(a, b).top1 == 0.75
    assert compare(a[None], b[None]).top1 is None
    assert compare(a[:, :1], b[:, :1]).top1 is None
    assert compare(a.astype(int), a.astype(int)).top1 is None


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"shape \(3,\) with its reference of shape \(1, 3\)"):
        compare(np.ones((1, 3)), np.ones(3))


numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)


@given(st.lists(st.tuples(numbers, numbers), max_size=5))
def test_no_value_breaks_the_metrics(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    errors = compare(a, b)
    for value in (errors.max_abs, errors.relative, errors.sqnr_db, errors.cosine):
        assert value is None or math.isfinite(value)
    assert errors.finite == bool(np.isfinite(a).all() and np.isfinite(b).all())


def test_overlap_is_the_mean_jaccard_index() -> None:
    a = np.array([[0, 1, 2], [3, 4, 5]])
    b = np.array([[2, 1, 0], [3, 6, 7]])
    assert overlap(a, b) == pytest.approx((1 + 1 / 5) / 2)
    assert overlap(np.array([1, 2]), np.array([2, 3, 4])) == 0.25
    assert overlap(np.zeros((2, 0), int), np.zeros((2, 0), int)) == 1.0
    assert overlap(np.array([[1, 1]]), np.array([[1]])) == 1.0


def test_overlap_needs_the_same_rows() -> None:
    for a, b in (
        (np.ones((2, 3)), np.ones((3, 3))),
        (np.array(1), np.array(1)),
        (np.ones((0, 2)), np.ones((0, 2))),
    ):
        with pytest.raises(InputError):
            overlap(a, b)


def test_worst_of_several() -> None:
    fine = compare(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]))
    off = compare(np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]]))
    assert worst([fine, off]) == off
    assert worst([fine, fine]) == fine
    assert worst([fine, Errors(finite=False)]) == Errors(finite=False)
    assert worst([fine, compare(np.zeros(2), np.ones(2))]).relative is None
    with pytest.raises(InputError):
        worst([])
