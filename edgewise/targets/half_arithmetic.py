"""What half-precision arithmetic cannot do, and which nodes of a program are not for it. Imports torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.passes.graph import MADE_BY, shape_of

COUNTED = 2048
"""Half precision holds all whole numbers up to this, and not those beyond."""
_MOST = 65504.0
_AS_INFINITE = 1e38
"""Finite numbers beyond this become infinities of half precision, and zero times infinity is not a number."""


def wide(exported: ExportedProgram, not_of: str | None = None) -> set[Node]:
    """Nodes of compression ops, which compute with the numbers of tokens, where there are more than halves can tell apart: these
    are for single precision. `not_of`: the mark of nodes that another pass made."""
    ours = {node for node in exported.graph.nodes if node.meta.get(MADE_BY, not_of) != not_of}
    found: set[Node] = set()
    pending = [node for node in ours if any(size > COUNTED for one in (node, *node.all_input_nodes) for size in shape_of(one))]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            # Numbers that go in or come out may be few, and are as large.
            pending += [one for one in (*node.all_input_nodes, *node.users) if one in ours]
    return found


def within_half(value: Any) -> Any:
    """A number or a tensor, its largest finite numbers (which mask something, or bound a range) as large as halves can be."""
    if isinstance(value, float) and _AS_INFINITE <= abs(value) < math.inf:
        return math.copysign(_MOST, value)
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        large = (value.abs() >= _AS_INFINITE) & value.isfinite()
        if bool(large.any()):
            return torch.where(large, value.sign() * _MOST, value).detach()
    return value
