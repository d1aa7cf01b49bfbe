"""Samples of a batch: proof that they stay apart and keep their order, because every sample keeps tokens of its own.

Nothing of this matters with one sample. With several, an op that brings together the i-th tokens of two samples has no
meaning after compression, and heads that run ahead of the samples would be taken for samples.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from edgewise.passes.anchors import Anchor
from edgewise.passes.graph import describe, shape_of
from edgewise.passes.symbolic import Abstract, Engine, SampleCount
from edgewise.passes.token_axis import Cut, Propagation, Propagator, Route
from edgewise.passes.token_rules import symbolic_axes

aten = torch.ops.aten

PRODUCTS = {aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
_MIXED = "it brings together the tokens of several samples, which keep different ones"


class _Propagator(Propagator):
    """Values with an entry for each sample need no route: only tokens are chosen. They may meet the samples in a product too, as
    learned queries do that are repeated for each sample."""

    def _routable(self, node: fx.Node) -> bool:
        return node.target in PRODUCTS or super()._routable(node)

    def _may_route(self, node: fx.Node, place: int) -> bool:
        return node.target in PRODUCTS or super()._may_route(node, place)

    def _routes(self, *_: Any) -> dict[int, Route]:
        return {}


class Samples:
    """The batch axis of a stream, followed beside its token axis (`tokens`).

    `refusals` are the nodes where samples meet although tokens are still there, or where their axis is lost.
    """

    def __init__(self, engine: Engine, root: fx.Node, axis: int, nodes: Sequence[fx.Node], tokens: Propagation,
                 anchors: Sequence[Anchor]) -> None:
        self.refusals: dict[fx.Node, str] = {}
        self.values: dict[fx.Node, Any] | None = None
        self.reason: str | None = None
        shape = shape_of(root)
        if len(shape) > 3:
            self.reason = f"{describe(root)}: a stream of {len(shape)} dimensions, not samples, tokens, features"
        batch_axis = 1 if axis == 0 else 0
        if len(shape) != 3 or shape[batch_axis] == 1:
            return
        self.symbol = engine.symbol(f"{root.name}_samples", shape[batch_axis], SampleCount)
        result = _Propagator(engine, [Cut(root, batch_axis, self.symbol, 1)]).run(nodes)
        self.values = result.values
        for refusal in result.refusals:
            if any(symbolic_axes(tokens.values.get(n)) for n in refusal.node.all_input_nodes):
                self.refusals[refusal.node] = f"samples of the batch cannot be told apart here ({refusal.reason})"
        for node, value in self.values.items():
            if not isinstance(value, Abstract):
                continue
            counted = tokens.values.get(node)
            if node in tokens.routes and not self._leads(value, 1 if symbolic_axes(counted)[:1] == [0] else 0):
                self.refusals[node] = "samples of the batch are not its leading dimension"
            sources = [n for n in node.all_input_nodes if n in self.values]
            if any(self._runs_ahead(n, node, value, tokens) for n in sources):
                self.refusals[node] = "it folds the samples of the batch into what comes before them"
            lost = not symbolic_axes(value) and any(symbolic_axes(self.values[n]) for n in sources)
            if symbolic_axes(counted) and (lost or len(symbolic_axes(value)) > 1):
                self.refusals[node] = _MIXED
        for anchor in anchors:
            across = anchor.key_axis in symbolic_axes(self.values.get(anchor.k))
            if across and symbolic_axes(tokens.values.get(anchor.k)):
                self.refusals[anchor.softmax] = _MIXED

    def refuse_anchor(self, anchor: Anchor) -> str | None:
        """Why an attention's queries and keys cannot be taken apart into samples; None if they can."""
        if self.values is None:
            return self.reason
        for node in (anchor.q, anchor.k):
            value = self.values.get(node)
            if value is None or not self._leads(value, 0):
                return f"{describe(node)}: samples of the batch are not its leading dimension"
        return None

    def _leads(self, value: Any, axis: int) -> bool:
        return symbolic_axes(value) == [axis]

    def _runs_ahead(self, source: fx.Node, node: fx.Node, value: Abstract, tokens: Propagation) -> bool:
        """Whether a reshape folds what is ahead of the samples, and is not the tokens, into one dimension with them."""
        assert self.values is not None
        before = self.values[source]
        folded = [d for d in symbolic_axes(value) if not value.shape[d].is_Symbol]
        apart = [d for d in symbolic_axes(before) if before.shape[d].is_Symbol]
        if not folded or not apart:
            return False
        shape, counted = shape_of(source), symbolic_axes(tokens.values.get(source))
        others = prod(n for d, n in enumerate(shape[:apart[0]]) if d not in counted)
        return others != 1 and prod(shape[:apart[0]]) != prod(shape_of(node)[:folded[0]])
