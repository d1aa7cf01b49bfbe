"""The arithmetic that the interpreter has of its own: rounding to halves, the error function and its kin, elements of few bits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.targets.coreml.interpreter.half import to_half
from edgewise.targets.coreml.interpreter.ops.special import erf, sigmoid, softplus
from edgewise.targets.coreml.interpreter.ops.unary import cast
from edgewise.targets.coreml.interpreter.values import unpacked

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    nan = np.isnan(one) & np.isnan(other)
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | nan).all())


def by_numpy(array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(np.float16).astype(np.float32)


def test_rounding_has_the_bits_of_numpy_everywhere() -> None:
    """Every half, the middle of every two neighbours and what lies beside it, and floats of all exponents, NaN and infinities."""
    finite = np.sort(HALVES[np.isfinite(HALVES)])
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        normal = [
            (rng.standard_normal(1 << 18) * scale).astype(np.float32) for scale in (1e-8, 1e-5, 1e-2, 1, 1e4, 6e4)
        ]
        for array in (HALVES, finite, middle, *beside, anything, *normal):
            assert same_bits(to_half(array), by_numpy(array))


def test_rounding_looks_at_no_neighbours() -> None:
    """A value that half precision cannot hold does not change those beside it, and strides do not matter."""
    array = np.random.default_rng(1).standard_normal((300, 200)).astype(np.float32)
    array[7, 3], array[200, 5], array[250, 0] = 1e6, np.nan, -np.inf
    with np.errstate(all="ignore"):
        for view in (array, array.T, array[::2, 1:]):
            assert same_bits(to_half(view), by_numpy(view))
    assert array[7, 3] == 1e6


def test_the_error_function() -> None:
    x = np.linspace(-7, 7, 50_001).astype(np.float32)
    exact = np.array([math.erf(float(one)) for one in x])
    assert np.abs(erf(x) - exact).max() < 6e-8
    near = x[np.abs(x) > 1e-3]
    wanted = np.array([math.erf(float(one)) for one in near])
    assert (np.abs(erf(near) - wanted) / np.abs(wanted)).max() < 1.2e-7
    assert erf(np.array([-np.inf, np.inf, -0.0], np.float32)).tolist() == [-1, 1, 0]
    assert np.isnan(erf(np.array([np.nan], np.float32))).all()
    assert erf(np.zeros((0, 3), np.float32)).shape == (0, 3)


def test_functions_that_could_overflow() -> None:
    x = np.array([-1e4, -100, -30, 0, 30, 100, 1e4], np.float32)
    with np.errstate(over="raise"):
        assert sigmoid(x).tolist() == pytest.approx([0, 0, math.exp(-30), 0.5, 1, 1, 1], rel=1e-6, abs=1e-43)
        assert softplus(x).tolist() == pytest.approx(
            [0, 0, math.exp(-30), math.log(2), 30, 100, 1e4], rel=1e-6, abs=1e-43
        )


def test_casts_end_at_the_ends_of_the_range() -> None:
    x = np.array([-1e20, -129.7, -1.9, -0.5, 0.5, 1.9, 300.2, 1e20, np.inf, -np.inf, np.nan], np.float32)
    assert cast(x, "int8").tolist() == [-128, -128, -1, 0, 0, 1, 127, 127, 127, -128, 0]
    assert cast(x, "uint8").tolist() == [0, 0, 0, 0, 0, 1, 255, 255, 255, 0, 0]
    ends = cast(x, "int32")
    assert (ends[0], ends[7], ends.dtype) == (-(1 << 31), (1 << 31) - 1, np.int32)
    assert cast(x, "int64")[[0, 7]].tolist() == [-(1 << 63), (1 << 63) - 1024]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_elements_of_few_bits(bits: int) -> None:
    """The first element lies in the lowest bits, and elements may cross bytes."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, 37)
    number = sum(int(value) << (bits * place) for place, value in enumerate(values))
    data = np.frombuffer(number.to_bytes(-(-37 * bits // 8), "little"), np.uint8)
    assert unpacked(data, bits, False)[:37].tolist() == values.tolist()
    if bits == 4:
        assert unpacked(data, bits, True)[:37].tolist() == [value - 16 if value > 7 else value for value in values]
