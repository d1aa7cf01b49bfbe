"""Reductions over a token axis: gather the kept tokens, or merge the others into them."""
from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgewise::take", mutates_args=())
def take(x: Tensor, kept: Tensor, dim: int, prefix: int) -> Tensor:
    """Gather along the token axis `dim` of `x` the tokens `kept`.

    Args:
        x: any shape; dimension 0 is the batch (its size is 1, or a multiple of the batch of `kept`: batch and heads in
            one dimension) unless `dim` is 0.
        kept: `(B, K)` indices into the whole token axis; `(1, K)` where every sample keeps the same tokens.
        dim: the token axis of `x`.
        prefix: how many leading tokens `x` lacks (a rotary table for patches alone, beside a class token). The first
            `prefix` of `kept` must be those tokens.

    Returns: `x` with `K - prefix` tokens along `dim`; batched if `kept` is.
    """
    index = (kept[:, prefix:] - prefix)
    if dim == 0:
        if kept.shape[0] != 1:
            raise ValueError("the token axis cannot be dimension 0 when every sample keeps other tokens")
        return x.index_select(0, index[0])
    return gather_along(x, index, dim)


def gather_along(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`x` gathered along `dim` with an index `(B, K)` of its own for every sample."""
    if x.shape[0] > index.shape[0] > 1:
        index = index.repeat_interleave(x.shape[0] // index.shape[0], dim=0)
    batch = max(x.shape[0], index.shape[0])
    shape = [batch, *x.shape[1:]]
    x = x.expand(shape)
    shape[dim] = index.shape[1]
    view = [index.shape[0], *(1 for _ in x.shape[1:])]
    view[dim] = index.shape[1]
    return x.gather(dim, index.reshape(view).expand(shape))


@take.register_fake
def _(x: Tensor, kept: Tensor, dim: int, prefix: int) -> Tensor:
    shape = list(x.shape)
    if dim != 0:
        shape[0] = max(x.shape[0], kept.shape[0])
    shape[dim] = kept.shape[1] - prefix
    return x.new_empty(shape)


@torch.library.custom_op("edgewise::merge", mutates_args=())
def merge(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor,
          padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge tokens as size-weighted means.

    Args:
        x: `(B, N, C)` tokens.
        size: `(B, N, 1)`, how many original tokens each one stands for; None means one each.
        kept, src, into: a matching, as `bipartite_match` returns it.
        padding: `(B, N)`, true where a token only fills up the length. It counts with size 0, whatever it holds. What is made
            of padding alone is zeros, of size 0.

    Returns: merged tokens `(B, K, C)` and their sizes `(B, K, 1)`. `(x * size).sum(1)` is conserved when every token is
    kept or merged. Sums are taken in fp32, so that sizes do not overflow half precision.
    """
    dtype = x.dtype
    wide = x.float() if dtype.itemsize < 4 else x
    size = torch.ones_like(wide[:, :, :1]) if size is None else size.to(wide.dtype)
    if padding is not None:
        size, wide = size.masked_fill(padding[:, :, None], 0), wide.masked_fill(padding[:, :, None], 0)
    total = accumulate(size, kept, src, into)
    if padding is not None:
        return (accumulate(wide * size, kept, src, into) / divisor(total)).to(dtype), total.to(dtype)
    return (accumulate(wide * size, kept, src, into) / total).to(dtype), total.to(dtype)


def merge_real(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor,
               padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """`merge`, with an op of no padding in the graph where there is none."""
    return merge(x, size, kept, src, into) if padding is None else merge(x, size, kept, src, into, padding)


def divisor(total: Tensor) -> Tensor:
    """Sizes to divide by: where there is none, the sum is zero and stays."""
    return torch.where(total > 0, total, 1.0)


def accumulate(x: Tensor, kept: Tensor, src: Tensor, into: Tensor) -> Tensor:
    """`x` at `kept`, with `x` at `src` added to the positions `into`."""
    return gather_along(x, kept, 1).scatter_add(1, into[:, :, None].expand(-1, -1, x.shape[2]), gather_along(x, src, 1))


@merge.register_fake
def _(x: Tensor, size: Tensor | None, kept: Tensor, src: Tensor, into: Tensor,
      padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, count = kept.shape
    return x.new_empty(batch, count, x.shape[2]), x.new_empty(batch, count, 1)
