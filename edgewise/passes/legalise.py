"""Legalisation: replace compression ops by the realisations that a target takes."""
from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from edgewise.passes import order_realisations as _order_realisations  # noqa: F401 (it registers them)
from edgewise.passes.graph import Editor
from edgewise.passes.greedy_realisations import LOOP
from edgewise.passes.infra import Pass, PassResult
from edgewise.passes.lint import data_dependent
from edgewise.passes.place_realisations import PLACES, joins, match_places, merge_places
from edgewise.passes.realisations import REALISATIONS
from edgewise.passes.trace import trace


def is_compression_op(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "edgewise"


def op_name(node: fx.Node) -> str:
    """The name of a compression op, without its namespace."""
    return str(node.target._schema.name.split("::")[1])  # type: ignore[union-attr]


class Legalise(Pass):
    """Replace every `edgewise::*` node by plain aten, choosing for each op the first realisation in `preferences` that
    exists (`{"merge": ("topk", "sort_free"), ...}`)."""

    name = "legalise"

    def __init__(self, preferences: Mapping[str, Sequence[str]]) -> None:
        chosen = {op: _choose(op, names) for op, names in preferences.items()}
        self.realised = {op: REALISATIONS[op][name] for op, name in chosen.items()}
        self.whole = {op for op, name in chosen.items() if name == LOOP}
        """Ops that may stay: the target makes loops of them."""
        self.by_place = all(chosen.get(op) == PLACES for op in ("bipartite_match", "merge"))

    def call(self, program: ExportedProgram) -> PassResult:
        if not any(is_compression_op(n) for n in program.graph.nodes):
            return PassResult(program, False)
        editor = Editor(program)
        joined = self._joined(editor.graph) if self.by_place else {}
        places: dict[fx.Node, fx.Node] = {}
        for node in list(editor.graph.nodes):
            if not is_compression_op(node):
                continue
            if node in joined:
                x, size, kept = node.args[:3]
                count = kept.meta["val"].shape[1]  # type: ignore[union-attr]
                self._replace(editor, node, merge_places, (x, size, places[joined[node]], count))
            elif node in joined.values():
                places[node] = self._replace(editor, node, match_places, node.args)[3]
            else:
                self._replace(editor, node, self.realised[op_name(node)], node.args)
        return PassResult(editor.finish(), True)

    def _joined(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        """The matching of each merge that takes nothing else."""
        found = {}
        for node in graph.nodes:
            if is_compression_op(node) and op_name(node) == "merge":
                kept = node.args[2]
                source = kept.args[0] if kept.target is operator.getitem else kept
                if is_compression_op(source) and op_name(source) == "bipartite_match" and joins(source, node):
                    found[node] = source
        return found

    def _replace(self, editor: Editor, node: fx.Node, function: Callable[..., Any], given: Sequence[Any]) -> Any:
        """Put what a function makes of `given` in the place of a node, and give its results."""
        op = op_name(node)
        operands = [a for a in given if isinstance(a, fx.Node)]
        where = [i for i, a in enumerate(given) if isinstance(a, fx.Node)]

        def call(*tensors: torch.Tensor) -> object:
            args = list(given)
            for i, tensor in zip(where, tensors, strict=False):
                args[i] = tensor
            return function(*args)

        traced = trace(call, [n.meta["val"] for n in operands], editor.fake_mode)
        with editor.graph.inserting_before(node):
            made = editor.inline(traced, operands, f"{self.name}:{op}", node)
        if isinstance(made, (tuple, list)):
            for user in list(node.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
                editor.graph.erase_node(user)
        else:
            node.replace_all_uses_with(made)
        editor.graph.erase_node(node)
        return made

    def ensures(self, program: ExportedProgram) -> None:
        left = [n.name for n in program.graph.nodes if is_compression_op(n) and op_name(n) not in self.whole]
        assert not left, f"compression ops are left: {left}"
        found = data_dependent(program, ours=True)
        assert not found, f"compression must have static shapes: {found}"


def _choose(op: str, names: Sequence[str]) -> str:
    for name in names:
        if name in REALISATIONS[op]:
            return name
    raise KeyError(f"Target developer: no realisation of {op} among {list(names)}")
