"""What `layout` computes, on images of tokens `(batch, channels, 1, tokens)`, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASKED = -1e4
"""Added to scores that a mask of truths hides: Apple's number, whose sums half precision still holds."""


def image(x: Tensor, order: Sequence[int]) -> Tensor:
    """The image of a value; `order`: its axes of the batch, of the channels, outermost first, and of the tokens."""
    if not moves(x.shape, order[-1]) and list(order) != sorted(order):
        return x.reshape(x.shape[order[0]], -1, 1, x.shape[order[-1]])
    moved = x if list(order) == list(range(x.ndim)) else x.permute(*order)
    return moved.reshape(moved.shape[0], -1, 1, moved.shape[-1])


def plain(x: Tensor, parts: Sequence[int], order: Sequence[int]) -> Tensor:
    """The value of an image; `order`: where the value's axes are among batch, parts of the channels, and tokens."""
    full = (x.shape[0], *parts, x.shape[3])
    wide = x.reshape(full)
    return wide if list(order) == list(range(len(full))) else wide.permute(*order)


def moves(shape: Sequence[int], tokens: int) -> bool:
    """Whether numbers change places between a value and its image: not where there is one token, or one channel, alone."""
    inner = 1
    for size in shape[tokens + 1 :]:
        inner *= size
    return shape[tokens] > 1 and inner > 1


def spread(x: Tensor) -> Tensor:
    """A value of up to three axes, that is added to or multiplied by one of three, for its image."""
    wide = x.reshape((1,) * (3 - x.ndim) + tuple(x.shape))
    return wide.permute(0, 2, 1)[:, :, None, :]


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float) -> Tensor:
    """A layer norm over the channels; `weight` and `bias` are `(1, channels, 1, 1)`. In the form that coremltools fuses into one
    `layer_norm`, whose sums half precision does not overflow."""
    centred = x - x.mean(1, keepdim=True)
    normed = centred * ((centred * centred).mean(1, keepdim=True) + epsilon).rsqrt()
    return normed if weight is None or bias is None else normed * weight + bias


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, heads: int, scale: float) -> Tensor:
    """Attention of images, head by head. `mask`: what is added to the scores, `(batch, keys, heads, queries)`, any of them 1."""
    width, width_v = query.shape[1] // heads, value.shape[1] // heads
    # Not a factor of the queries, which coremltools would fold into the weights of their layer.
    turned = key.transpose(1, 3) * scale
    pieces = ((query, width, 1), (turned, width, 3), (value, width_v, 1))
    queries, keys, values = ([x] if heads == 1 else torch.split(x, size, axis) for x, size, axis in pieces)
    outputs = []
    for head in range(heads):
        scores = torch.ops.aten.einsum.default("bchq,bkhc->bkhq", [queries[head], keys[head]])
        if mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, head : head + 1])
        weights = scores.softmax(1)
        outputs.append(torch.ops.aten.einsum.default("bkhq,bchk->bchq", [weights, values[head]]))
    return torch.cat(outputs, 1) if heads > 1 else outputs[0]


def columns(mask: Tensor) -> Tensor:
    """A mask `(batch, heads, queries, keys)`, or of the last of these, as `attention` takes it."""
    wide = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if wide.dtype == torch.bool:
        wide = (1 - torch.ops.aten._to_copy.default(wide, dtype=torch.float32)) * _MASKED
    if not moves_columns(wide.shape):
        return wide.reshape(wide.shape[0], wide.shape[3], 1, 1)
    return wide.permute(0, 3, 1, 2)


def moves_columns(shape: Sequence[int]) -> bool:
    """Whether `columns` changes the places of numbers: not of a mask that is the same for all heads and queries."""
    return any(size > 1 for size in shape[-3:-1])


def causal(queries: int, keys: int) -> Tensor:
    """The mask of attention that looks at nothing later, as `attention` takes it."""
    return columns(torch.ones(queries, keys, dtype=torch.bool).tril())


def reshaped(
    parts: tuple[int, ...], axes: tuple[int, ...], shape: Sequence[int], new: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The parts and axes of an image under another shape of the same value, which splits channels or joins their parts; None: it
    does something else."""
    groups = matched(shape, new)
    if groups is None:
        return None
    sizes: dict[int, list[int]] = {}
    where: list[tuple[int, int]] = []
    for before, after in groups:
        places = [axes[one] for one in before]
        if places[0] < 0:
            if len(before) != 1 or len(after) != 1:
                return None
            where.append((places[0], 0))
            continue
        if places != list(range(places[0], places[0] + len(places))):
            return None
        sizes[places[0]] = [new[one] for one in after]
        where += [(places[0], one) for one in range(len(after))]
    first: dict[int, int] = {}
    made: list[int] = []
    for place in sorted(sizes):
        first[place] = len(made)
        made += sizes[place]
    return tuple(made), tuple(place if place < 0 else first[place] + one for place, one in where)


def matched(shape: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Axes of two shapes of the same numbers in the smallest groups of equal products, from the left; None: there are none."""
    groups, i, j = [], 0, 0
    while i < len(shape) and j < len(new):
        before, after, a, b = [i], [j], shape[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(shape):
                before.append(i)
                a *= shape[i]
                i += 1
            elif b < a and j < len(new):
                after.append(j)
                b *= new[j]
                j += 1
            else:
                return None
        groups.append((before, after))
    return groups if i == len(shape) and j == len(new) else None
