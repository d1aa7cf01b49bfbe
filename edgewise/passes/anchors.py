"""Attention anchors: every attention of a graph, found by its shape and not by anybody's class names."""
from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgewise.passes.graph import parameters_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Anchor:
    """One attention: softmax(q k^T * scale + mask) v, fused in one node or spelled out.

    `q (.., Q, D)` and `k (.., N, D)`, or `(.., D, N)` where `transposed_k`, are what is multiplied. `softmax` is the
    fused node, or the softmax whose value `(.., Q, N)` is the attention map. `out` is the product with the values.
    `residual` is the stream that the projected `out` is added to, `joined` the sum (None: no residual stream found).
    `scale`, `mask` and `causal` are those of a fused node.
    """

    index: int
    q: fx.Node
    k: fx.Node
    softmax: fx.Node
    out: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    causal: bool = False
    transposed_k: bool = False
    residual: fx.Node | None = None
    joined: fx.Node | None = None

    @property
    def fused(self) -> bool:
        return self.softmax is self.out

    @property
    def key_axis(self) -> int:
        """The dimension of `k` that counts tokens."""
        return len(shape_of(self.k)) - (1 if self.transposed_k else 2)


_MATMULS: dict[Any, tuple[int, int]] = {aten.matmul.default: (0, 1), aten.bmm.default: (0, 1), aten.mm.default: (0, 1),
            aten.baddbmm.default: (1, 2)}
_SOFTMAXES = {aten.softmax.int, aten._softmax.default}
_ADDS = {aten.add.Tensor}
_KEEP_TOKENS = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.dropout.default}
"""Ops besides elementwise ones that may stand between the products and the softmax."""
_SEARCH = 64
"""How many nodes to look at for what belongs to one attention; a block of a known family needs under 30."""


