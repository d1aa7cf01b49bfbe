"""What one step of a plan computes, in plain torch: the body that an insertion traces into the graph."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.methods import Reduced, Tokens, with_tail
from edgewise.ops.reduce import take
from edgewise.ops.score import attention_rows, to_real, with_real, without_rows
from edgewise.passes.analysis import Stream
from edgewise.passes.anchors import Anchor
from edgewise.passes.plan import Step

Made = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Tokens, sizes, indices of the kept tokens, and which of those are padding."""


def reduce_step(step: Step, anchor: Anchor, stream: Stream, given: Mapping[str, Tensor | None],
                crossed: Sequence[Tensor]) -> Made:
    """Run one step on what `reduced` takes, and give the tokens in the form that the graph has them in."""
    x, padding = given["x"], given.get("padding")
    assert x is not None
    made = reduced(step, anchor, stream, given, crossed)
    kept = made.kept if step.method.represented else None
    left = None if padding is None or kept is None else take(padding, kept, 1, 0)
    return _as_before(made.tokens, x, step.place.axis), made.size, kept, left


def reduced(step: Step, anchor: Anchor, stream: Stream, given: Mapping[str, Tensor | None],
            crossed: Sequence[Tensor]) -> Reduced:
    """What the method of one step makes.

    `given` holds the tokens `x`, their `size` and `padding`, the `keys` and `queries` with their heads apart, the `text`, the
    weights of the method by name, the `order` of the tokens if they are not in that of the sequence, the tokens as they were
    `first`, and the attention as `q`, `k` and `mask` or as `weights`, with the padding of its tokens as `filling`. `crossed` are
    the tokens that were kept since that attention ran.
    """
    x = given["x"]
    assert x is not None
    tokens = batch_first(x, step.place.axis)
    last = tokens.shape[1] - step.tail
    batch, size, padding = tokens.shape[0], given.get("size"), given.get("padding")
    keys, queries = (_heads(given.get(name), batch, anchor.transposed_k and name == "keys") for name in ("keys", "queries"))
    if "queries" in step.method.needs:
        keys, queries = _side_by_side(keys), _side_by_side(queries)
    elif keys is not None:
        keys = keys.mean(dim=1)
    attend: Callable[[slice], Tensor] = _Attention(step, anchor, stream, given, crossed, batch).rows
    has_class = stream.prefix > 0
    if stream.origin is not None and set(step.method.needs) & {"attention", "keys"}:
        groups = stream.origin.groups
        has_class, attend = groups.has_class, lambda rows: _left(groups.attention(given, rows), crossed, 3)
        keys = _left(groups.keys(given), crossed, 1) if "keys" in step.method.needs else None
        padding = _also(padding, _left(groups.none, crossed, 1)) if step.method.pads else padding
    made = step.method.reduce(
        Tokens(_until(tokens, last), _until(size, last), _until(keys, last), attend, stream.grid, _until(padding, last),
               step.protected, has_class=has_class, queries=_until(queries, last), text=given.get("text"),
               frames=stream.frames, weights=_weights(step, given), block=_block(step, stream),
               tail=_tail(step, tokens, keys, given.get("order")) if step.tail else None, first=_first(step, given)),
        keep=step.keep, **dict(step.parameters))
    return with_tail(made, tokens, size, step.tail)


def _left(value: Any, crossed: Sequence[Tensor], axis: int) -> Any:
    """Of what has an entry for each token, the entries of those that are left."""
    for kept in crossed if value is not None else ():
        value = take(value, kept, axis, 0)
    return value


def _also(padding: Tensor | None, more: Tensor | None) -> Tensor | None:
    """What is padding for one of two reasons."""
    return more if padding is None else padding if more is None else padding | more


