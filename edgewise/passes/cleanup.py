"""Clean-up: what capture leaves in a graph that no device should run."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from edgewise.passes.graph import Editor, trace
from edgewise.passes.infra import Pass, PassResult, Sequential

aten = torch.ops.aten

# A folded constant stays in the artifact, so an uncommonly large one is left to be computed on the device.
MAX_FOLDED_ELEMENTS = 1 << 24


def is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class Functionalise(Pass):
    """Replace in-place ops, where there are any, so that every later pass may reorder and copy freely."""

    name = "functionalise"

    def call(self, program: ExportedProgram) -> PassResult:
        if not any(is_mutable(n) for n in program.graph.nodes):
            return PassResult(program, False)
        return PassResult(program.run_decompositions({}), True)

    def ensures(self, program: ExportedProgram) -> None:
        assert not any(is_mutable(n) for n in program.graph.nodes), "an in-place op is left"


class DropNoOps(Pass):
    """Remove asserts, inactive dropout, aliases, copies and casts to the type that a value already has."""

    name = "drop-no-ops"

    def call(self, program: ExportedProgram) -> PassResult:
        editor = Editor(program)
        modified = False
        for node in list(editor.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTS:
                editor.graph.erase_node(node)
                modified = True
            elif (source := _same_value(node)) is not None:
                node.replace_all_uses_with(source)
                editor.graph.erase_node(node)
                modified = True
            elif node.target in (aten.view.default, aten._unsafe_view.default):
                # Later passes change layouts in front of a view; reshape has the same meaning and always succeeds.
                node.target = aten.reshape.default
                modified = True
        return PassResult(editor.finish() if modified else program, modified)


_ASSERTS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default,
            aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
_COPIES = {aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default,
           aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
           aten._to_copy.default, aten.type_as.default, aten.dropout.default, aten.feature_dropout.default}


def _same_value(node: fx.Node) -> fx.Node | None:
    """The operand that a node only repeats."""
    if node.target in _COPIES:
        source = node.args[0]
        if node.target in (aten.dropout.default, aten.feature_dropout.default) and node.args[1] and node.args[2]:
            return None
    elif node.target is aten.expand.default or node.target is aten.reshape.default:
        source = node.args[0]
    else:
        return None
    if not isinstance(source, fx.Node):
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if isinstance(before, Tensor) and isinstance(after, Tensor) \
            and before.shape == after.shape and before.dtype == after.dtype:
        return source
    return None


class DecomposeEinsum(Pass):
    """Spell einsum out as permutes and one batched product, which every analysis and target knows."""

    name = "decompose-einsum"

    def call(self, program: ExportedProgram) -> PassResult:
        if not any(n.target is aten.einsum.default for n in program.graph.nodes):
            return PassResult(program, False)
        editor = Editor(program)
        for node in list(editor.graph.nodes):
            if node.target is aten.einsum.default:
                equation, operands = node.args[0], list(node.args[1])
                values = [n.meta["val"] for n in operands]
                traced = trace(lambda *x, eq=equation: aten.einsum.default(eq, list(x)), values, pre_dispatch=False)
                with editor.graph.inserting_before(node):
                    node.replace_all_uses_with(editor.inline(traced, operands, self.name, node))
                editor.graph.erase_node(node)
        return PassResult(editor.finish(), True)


class FoldConstants(Pass):
    """Compute what depends on neither inputs nor weights (masks and positions made of `arange`)."""

    name = "fold-constants"

    def call(self, program: ExportedProgram) -> PassResult:
        editor = Editor(program)
        values: dict[fx.Node, Any] = {}
        for node in editor.graph.nodes:
            if node.op == "call_function" and self._foldable(node, values):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
        modified = False
        for node, value in values.items():
            if isinstance(value, Tensor) and any(user not in values for user in node.users):
                constant = editor.add_constant(value.clone().contiguous(), node.name)
                constant.meta.update({k: v for k, v in node.meta.items() if k == "stack_trace"})
                node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
                modified = True
        return PassResult(editor.finish() if modified else program, modified)

    @staticmethod
    def _foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.numel() > MAX_FOLDED_ELEMENTS:
            return False
        if _random(node):
            return False
        return all(operand in values for operand in node.all_input_nodes)


class ShareCommon(Pass):
    """Compute once what is computed twice from the same values (a slice taken for the attention and for its residual)."""

    name = "share-common"

    def call(self, program: ExportedProgram) -> PassResult:
        editor = Editor(program)
        seen: dict[Any, fx.Node] = {}
        modified = False
        for node in list(editor.graph.nodes):
            if node.op != "call_function" or _random(node):
                continue
            leaves, spec = tree_flatten((node.args, node.kwargs))
            key = (node.target, spec, tuple((type(leaf), leaf) for leaf in leaves))
            if key in seen:
                node.replace_all_uses_with(seen[key])
                editor.graph.erase_node(node)
                modified = True
            else:
                seen[key] = node
        return PassResult(editor.finish() if modified else program, modified)


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


class DropDeadMasks(Pass):
    """Remove attention masks that mask nothing: all true, or all zero."""

    name = "drop-dead-masks"

    def call(self, program: ExportedProgram) -> PassResult:
        editor = Editor(program)
        modified = False
        for node in editor.graph.nodes:
            if node.target is not aten.scaled_dot_product_attention.default or len(node.args) < 4:
                continue
            mask = node.args[3]
            value = editor.constants.get(mask.name) if isinstance(mask, fx.Node) else None
            if value is not None and bool(value.all() if value.dtype == torch.bool else (value == 0).all()):
                node.args = (*node.args[:3], None, *node.args[4:])
                modified = True
        return PassResult(editor.finish() if modified else program, modified)


# Functional first: the others move values. No-ops go before folding, so that asserts do not hold constants alive;
# masks are known to be dead only when folded.
CLEANUP = Sequential([Functionalise(), DecomposeEinsum(), DropNoOps(), FoldConstants(), DropDeadMasks(), ShareCommon()])