def find_anchors(graph: fx.Graph) -> list[Anchor]:
    """All attentions in the order in which they run."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[Anchor] = []
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            anchor: Anchor | None = _fused(node, len(found))
        elif node.target in _SOFTMAXES:
            anchor = _unfused(node, len(found))
        else:
            continue
        if anchor is not None:
            found.append(_with_residual(anchor, order))
    return found


class CausalMasks:
    """Tells whether an attention is causal: by its own flag, by a constant mask in which no query sees a later key, or by a mask
    that compares the positions of queries and keys, which come from one value."""

    def __init__(self, program: ExportedProgram) -> None:
        self.constants = {k: v for k, v in parameters_of(program).items() if v.ndim >= 2}
        self.known: dict[fx.Node, bool] = {}

    def __call__(self, anchor: Anchor) -> bool:
        if anchor.causal:
            return True
        start = anchor.mask if anchor.fused else anchor.softmax
        if start is None:
            return False
        if start not in self.known:
            self.known[start] = self._masked(start, (shape_of(anchor.q)[-2], shape_of(anchor.k)[anchor.key_axis]))
        return self.known[start]

    def _masked(self, start: fx.Node, size: tuple[int, int]) -> bool:
        queue, seen = [start], {start}
        while queue and len(seen) < _SEARCH:
            node = queue.pop(0)
            if node.op == "placeholder":
                mask = self.constants.get(node.name)
                if mask is not None and mask.shape[-2:] == size and size[0] > 1 and _causal(mask):
                    return True
                continue
            if node.target in _MATMULS:
                continue
            if node.target in _COMPARES and shape_of(node)[-2:] == size and _compares_positions(node):
                return True
            for parent in node.all_input_nodes:
                if parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        return False


_COMPARES = {aten.ge.Tensor, aten.gt.Tensor, aten.le.Tensor, aten.lt.Tensor}


def _compares_positions(node: fx.Node) -> bool:
    """Whether rows and columns that are compared are whole numbers, and come from one value."""
    if len(node.all_input_nodes) != 2:
        return False
    sides = sorted(node.all_input_nodes, key=lambda n: shape_of(n)[-1])
    if shape_of(sides[0])[-1] != 1 or shape_of(sides[1])[-2:-1] != (1,):
        return False
    if any(n.meta["val"].is_floating_point() for n in sides):
        return False
    first, second = ({side, *_few_ancestors(side)} for side in sides)
    return bool(first & second)


def _few_ancestors(node: fx.Node, most: int = 8) -> Iterator[fx.Node]:
    """The nearest ancestors of a node, breadth first."""
    queue, seen = [node], {node}
    while queue and len(seen) <= most:
        for parent in queue.pop(0).all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
                yield parent


def _causal(mask: Tensor) -> bool:
    """Whether every key after its query is hidden (False, or very negative), and some key before is not."""
    hidden = ~mask if mask.dtype == torch.bool else mask < -1e4 if mask.is_floating_point() else mask == 0
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1 + mask.shape[-1] - mask.shape[-2])
    return bool(hidden[..., later].all()) and not bool(hidden[..., ~later].all())


def elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _fused(node: fx.Node, index: int) -> Anchor:
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)) | dict(node.kwargs)
    q, k, mask = given["query"], given["key"], given.get("attn_mask")
    scale = given.get("scale")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    return Anchor(index, q, k, node, node, shape_of(q)[-1] ** -0.5 if scale is None else float(scale),  # type: ignore[arg-type]
                  mask=mask if isinstance(mask, fx.Node) else None, causal=bool(given.get("is_causal", False)))


def _unfused(softmax: fx.Node, index: int) -> Anchor | None:
    """A softmax over the last dimension, between two matrix products."""
    if softmax.args[1] not in (-1, len(shape_of(softmax)) - 1):
        return None
    product = _first(softmax, lambda node: node.all_input_nodes)
    out = _first(softmax, lambda node: list(node.users))
    if product is None or out is None:
        return None
    q, k = (product.args[i] for i in _MATMULS[product.target])
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    return Anchor(index, q, k, softmax, out, transposed_k=True)


def _first(softmax: fx.Node, neighbours: Callable[[fx.Node], list[fx.Node]]) -> fx.Node | None:
    """The nearest matrix product in one direction, past elementwise ops, masks and reshapes."""
    queue: list[fx.Node] = list(neighbours(softmax))
    seen: set[fx.Node] = set()
    while queue and len(seen) < _SEARCH:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.target in _MATMULS:
            return node
        if node.op == "call_function" and (elementwise(node) or node.target in _KEEP_TOKENS or _moves_heads(node)):
            queue += neighbours(node)
    return None


def _moves_heads(node: fx.Node) -> bool:
    """Whether a permute leaves the rows and columns of an attention map where they are."""
    rank = len(shape_of(node))
    return node.target is aten.permute.default and [d % rank for d in node.args[1]][-2:] == [rank - 2, rank - 1]  # type: ignore[union-attr, operator, misc]


def _with_residual(anchor: Anchor, order: dict[fx.Node, int]) -> Anchor:
    """Find the addition that joins the attention's output with the stream it was computed from."""
    above = set(_ancestors(anchor.q, order))
    derived, heap = {anchor.out}, [(order[anchor.out], anchor.out)]
    for _ in range(_SEARCH):
        if not heap:
            break
        _, node = heapq.heappop(heap)
        for user in node.users:
            if user.target in _ADDS and len(user.all_input_nodes) == 2:
                other = next(n for n in user.all_input_nodes if n is not node)
                if other in above and shape_of(other) == shape_of(user):
                    return replace(anchor, residual=other, joined=user)
            if user not in derived and user.op == "call_function":
                derived.add(user)
                heapq.heappush(heap, (order[user], user))
    return anchor


def _ancestors(node: fx.Node, order: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """Computed ancestors of a node, nearest in graph order first."""
    heap, seen = [(-order[node], node)], {node}
    for _ in range(_SEARCH):
        if not heap:
            return
        _, current = heapq.heappop(heap)
        yield current
        for parent in current.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                heapq.heappush(heap, (-order[parent], parent))
