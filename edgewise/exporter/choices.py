"""What an artifact chose: the tokens that its compression kept, read out of it on the inputs that it is verified with.

In low precision two tokens whose scores are close may change places, and neither choice is wrong. The outputs are then those of
other tokens, and comparing them with torch's says nothing of the arithmetic. So the artifact is asked what it chose, and compared
with the program that chooses the same.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from edgewise.exporter.run import DECIDING, Choice
from edgewise.passes.graph import Editor, output_nodes
from edgewise.passes.legalise import Legalise, is_compression_op, op_name
from edgewise.targets import Target


class _Telling(Editor):
    """An editor that gives the program more outputs."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program)
        self.told: list[fx.Node] = []

    def tell(self, nodes: Sequence[fx.Node]) -> None:
        out = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        self.told = list(nodes)
        out.args = ((*output_nodes(self.graph), *nodes),)

    def _call_graph(self) -> list[ModuleCallEntry]:
        """The program then gives a flat tuple: frontends that call it unflatten what it gives."""
        root, *entries = super()._call_graph()
        root = copy(root)
        assert root.signature is not None
        root.signature = copy(root.signature)
        root.signature.out_spec = pytree.tree_structure(tuple(range(len(root.signature.outputs))))
        return [root, *entries]

    def _output_specs(self) -> list[OutputSpec]:
        known = list(self.original.graph_signature.output_specs)
        return known + [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in self.told]


def choices_of(
    exported: ExportedProgram,
    target: Target,
    legalise: Legalise,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
) -> list[dict[str, Choice]]:
    """What the artifact of a compressed program chooses on each of `feeds`: by the name of the op's node, its results.

    The program is lowered once more, with its choices as further outputs.
    """
    editor = _Telling(exported)
    where = [(node, part) for node in editor.graph.nodes if is_compression_op(node) and op_name(node) in DECIDING
             for part in _parts(node)]  # fmt: skip
    editor.tell([part for _, part in where])
    names = [_free(f"choice_{i}", {*input_names, *output_names}) for i in range(len(where))]
    told: list[dict[str, Choice]] = []
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        files = target.lower(
            legalise(editor.finish()).program,
            Path(folder),
            "choices",
            precision=precision,
            input_names=input_names,
            output_names=[*output_names, *names],
        )
        with target.rehearse(files) as session:
            for feed in feeds:
                found = session.run_anew(feed)
                chosen: dict[str, Choice] = {}
                for (node, part), name in zip(where, names, strict=True):
                    index = torch.from_numpy(found[name])
                    if part is node:
                        chosen[node.name] = index
                    else:
                        parts = chosen.setdefault(node.name, [None] * len(node.meta["val"]))
                        parts[int(part.args[1])] = index  # type: ignore[index, arg-type]
                told.append(chosen)
    return told


def _parts(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold the results of an op, as far as anything uses them."""
    if isinstance(node.meta["val"], (tuple, list)):
        return [user for user in node.users if user.target is operator.getitem and user.users]
    return [node]


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
