"""Where each node of an ONNX graph comes from: the node of the program, the pass that made it, the line of the model."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import fx
from torch.export import ExportedProgram

from edgewise.passes.graph import MADE_BY, source_line
from edgewise.targets.base import layer_of

# What torch's exporter notes at each node that it makes.
_NODE = "pkg.torch.onnx.fx_node"
SELECTS = ("insert-compression", "legalise:")
MOVES_TOKENS = ("legalise:merge", "legalise:take")


@dataclass(frozen=True)
class Origin:
    """`node` and `op`: of the program; `made_by`: the pass of ours, or None for the model itself; `line`: of the model's source;
    `onnx`: the op that it became."""

    node: str
    op: str
    made_by: str | None = None
    line: str = ""
    onnx: str = ""

    @property
    def ours(self) -> bool:
        """Whether compression made it."""
        return self.made_by is not None

    @property
    def decides(self) -> bool:
        """Whether it belongs to a choice between tokens, or to the scores that this is made by."""
        made_by = self.made_by or ""
        return made_by.startswith(SELECTS) and not made_by.startswith(MOVES_TOKENS)

    @property
    def name(self) -> str:
        """A name for what comes from here, which says the pass."""
        return f"{self.made_by or 'model'}/{self.node}"

    def __str__(self) -> str:
        who = f", made by {self.made_by}" if self.made_by else ""
        return f"node {self.node} ({self.op}){who}" + (f" at {self.line}" if self.line else "")


class Origins:
    """The origins of a model's nodes. Nodes that are made later share the notes of those that they stand by."""

    def __init__(self, exported: ExportedProgram) -> None:
        self._nodes: dict[str, fx.Node] = {node.name: node for node in exported.graph.nodes}

    def of(self, node: ir.Node) -> Origin | None:
        """The origin of a node, or None if it has none: a node for an input or output."""
        noted = node.metadata_props.get(_NODE, "")
        name = noted.partition(" ")[0].removeprefix("%")
        if not name:
            return None
        known = self._nodes.get(name)
        if known is None:
            return Origin(name, node.op_type, onnx=node.op_type)
        return Origin(name, str(known.target), known.meta.get(MADE_BY), source_line(known), node.op_type)

    def rename(self, model: ir.Model) -> dict[str, Origin]:
        """Name every node after its origin, but those of layers, which have their names; gives the origins by name."""
        found: dict[str, Origin] = {}
        for number, node in enumerate(model.graph.all_nodes()):
            origin = self.of(node)
            base = origin.name if origin is not None else f"model/{node.op_type}"
            if layer_of(node.name or "") is not None:
                base = node.name or ""
            name, count = base, 1
            while name in found:
                count += 1
                name = f"{base}.{count}"
            node.name = name
            found[name] = origin or Origin(f"{node.op_type} {number}", node.op_type, onnx=node.op_type)
        return found
