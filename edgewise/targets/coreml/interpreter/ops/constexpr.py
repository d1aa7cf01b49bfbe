"""Weights that are stored compressed: quantised, as indices into a palette, sparse, or cast."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.ops.quantize import along_axis
from edgewise.targets.coreml.interpreter.registry import Out, axis_of, op, wholes
from edgewise.targets.coreml.interpreter.values import unpacked


@op("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: np.ndarray, zero_point: Any, scale: Any, axis: Any) -> np.ndarray:
    """`scale * (data - zero_point)`, for the whole tensor or for each slice along an axis."""
    data = quantized_data.astype(np.float32)
    return along_axis(scale, data, axis) * (data - along_axis(zero_point, data, axis))


@op("constexpr_cast")
def cast(source_val: np.ndarray, output_dtype: Any) -> np.ndarray:
    return source_val


@op("constexpr_lut_to_dense")
def lut_to_dense(
    indices: np.ndarray, lut: np.ndarray, shape: Any = None, vector_axis: Any = None, *, out: Out
) -> np.ndarray:
    """Elements, or vectors along `vector_axis`, of a palette. Until iOS 16 one palette and packed indices, with `shape`; then
    `lut (*groups, palette, vector)`, with a palette for every block of the indices."""
    if shape is not None:
        sizes = out.promise(wholes(shape))
        bits = int(lut.size - 1).bit_length() if lut.size > 1 else 1
        count = int(np.prod(sizes, dtype=np.int64))
        flat = unpacked(indices, bits, False)
        if flat.size < count:
            raise InputError(f"{indices.size} bytes for {count} indices of {bits} bits")
        return np.take(lut, flat[:count]).reshape(sizes)
    return _by_palettes(indices, lut, vector_axis, out)


def _by_palettes(indices: np.ndarray, lut: np.ndarray, vector_axis: Any, out: Out) -> np.ndarray:
    if lut.ndim != indices.ndim + 2:
        raise InputError(f"palettes of shape {list(lut.shape)} for indices of shape {list(indices.shape)}")
    size = lut.shape[-1]
    if size > 1 and vector_axis is None:
        raise InputError(f"palettes of vectors of {size} without their axis")
    along = 0 if vector_axis is None else axis_of(vector_axis, indices.ndim)
    out.promise([n * size if axis == along else n for axis, n in enumerate(indices.shape)])
    if indices.size and int(indices.max()) >= lut.shape[-2]:
        raise InputError(f"the index {int(indices.max())} into a palette of {lut.shape[-2]}")
    palettes = np.ix_(*(_block_of(n, m) for n, m in zip(indices.shape, lut.shape, strict=False)))
    places = (*palettes, indices)
    dense = lut[places]  # (*indices, vector)
    dense = np.moveaxis(dense, -1, along + 1)
    return dense.reshape([n * size if axis == along else n for axis, n in enumerate(indices.shape)])


def _block_of(size: int, blocks: int) -> np.ndarray:
    """For every element of an axis the number of its block; all blocks are equally long."""
    if blocks < 1 or size % blocks:
        raise InputError(f"an axis of {size} elements in {blocks} blocks")
    return np.arange(size) // (size // blocks)


def _spread(parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter for each block of a tensor, repeated to the shape of the tensor."""
    if parameter.ndim != len(shape):
        raise InputError(f"parameters of shape {list(parameter.shape)} for a tensor of shape {list(shape)}")
    return parameter[np.ix_(*(_block_of(n, m) for n, m in zip(shape, parameter.shape, strict=True)))]


@op("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """`scale * (data - offset)` with a scale and an offset for every block."""
    result = data.astype(np.float32)
    if offset is not None:
        result -= _spread(offset.astype(np.float32), data.shape)
    result *= _spread(scale, data.shape)
    return result


@op("constexpr_sparse_to_dense")
def sparse_to_dense(nonzero_data: np.ndarray, mask: np.ndarray, shape: Any = None, *, out: Out) -> np.ndarray:
    """Elements where a mask of bits is set, zero elsewhere. Until iOS 16 the mask is packed, with `shape`."""
    sizes = out.promise(mask.shape if shape is None else wholes(shape))
    count = int(np.prod(sizes, dtype=np.int64))
    bits = mask if shape is None else unpacked(mask, 1, False)[:count]
    return _scattered(nonzero_data, bits.reshape(sizes))


def _scattered(elements: np.ndarray, mask: np.ndarray) -> np.ndarray:
    set_ = mask.astype(bool)
    if int(set_.sum()) != elements.size:
        raise InputError(f"{elements.size} elements for a mask of {int(set_.sum())}")
    dense = np.zeros(set_.shape, elements.dtype)
    dense[set_] = elements.reshape(-1)
    return dense


@op("constexpr_lut_to_sparse")
def lut_to_sparse(
    indices_mask: np.ndarray, indices_nonzero_data: np.ndarray, lut: np.ndarray, vector_axis: Any = None, *, out: Out
) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the elements of a sparse weight whose elements lie in a palette; for `constexpr_sparse_to_dense`."""
    dense = _scattered(indices_nonzero_data, indices_mask)
    size = lut.shape[-1]
    along = 0 if vector_axis is None else axis_of(vector_axis, indices_mask.ndim)
    mask = np.repeat(indices_mask, size, axis=along) if size > 1 else indices_mask
    out.promise(mask.shape)
    values = _by_palettes(dense, lut, vector_axis, out)
    return mask, values[mask.astype(bool)]


@op("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the elements of a sparse weight that is quantised in blocks; for `constexpr_sparse_to_dense`."""
    dense = blockwise_shift_scale(_scattered(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.astype(bool)]
