"""Lint: what no target can run with static shapes, found in a graph before it is lowered."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from edgewise.passes.graph import MADE_BY, describe

_COUNTED = {"nonzero", "nonzero_numpy", "argwhere", "masked_select", "masked_scatter", "unique", "unique_consecutive", "unique_dim",
            "_unique2", "bincount", "item", "_local_scalar_dense"}
"""Ops whose result has as many entries as the data say, or that need them at hand."""
_REDUCING = {"scatter_reduce", "index_reduce"}
"""Scatter with a reduction: not in ONNX for every reduction, refused by accelerators, slow where it runs."""
_REPEATING = {torch.ops.aten.repeat_interleave.Tensor, torch.ops.aten.repeat_interleave.self_Tensor}
_INDEXING = {"index", "index_put", "_unsafe_index", "_unsafe_index_put", "index_copy", "index_fill"}


def data_dependent(program: ExportedProgram, ours: bool = False) -> list[str]:
    """One line for each node of a program whose shape depends on data, or whose op makes it do so. An empty list: none does.

    `ours`: only of the nodes that a pass of ours made."""
    nodes = [node for node in program.graph.nodes if not ours or MADE_BY in node.meta]
    return [f"{describe(node)}: {reason}" for node in nodes if (reason := _reason(node)) is not None]


def _reason(node: fx.Node) -> str | None:
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1].rstrip("_")
        if name in _COUNTED:
            return "the data say how many entries it has"
        if name in _REDUCING:
            return "it scatters with a reduction"
        if node.target in _REPEATING:
            return "the data say how often it repeats"
        if name in _INDEXING and any(_is_tensor(n, torch.bool) for n in tree_leaves((node.args[1:], node.kwargs))):
            return "it is indexed by a mask, and the data say how many entries that picks"
    if any(_unbacked(value) for value in tree_leaves(node.meta.get("val"))):
        return "its shape depends on data"
    return None


def _is_tensor(node: Any, dtype: torch.dtype | None = None) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and (dtype is None or value.dtype == dtype)


def _unbacked(value: Any) -> bool:
    return isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) and bool(free_unbacked_symbols(value))
