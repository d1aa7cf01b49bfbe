"""Matrix products and attention, on BLAS in single precision; whole numbers are multiplied by numpy itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import Out, op, text

_SCORES = 1 << 24  # elements of attention scores that are made at a time


@op("linear")
def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, out: Out) -> np.ndarray:
    """`x (..., in) weight (out, in)^T + bias (out)`."""
    out.promise((*x.shape[:-1], weight.shape[0]))
    # One product of two matrices is faster than many.
    result = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        result += bias
    return result.reshape(*x.shape[:-1], weight.shape[0])


@op("matmul")
def matmul(x: np.ndarray, y: np.ndarray, transpose_x: Any = False, transpose_y: Any = False, *, out: Out) -> np.ndarray:
    """The product of the last two axes, over batches that broadcast."""
    left = x.swapaxes(-1, -2) if transpose_x and x.ndim > 1 else x
    right = y.swapaxes(-1, -2) if transpose_y and y.ndim > 1 else y
    if left.ndim == 0 or right.ndim == 0:
        raise InputError("matmul of a scalar")
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    rows, columns = left.shape[-2:-1], right.shape[-1:] if right.ndim > 1 else ()
    out.promise((*batch, *rows, *columns))
    return np.asarray(np.matmul(left, right))


@op("einsum", lists=("values",))
def einsum(values: Sequence[np.ndarray], equation: Any, *, out: Out) -> np.ndarray:
    """Any equation of plain letters over two tensors; an axis of one broadcasts. It is computed as a product of matrices."""
    spec = text(equation).replace(" ", "")
    inputs, arrow, result = spec.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(values) != 2 or not spec.replace(",", "").replace("->", "").isalpha():
        raise InputError(f"einsum cannot do '{spec}' of {len(values)} tensors")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        if len(term) != value.ndim or len(set(term)) != len(term):
            raise InputError(f"einsum: '{term}' does not name the axes of a tensor of rank {value.ndim}")
        for letter, size in zip(term, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size and 1 not in (size, sizes[letter]):
                raise InputError(f"einsum: '{letter}' is both {sizes[letter]} and {size}")
            sizes[letter] = max(sizes[letter], size) if size and sizes[letter] else 0
    if not set(result) <= set(sizes) or len(set(result)) != len(result):
        raise InputError(f"einsum: '{result}' has axes that no input has, or one twice")
    out.promise([sizes[letter] for letter in result])
    full = []
    for term, value in zip(terms, values, strict=True):
        # A letter of one term alone that is not kept is summed first; an axis of one is spread only where it is contracted.
        alone = tuple(
            i for i, one in enumerate(term) if one not in result and sum(one in other for other in terms) == 1
        )
        kept = "".join(one for i, one in enumerate(term) if i not in alone)
        summed = value.sum(axis=alone, dtype=value.dtype) if alone else value
        full.append((kept, summed))
    (left, x), (right, y) = full
    contracted = [one for one in left if one in right and one not in result]
    batch = [one for one in result if one in left and one in right]
    rows = [one for one in left if one not in right]
    columns = [one for one in right if one not in left]
    a = _arranged(x, left, batch, rows, contracted, sizes)
    b = _arranged(y, right, batch, contracted, columns, sizes)
    product = np.matmul(a, b).reshape([sizes[one] for one in (*batch, *rows, *columns)])
    order = [*batch, *rows, *columns]
    return product.transpose([order.index(one) for one in result])


def _arranged(
    x: np.ndarray, letters: str, batch: list[str], first: list[str], second: list[str], sizes: dict[str, int]
) -> np.ndarray:
    """`x` as matrices (*batch, first, second), each of the last two a group of axes."""
    moved = x.transpose([letters.index(one) for one in (*batch, *first, *second)])
    kept = moved.shape[: len(batch)]
    moved = np.broadcast_to(moved, (*kept, *(sizes[one] for one in (*first, *second))))
    groups = [math.prod(sizes[one] for one in group) for group in (first, second)]
    return moved.reshape(*kept, *groups)


@op("scaled_dot_product_attention")
def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, attn_mask: np.ndarray | None = None, *, out: Out
) -> np.ndarray:
    """`softmax(q k^T / sqrt(E) + mask) v`. A mask of truths keeps where it is true. Scores stay in single precision."""
    batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    queries, keys = query.shape[-2], key.shape[-2]
    shape = out.promise((*batch, queries, value.shape[-1]))
    q = np.broadcast_to(query, (*batch, *query.shape[-2:])).reshape(-1, *query.shape[-2:])
    k = np.broadcast_to(key, (*batch, *key.shape[-2:])).reshape(-1, *key.shape[-2:])
    v = np.broadcast_to(value, (*batch, *value.shape[-2:])).reshape(-1, *value.shape[-2:])
    mask = None
    if attn_mask is not None:
        out.room((*batch, queries, keys))
        wide = np.where(attn_mask, np.float32(0), np.float32(-np.inf)) if attn_mask.dtype == np.bool_ else attn_mask
        mask = np.broadcast_to(wide, (*batch, queries, keys)).reshape(-1, queries, keys)
    q = q * np.float32(1 / math.sqrt(query.shape[-1]))
    result = np.empty((q.shape[0], queries, value.shape[-1]), np.float32)
    count = max(1, _SCORES // max(1, queries * keys))
    for start in range(0, q.shape[0], count):
        part = slice(start, start + count)
        scores = q[part] @ k[part].swapaxes(-1, -2)
        if mask is not None:
            scores += mask[part]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        result[part] = scores @ v[part]
    return result.reshape(shape)
