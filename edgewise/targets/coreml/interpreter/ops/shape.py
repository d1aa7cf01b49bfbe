"""Ops that move, join and cut elements and compute none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, axis_of, op, text, whole, wholes


@op("reshape")
def reshape(x: np.ndarray, shape: Any) -> np.ndarray:
    """0 keeps the size at its place, where the ranks are equal."""
    sizes = list(wholes(shape))
    if len(sizes) == x.ndim:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@op("reshape_like", lists=("ref_tensors", "begins", "ends", "end_masks"))
def reshape_like(
    x: np.ndarray,
    ref_tensors: Sequence[np.ndarray],
    begins: Sequence[Any],
    ends: Sequence[Any],
    end_masks: Sequence[Any],
) -> np.ndarray:
    """The new shape is made of pieces of the shapes of other tensors."""
    shape: list[int] = []
    for tensor, begin, end, open_ended in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += tensor.shape[whole(begin) : None if bool(open_ended) else whole(end)]
    return x.reshape(shape)


@op("transpose")
def transpose(x: np.ndarray, perm: Any) -> np.ndarray:
    return x.transpose(wholes(perm))


@op("expand_dims")
def expand_dims(x: np.ndarray, axes: Any) -> np.ndarray:
    return np.expand_dims(x, wholes(axes))


@op("squeeze")
def squeeze(x: np.ndarray, axes: Any = None) -> np.ndarray:
    """An axis that is not of one element stays."""
    which = range(x.ndim) if axes is None else [axis_of(axis, x.ndim) for axis in wholes(axes)]
    return x.squeeze(tuple(axis for axis in which if x.shape[axis] == 1))


@op("flatten2d")
def flatten2d(x: np.ndarray, axis: Any = 1) -> np.ndarray:
    split = whole(axis) + (x.ndim if whole(axis) < 0 else 0)
    if not 0 <= split <= x.ndim:
        raise InputError(f"axis {whole(axis)} of a tensor of rank {x.ndim}")
    rows = int(np.prod(x.shape[:split]))
    return x.reshape(rows, int(np.prod(x.shape[split:])))


@op("concat", lists=("values",))
def concat(values: Sequence[np.ndarray], axis: Any, interleave: Any = False, *, out: Out) -> np.ndarray:
    first = values[0]
    along = axis_of(axis, first.ndim)
    shape = list(first.shape)
    shape[along] = sum(value.shape[along] for value in values)
    out.promise(shape)
    if not interleave:
        return np.concatenate(values, axis=along)
    return np.stack(values, axis=along + 1).reshape(shape)


@op("stack", lists=("values",))
def stack(values: Sequence[np.ndarray], axis: Any, *, out: Out) -> np.ndarray:
    along = axis_of(axis, values[0].ndim + 1)
    out.promise((*values[0].shape[:along], len(values), *values[0].shape[along:]))
    return np.stack(values, axis=along)


@op("split")
def split(x: np.ndarray, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> tuple[np.ndarray, ...]:
    along = axis_of(axis, x.ndim)
    if split_sizes is not None:
        sizes = wholes(split_sizes)
    else:
        count = whole(num_splits)
        if count < 1 or x.shape[along] % count:
            raise InputError(f"{x.shape[along]} elements cannot be split into {count}")
        sizes = (x.shape[along] // count,) * count
    if sum(sizes) != x.shape[along] or min(sizes) < 0:
        raise InputError(f"{x.shape[along]} elements cannot be split into {sizes}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=along))


def _slices(
    shape: Sequence[int], begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[slice | int, ...]:
    """The index that `slice_by_index` and `slice_update` mean."""
    rank = len(shape)
    first, last = wholes(begin), wholes(end)
    steps = (1,) * rank if stride is None else wholes(stride)
    no = (False,) * rank
    masks = [no if mask is None else tuple(bool(one) for one in mask) for mask in (begin_mask, end_mask, squeeze_mask)]
    index: list[slice | int] = []
    for size, b, e, s, from_start, to_end, single in zip(shape, first, last, steps, *masks, strict=True):
        if single:
            if not -size <= b < size:
                raise InputError(f"element {b} of an axis of {size}")
            index.append(b)
        else:
            index.append(slice(None if from_start else b, None if to_end else e, s))
    return tuple(index)


@op("slice_by_index")
def slice_by_index(
    x: np.ndarray,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> np.ndarray:
    return np.asarray(x[_slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


@op("slice_by_size")
def slice_by_size(x: np.ndarray, begin: Any, size: Any) -> np.ndarray:
    """A size of -1 is all that is left."""
    index = []
    for length, first, count in zip(x.shape, wholes(begin), wholes(size), strict=True):
        start = first + length if first < 0 else first
        stop = length if count == -1 else start + count
        if not 0 <= start <= stop <= length:
            raise InputError(f"{count} elements from {first} of an axis of {length}")
        index.append(slice(start, stop))
    return x[tuple(index)]


@op("slice_update")
def slice_update(
    x: np.ndarray,
    update: np.ndarray,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> np.ndarray:
    result = x.copy()
    index = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if result[index].shape != update.shape:
        raise InputError(f"a slice of shape {list(result[index].shape)} and an update of shape {list(update.shape)}")
    result[index] = update
    return result


@op("reverse")
def reverse(x: np.ndarray, axes: Any = None) -> np.ndarray:
    return np.flip(x, None if axes is None else wholes(axes))


@op("reverse_sequence")
def reverse_sequence(x: np.ndarray, lengths: np.ndarray, seq_axis: Any = 0, batch_axis: Any = 0) -> np.ndarray:
    """Of every sequence, the first `lengths` elements are reversed."""
    along, batch = axis_of(seq_axis, x.ndim), axis_of(batch_axis, x.ndim)
    places = np.arange(x.shape[along])
    limits = np.asarray(lengths).reshape(-1, 1)
    index = np.where(places < limits, limits - 1 - places, places)
    shape = [1] * x.ndim
    shape[along] = x.shape[along]
    shape[batch] = x.shape[batch]
    ordered = index if batch < along else index.T
    return np.take_along_axis(x, np.broadcast_to(ordered.reshape(shape), x.shape), axis=along)


@op("tile")
def tile(x: np.ndarray, reps: Any, *, out: Out) -> np.ndarray:
    counts = wholes(reps)
    if len(counts) != x.ndim:
        raise InputError(f"{len(counts)} repetitions for a tensor of rank {x.ndim}")
    out.promise([size * count for size, count in zip(x.shape, counts, strict=True)])
    return np.tile(x, counts)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


@op("pad")
def pad(x: np.ndarray, pad: Any, mode: Any = "constant", constant_val: Any = 0, *, out: Out) -> np.ndarray:
    """`pad` holds before and after for the last axes."""
    flat, kind = wholes(pad), text(mode)
    if len(flat) % 2 or len(flat) > 2 * x.ndim or min(flat, default=0) < 0 or kind not in _PAD_MODES:
        raise InputError(f"a padding of {flat}, mode '{kind}', of a tensor of rank {x.ndim}")
    widths = [(0, 0)] * (x.ndim - len(flat) // 2) + list(zip(flat[::2], flat[1::2], strict=True))
    out.promise([size + before + after for size, (before, after) in zip(x.shape, widths, strict=True)])
    if kind == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).astype(x.dtype))
    if kind == "reflect" and any(max(width) > max(0, size - 1) for size, width in zip(x.shape, widths, strict=True)):
        raise InputError(f"a reflection of {flat} of a tensor of shape {list(x.shape)}")
    return np.pad(x, widths, mode=_PAD_MODES[kind])  # type: ignore[call-overload]


def _blocks(x: np.ndarray, down: Sequence[int]) -> np.ndarray:
    """`(N, C, H, W)` as `(N, C, H / a, a, W / b, b)`."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // down[0], down[0], w // down[1], down[1])


