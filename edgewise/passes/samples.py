"""Samples of a batch: proof that they stay apart and keep their order, because every sample keeps tokens of its own.

Nothing of this matters with one sample. With several, an op that brings together the i-th tokens of two samples has no
meaning after compression, and heads that run ahead of the samples would be taken for samples.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import sympy
from torch import fx

from edgewise.passes.anchors import Anchor
from edgewise.passes.graph import describe, shape_of
from edgewise.passes.symbolic import Abstract, Engine
from edgewise.passes.token_axis import Cut, Propagation, Propagator
from edgewise.passes.token_rules import symbolic_axes


class Samples:
    """The batch axis of a stream, followed beside its token axis (`tokens`).

    `refusals` are the nodes where samples meet although tokens are still there, or where their axis is lost.
    """

    def __init__(self, engine: Engine, root: fx.Node, axis: int, nodes: Sequence[fx.Node], tokens: Propagation) -> None:
        self.refusals: dict[fx.Node, str] = {}
        self.values: dict[fx.Node, Any] | None = None
        self.disordered: set[fx.Node] = set()
        shape = shape_of(root)
        if len(shape) > 3 and prod(shape[:-1]) != shape[axis]:
            self.refusals[root] = f"the residual stream has {len(shape)} dimensions: tokens and features, and maybe samples, are known"
        batch_axis = 1 if axis == 0 else 0
        if len(shape) != 3 or shape[batch_axis] == 1:
            return
        self.symbol = engine.symbol(f"{root.name}_samples", shape[batch_axis])
        result = Propagator(engine, [Cut(root, batch_axis, self.symbol, 1)], shape[batch_axis]).run(nodes)
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
            if any(n in self.disordered for n in sources) or any(self._runs_ahead(n, node, value) for n in sources):
                self.disordered.add(node)
            if symbolic_axes(counted) and not symbolic_axes(value) and any(symbolic_axes(self.values[n]) for n in sources):
                self.refusals[node] = "it brings together the tokens of several samples, which keep different ones"

    def refuse_anchor(self, anchor: Anchor, site: fx.Node, axis: int) -> str | None:
        """Why an attention's queries and keys, or its site, cannot be taken apart into samples; None if they can."""
        if self.values is None:
            return None
        for node, lead in ((anchor.q, 0), (anchor.k, 0), (site, 1 if axis == 0 else 0)):
            value = self.values.get(node)
            if value is None or not self._leads(value, lead) or (node is not site and node in self.disordered):
                return f"{describe(node)}: samples of the batch are not its leading dimension"
        return None

    def _leads(self, value: Any, axis: int) -> bool:
        return symbolic_axes(value) == [axis]

    def _runs_ahead(self, source: fx.Node, node: fx.Node, value: Abstract) -> bool:
        """Whether a reshape folds a dimension that is ahead of the samples into one with them."""
        assert self.values is not None
        before, after = self.values[source], shape_of(node)
        if not isinstance(before, Abstract):
            return False
        folded = [d for d in symbolic_axes(value) if not isinstance(value.shape[d], sympy.Symbol)]
        apart = [d for d in symbolic_axes(before) if isinstance(before.shape[d], sympy.Symbol)]
        if not folded or not apart:
            return False
        return prod(shape_of(source)[:apart[0]]) != prod(after[:folded[0]])
