"""Ops with many parameters, on random ones: convolutions and pools against PyTorch, gathers and scatters against plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter import OPS, TensorType
from edgewise.targets.coreml.interpreter.registry import Out
from edgewise.targets.coreml.interpreter.values import BY_NAME

ROUNDS = 60


def call(name: str, shape: tuple[int, ...], **inputs: Any) -> np.ndarray:
    """Run an op whose output is declared with this shape."""
    extra = {"out": Out((TensorType(BY_NAME["fp32"], shape),), 1 << 30)} if "out" in OPS[name].extras else {}
    result: np.ndarray = OPS[name].function(**inputs, **extra)
    return result


def draws(seed: int) -> Any:
    for number in range(ROUNDS):
        yield np.random.default_rng([seed, number])


def f(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def close(one: np.ndarray, other: torch.Tensor | np.ndarray) -> None:
    np.testing.assert_allclose(one, np.asarray(other), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank: int) -> None:
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    for rng in draws(rank):
        groups = int(rng.integers(1, 4))
        inner, outer = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4))
        kernel, strides, dilations = (rng.integers(1, high, rank) for high in (4, 4, 3))
        pads = rng.integers(0, 3, 2 * rank)
        x = f(rng, int(rng.integers(1, 4)), inner, *rng.integers(5, 9, rank))
        weight, bias = f(rng, outer, inner // groups, *kernel), f(rng, outer) if rng.random() < 0.5 else None
        backwards = [int(one) for pair in reversed(pads.reshape(rank, 2)) for one in pair]
        wanted = function(
            F.pad(torch.from_numpy(x), backwards),
            torch.from_numpy(weight),
            None if bias is None else torch.from_numpy(bias),
            tuple(strides.tolist()),
            0,
            tuple(dilations.tolist()),
            groups,
        )
        options = {"strides": strides, "pad_type": "custom", "pad": pads, "dilations": dilations, "groups": groups}
        close(call("conv", tuple(wanted.shape), x=x, weight=weight, bias=bias, **options), wanted)


@pytest.mark.parametrize("pad_type", ["same", "same_lower"])
def test_convolutions_that_keep_the_size(pad_type: str) -> None:
    """`ceil(size / stride)` places, and the odd element of padding after, or before."""
    for rng in draws(4):
        kernel, strides = rng.integers(1, 5, 2), rng.integers(1, 4, 2)
        x, weight = f(rng, 2, 3, *rng.integers(4, 9, 2)), f(rng, 2, 3, *kernel)
        pads = []
        for size, k, s in zip(x.shape[2:], kernel, strides, strict=True):
            total = max(0, (-(-size // s) - 1) * int(s) + int(k) - size)
            pads.append((total // 2, total - total // 2) if pad_type == "same" else (total - total // 2, total // 2))
        padded = F.pad(torch.from_numpy(x), [*pads[1], *pads[0]])
        wanted = F.conv2d(padded, torch.from_numpy(weight), stride=tuple(strides.tolist()))
        assert wanted.shape[2:] == tuple(-(-size // int(s)) for size, s in zip(x.shape[2:], strides, strict=True))
        close(call("conv", tuple(wanted.shape), x=x, weight=weight, strides=strides, pad_type=pad_type), wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions(rank: int) -> None:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    for rng in draws(10 + rank):
        groups = int(rng.integers(1, 3))
        inner, outer = groups * int(rng.integers(1, 4)), int(rng.integers(1, 4))
        kernel, strides, dilations = (rng.integers(1, high, rank) for high in (4, 4, 3))
        pads = np.array([rng.integers(0, (k - 1) * d + 1) for k, d in zip(kernel, dilations, strict=True)])
        x, weight = f(rng, 2, inner, *rng.integers(2, 6, rank)), f(rng, inner, outer, *kernel)
        more = np.array([rng.integers(0, max(s, d)) for s, d in zip(strides, dilations, strict=True)])
        arguments = [tuple(one.tolist()) for one in (strides, pads, more)]
        try:
            wanted = function(
                torch.from_numpy(x), torch.from_numpy(weight), None, *arguments, groups, tuple(dilations.tolist())
            )
        except RuntimeError:  # nothing would be left
            continue
        options = {"strides": strides, "dilations": dilations, "groups": groups, "output_shape": wanted.shape}
        got = call(
            "conv_transpose",
            tuple(wanted.shape),
            x=x,
            weight=weight,
            pad_type="custom",
            pad=np.repeat(pads, 2),
            **options,
        )
        close(got, wanted)


@pytest.mark.parametrize("ceil", [False, True])
def test_pools(ceil: bool) -> None:
    for rng in draws(20 + ceil):
        kernel, strides = rng.integers(1, 5, 2), rng.integers(1, 4, 2)
        pads = np.array([rng.integers(0, k // 2 + 1) for k in kernel])
        if ceil and not pads.all():
            continue  # without padding Core ML's formula lets a window start beyond the end, and torch's does not
        x = f(rng, 2, 3, *rng.integers(5, 10, 2))
        given = {
            "kernel_sizes": kernel,
            "strides": strides,
            "pad_type": "custom",
            "pad": np.repeat(pads, 2),
            "ceil_mode": ceil,
        }
        sizes = [tuple(one.tolist()) for one in (kernel, strides, pads)]
        wanted = F.max_pool2d(torch.from_numpy(x), *sizes, ceil_mode=ceil)
        close(call("max_pool", tuple(wanted.shape), x=x, **given), wanted)
        for excluded in (False, True):
            wanted = F.avg_pool2d(torch.from_numpy(x), *sizes, ceil, not excluded)
            close(call("avg_pool", tuple(wanted.shape), x=x, exclude_padding_from_average=excluded, **given), wanted)


def test_gathers() -> None:
    for rng in draws(30):
        batch, before, after, where = (int(rng.integers(0, 3)) for _ in range(4))
        lead = rng.integers(1, 4, batch).tolist()
        x = f(rng, *lead, *rng.integers(1, 4, before), size := int(rng.integers(1, 5)), *rng.integers(1, 4, after))
        indices = rng.integers(0, size, (*lead, *rng.integers(1, 4, where))).astype(np.int32)
        axis = batch + before
        shape = (*x.shape[:axis], *indices.shape[batch:], *x.shape[axis + 1 :])
        wanted = np.empty(shape, np.float32)
        for one in np.ndindex(*lead):
            wanted[one] = np.take(x[one], indices[one], axis=before)
        got = call("gather", shape, x=x, indices=indices, axis=axis, batch_dims=batch)
        np.testing.assert_array_equal(got, wanted)


def test_gathers_of_points() -> None:
    for rng in draws(31):
        batch, depth, after, where = (int(rng.integers(low, 3)) for low in (0, 1, 0, 0))
        lead = rng.integers(1, 4, batch).tolist()
        x = f(rng, *lead, *rng.integers(1, 4, depth), *rng.integers(1, 4, after))
        places = (*lead, *rng.integers(1, 4, where))
        indices = np.stack([rng.integers(0, x.shape[batch + i], places) for i in range(depth)], -1).astype(np.int32)
        shape = (*places, *x.shape[batch + depth :])
        wanted = np.empty(shape, np.float32)
        for one in np.ndindex(*places):
            wanted[one] = x[one[:batch]][tuple(indices[one])]
        np.testing.assert_array_equal(call("gather_nd", shape, x=x, indices=indices, batch_dims=batch), wanted)


COMBINE = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", list(COMBINE))
def test_scatters(mode: str) -> None:
    """With indices that come again: every update counts, in their order."""
    for rng in itertools.islice(draws(40), 20):
        data = f(rng, *rng.integers(2, 5, 3))
        axis = int(rng.integers(0, 3))
        indices = rng.integers(0, data.shape[axis], 6).astype(np.int32)
        updates = f(rng, *data.shape[:axis], 6, *data.shape[axis + 1 :]) + np.float32(3)
        wanted = data.copy()
        for place, index in enumerate(indices):
            at = (slice(None),) * axis + (index,)
            wanted[at] = COMBINE[mode](wanted[at], np.take(updates, place, axis))
        close(call("scatter", data.shape, data=data, indices=indices, updates=updates, axis=axis, mode=mode), wanted)

        each = rng.integers(0, data.shape[axis], updates.shape).astype(np.int32)
        wanted = data.copy()
        for one in np.ndindex(*updates.shape):
            at = (*one[:axis], each[one], *one[axis + 1 :])
            wanted[at] = COMBINE[mode](wanted[at], updates[one])
        close(
            call("scatter_along_axis", data.shape, data=data, indices=each, updates=updates, axis=axis, mode=mode),
            wanted,
        )

        points = np.stack([rng.integers(0, size, 7) for size in data.shape[:2]], -1).astype(np.int32)
        rows = f(rng, 7, data.shape[2]) + np.float32(3)
        wanted = data.copy()
        for point, row in zip(points, rows, strict=True):
            wanted[tuple(point)] = COMBINE[mode](wanted[tuple(point)], row)
        close(call("scatter_nd", data.shape, data=data, indices=points, updates=rows, mode=mode), wanted)


def test_einsum() -> None:
    """Random equations of two terms: batch axes, sums, and axes of one that are spread."""
    for rng in draws(50):
        letters = "abcdef"[: int(rng.integers(2, 6))]
        sizes = {letter: int(rng.integers(1, 5)) for letter in letters}
        left, right = ("".join(rng.permutation([one for one in letters if rng.random() < 0.7])) for _ in range(2))
        result = "".join(rng.permutation([one for one in letters if one in left + right and rng.random() < 0.6]))
        if not left or not right:
            continue
        x, y = (f(rng, *(sizes[one] for one in term)) for term in (left, right))
        equation = f"{left},{right}->{result}"
        wanted = np.einsum(equation, x.astype(np.float64), y.astype(np.float64))
        close(call("einsum", wanted.shape, values=(x, y), equation=equation), wanted)


def test_a_depthwise_convolution_with_a_large_kernel() -> None:
    rng = np.random.default_rng(60)
    x, weight = f(rng, 2, 3, 70, 71), f(rng, 3, 1, 66, 65)
    wanted = F.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weight).double(), groups=3)
    got = call("conv", tuple(wanted.shape), x=x, weight=weight, groups=3)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_a_window_larger_than_its_tensor() -> None:
    with pytest.raises(InputError, match="is larger than"):
        call("conv", (1, 1, 1), x=np.ones((1, 1, 2), np.float32), weight=np.ones((1, 1, 3), np.float32))