@op("depth_to_space")
def depth_to_space(x: np.ndarray, block_size: Any) -> np.ndarray:
    """The channel is (row in the block, column in the block, channel)."""
    b, (n, c, h, w) = whole(block_size), x.shape
    return x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth")
def space_to_depth(x: np.ndarray, block_size: Any) -> np.ndarray:
    b, (n, c, h, w) = whole(block_size), x.shape
    return _blocks(x, (b, b)).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("pixel_shuffle")
def pixel_shuffle(x: np.ndarray, upscale_factor: Any) -> np.ndarray:
    """The channel is (channel, row in the block, column in the block)."""
    b, (n, c, h, w) = whole(upscale_factor), x.shape
    return x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (b * b), h * b, w * b)


@op("pixel_unshuffle")
def pixel_unshuffle(x: np.ndarray, downscale_factor: Any) -> np.ndarray:
    b, (n, c, h, w) = whole(downscale_factor), x.shape
    return _blocks(x, (b, b)).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("space_to_batch")
def space_to_batch(x: np.ndarray, block_shape: Any, paddings: Any, *, out: Out) -> np.ndarray:
    (a, b), pads = wholes(block_shape), np.asarray(paddings).reshape(2, 2)
    n, c, h, w = x.shape
    tall, wide = h + int(pads[0].sum()), w + int(pads[1].sum())
    if min(a, b) < 1 or pads.min() < 0 or tall % a or wide % b:
        raise InputError(f"blocks of {a} by {b} in {tall} by {wide}")
    out.promise((n * a * b, c, tall // a, wide // b))
    blocks = _blocks(np.pad(x, ((0, 0), (0, 0), tuple(pads[0]), tuple(pads[1]))), (a, b))
    return blocks.transpose(3, 5, 0, 1, 2, 4).reshape(n * a * b, c, tall // a, wide // b)


@op("batch_to_space")
def batch_to_space(x: np.ndarray, block_shape: Any, crops: Any) -> np.ndarray:
    (a, b), cut = wholes(block_shape), np.asarray(crops).reshape(2, 2)
    n, c, h, w = x.shape
    whole_ = x.reshape(a, b, n // (a * b), c, h, w).transpose(2, 3, 4, 0, 5, 1).reshape(n // (a * b), c, h * a, w * b)
    return whole_[:, :, cut[0, 0] : h * a - cut[0, 1], cut[1, 0] : w * b - cut[1, 1]]


@op("sliding_windows")
def sliding_windows(x: np.ndarray, axis: Any, size: Any, stride: Any = 1, *, out: Out) -> np.ndarray:
    """`(..., n, ...)` to `(..., windows, size, ...)`."""
    along, width, step = axis_of(axis, x.ndim), whole(size), whole(stride)
    if not 1 <= width <= x.shape[along] or step < 1:
        raise InputError(f"windows of {width} by {step} over {x.shape[along]} elements")
    out.promise((*x.shape[:along], (x.shape[along] - width) // step + 1, width, *x.shape[along + 1 :]))
    view = np.lib.stride_tricks.sliding_window_view(x, width, axis=along)
    view = view[(slice(None),) * along + (slice(None, None, step),)]
    return np.moveaxis(view, -1, along + 1)