def _tail(step: Step, tokens: Tensor, keys: Tensor | None, order: Tensor | None) -> Tokens:
    """The tokens behind the span. Those that stand before it in the sequence, or nowhere, count as padding."""
    last = tokens.shape[1] - step.tail
    padding = None if order is None else order[:, last:] <= order[:, step.protected:last].amax(dim=1, keepdim=True)
    return Tokens(tokens[:, last:], keys=None if keys is None else keys[:, last:], padding=padding)


def _first(step: Step, given: Mapping[str, Tensor | None]) -> Tensor | None:
    first = given.get("first")
    return None if first is None else batch_first(first, step.place.axis)


def _block(step: Step, stream: Stream) -> tuple[int, int] | None:
    names = [place.name for place in stream.blocks]
    return (names.index(step.place.name), len(names)) if step.place.name in names else None


def _weights(step: Step, given: Mapping[str, Tensor | None]) -> dict[str, Tensor] | None:
    if step.weights is None:
        return None
    return {name: value for name in step.weights if (value := given[f"weights.{name}"]) is not None}


class _Attention:
    """The attention that scores a step, of which only the rows that are asked for are computed."""

    def __init__(self, step: Step, anchor: Anchor, stream: Stream, given: Mapping[str, Tensor | None],
                 crossed: Sequence[Tensor], batch: int) -> None:
        self.anchor, self.given, self.crossed, self.batch = anchor, given, crossed, batch
        self.tail, self.lost, self.has_class = step.tail, step.place.lost, stream.prefix > 0

    def rows(self, rows: slice) -> Tensor:
        """Attention `(B, heads, queries, N)` of some query rows to the tokens of the site, without its tail."""
        if self.lost and not (self.has_class and rows == slice(0, 1)):
            # Rows are counted from the first token of the site, which was not the first of the attention.
            rows = slice((rows.start or 0) + self.lost, None if rows.stop is None else rows.stop + self.lost)
        weights, q, k, mask, filling = (self.given.get(name) for name in ("weights", "q", "k", "mask", "filling"))
        if filling is not None:
            filling = with_real(_until(filling, filling.shape[1] - self.tail), self.tail)
        if weights is not None:
            attention = to_real(_heads(weights, self.batch)[:, :, rows], filling)
        else:
            assert q is not None and k is not None
            if mask is not None:
                mask = mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
                if q.ndim == 3 and mask.ndim == 3:
                    mask = _heads(mask.expand(q.shape[0], -1, -1), self.batch)
            elif self.anchor.causal and rows != slice(-1, None):
                count = q.shape[-2]
                mask = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()[rows]
            keys = _heads(k, self.batch, self.anchor.transposed_k)
            attention = attention_rows(_heads(q, self.batch)[:, :, rows], keys, self.anchor.scale, mask, filling)
        attention = without_rows(attention, None if filling is None else filling[:, rows])
        attention = _left(attention, self.crossed, 3)
        return attention[..., :attention.shape[-1] - self.tail] if self.tail else attention


def _heads(t: Any, batch: int, transposed: bool = False) -> Any:
    """Queries, keys or attention as `(B, heads, N, D)`."""
    if t is None:
        return t
    t = t.transpose(-1, -2) if transposed else t
    return t.reshape(batch, -1, *t.shape[-2:])


def _side_by_side(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.transpose(1, 2).flatten(2)


def _until(t: Any, last: int) -> Any:
    """The first `last` tokens, with no op in the graph where those are all."""
    return t if t is None or t.shape[1] == last else t[:, :last]


def batch_first(x: Tensor, axis: int) -> Tensor:
    """`x` as `(B, N, C)`."""
    if x.ndim == 2:
        return x.unsqueeze(0) if axis == 0 else x.t().unsqueeze(0)
    return x if axis == 1 else x.transpose(axis, 1)


def _as_before(tokens: Tensor, x: Tensor, axis: int) -> Tensor:
    if x.ndim == 2:
        return tokens[0] if axis == 0 else tokens[0].t()
    return tokens if axis == 1 else tokens.transpose(axis, 1)
