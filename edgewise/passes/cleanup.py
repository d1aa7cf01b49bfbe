"""Clean-up: what capture leaves in a graph that no device should run."""
from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from edgewise.passes.graph import Editor, parameters_of
from edgewise.passes.infra import Pass, PassResult
from edgewise.passes.trace import trace

aten = torch.ops.aten

MAX_FOLDED_ELEMENTS = 1 << 24
"""A folded constant stays in the artifact: an uncommonly large one is left to be computed on the device."""


class Functionalise(Pass):
    """Replace in-place ops, where there are any, so that every later pass may reorder and copy freely."""

    name = "functionalise"

    def call(self, program: ExportedProgram) -> PassResult:
        if not any(_is_mutable(n) for n in program.graph.nodes):
            return PassResult(program, False)
        return PassResult(program.run_decompositions({}), True)

    def ensures(self, program: ExportedProgram) -> None:
        assert not any(_is_mutable(n) for n in program.graph.nodes), "an in-place op is left"


class CleanUp(Pass):
    """Remove what has no effect, fold what is constant, and write each thing in one way."""

    name = "clean-up"

    def requires(self, program: ExportedProgram) -> None:
        assert not any(_is_mutable(n) for n in program.graph.nodes), "functionalise first: an in-place op moves values"

    def call(self, program: ExportedProgram) -> PassResult:
        editor = Editor(program)
        modified = [step(editor) for step in _STEPS]
        return PassResult(editor.finish() if any(modified) else program, any(modified))


def clean_up(program: ExportedProgram) -> ExportedProgram:
    """A captured program as analyses and targets want it."""
    return CleanUp()(Functionalise()(program).program).program


def _use_one_name(editor: Editor) -> bool:
    """Write ops that have several names under the one that every analysis and target knows."""
    renamed = [n for n in editor.graph.nodes if n.target in _NAMES]
    for node in renamed:
        node.target = _NAMES[node.target]
    return bool(renamed)


_NAMES = {
    aten.concat.default: aten.cat.default, aten.concatenate.default: aten.cat.default,
    aten.multiply.Tensor: aten.mul.Tensor, aten.multiply.Scalar: aten.mul.Scalar,
    aten.divide.Tensor: aten.div.Tensor, aten.divide.Scalar: aten.div.Scalar, aten.divide.Tensor_mode: aten.div.Tensor_mode,
    aten.divide.Scalar_mode: aten.div.Scalar_mode, aten.true_divide.Tensor: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Scalar, aten.subtract.Tensor: aten.sub.Tensor, aten.subtract.Scalar: aten.sub.Scalar,
    aten.absolute.default: aten.abs.default, aten.negative.default: aten.neg.default, aten.clip.default: aten.clamp.default,
    aten.clip.Tensor: aten.clamp.Tensor, aten.greater.Tensor: aten.gt.Tensor, aten.greater.Scalar: aten.gt.Scalar,
    aten.less.Tensor: aten.lt.Tensor, aten.less.Scalar: aten.lt.Scalar, aten.greater_equal.Tensor: aten.ge.Tensor,
    aten.greater_equal.Scalar: aten.ge.Scalar, aten.less_equal.Tensor: aten.le.Tensor, aten.less_equal.Scalar: aten.le.Scalar,
    aten.not_equal.Tensor: aten.ne.Tensor, aten.not_equal.Scalar: aten.ne.Scalar,
    aten.swapdims.default: aten.transpose.int, aten.swapaxes.default: aten.transpose.int, aten.moveaxis.int: aten.movedim.int,
    aten.moveaxis.intlist: aten.movedim.intlist, aten.special_expit.default: aten.sigmoid.default,
    aten.special_softmax.default: aten.softmax.int,
}
"""Ops that only call another one, with the same arguments."""


def _decompose_einsum(editor: Editor) -> bool:
    """Spell einsum out as permutes and one batched product, which every analysis and target knows."""
    found = [n for n in editor.graph.nodes if n.target is aten.einsum.default]
    for node in found:
        equation, operands = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        values = [n.meta["val"] for n in operands]  # type: ignore[union-attr]
        product = as_matmul(equation, [tuple(v.shape) for v in values])
        traced = (trace(product, values, editor.fake_mode) if product is not None else
                  trace(lambda *x, eq=equation: aten.einsum.default(eq, list(x)), values, editor.fake_mode, composite=False))
        with editor.graph.inserting_before(node):
            node.replace_all_uses_with(editor.inline(traced, operands, CleanUp.name, node))  # type: ignore[arg-type]
        editor.graph.erase_node(node)
    return bool(found)


def as_matmul(equation: str, shapes: Sequence[tuple[int, ...]]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """An einsum of two operands as one matmul with its batch dimensions apart, as attention is written.

    torch's own decomposition folds them into one dimension, which hides what is batch and what is head. None where the
    equation is no plain product with one free dimension each and one that is summed over.

    >>> product = as_matmul("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)])
    >>> tuple(product(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 6, 5)).shape)
    (2, 3, 4, 6)
    """
    match = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation.replace(" ", ""))
    if match is None or len(shapes) != 2:
        return None
    left, right, out = match.groups()
    sizes = [dict(zip(labels, shape, strict=True)) for labels, shape in zip((left, right), shapes, strict=True)]
    batch = [label for label in out if label in left and label in right]
    inner = [label for label in left if label in right and label not in out]
    rows, columns = ([label for label in own if label in out and label not in other]
                     for own, other in ((left, right), (right, left)))
    plain = all(len(set(labels)) == len(labels) for labels in (left, right, out))
    if not (plain and len(inner) == len(rows) == len(columns) == 1) or {*batch, *inner, *rows} != set(left) \
            or {*batch, *inner, *columns} != set(right) or any(sizes[0][n] != sizes[1][n] for n in batch + inner):
        return None

    def permute(x: Tensor, labels: str | list[str], wanted: str | list[str]) -> Tensor:
        order = [list(labels).index(label) for label in wanted]
        return x if order == sorted(order) else x.permute(order)

    def product(a: Tensor, b: Tensor) -> Tensor:
        a, b = permute(a, left, batch + rows + inner), permute(b, right, batch + inner + columns)
        return permute(a @ b, batch + rows + columns, out)

    return product


def _drop_no_ops(editor: Editor) -> bool:
    """Remove asserts, inactive dropout, aliases, copies, and casts to the type that a value already has."""
    modified = False
    for node in list(editor.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS:
            editor.graph.erase_node(node)
        elif (source := _same_value(node)) is not None:
            node.replace_all_uses_with(source)
            editor.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # Later passes change layouts in front of a view; reshape has the same meaning and always succeeds.
            node.target = aten.reshape.default
        elif not _squeeze_ones(node):
            continue
        modified = True
    return modified


def _squeeze_ones(node: fx.Node) -> bool:
    """Squeeze only what is of size one, and say whether that was news: torch leaves the rest alone, and ONNX
    and Core AI refuse it."""
    if node.target not in (aten.squeeze.default, aten.squeeze.dims):
        return False
    source = cast(fx.Node, node.args[0])
    shape = source.meta["val"].shape
    dims = range(len(shape)) if node.target is aten.squeeze.default else cast("list[int]", node.args[1])
    ones = [dim for dim in dims if shape[dim] == 1]
    node.target, node.args = aten.squeeze.dims, (source, ones)
    return len(ones) < len(dims)


def _join_parted(editor: Editor) -> bool:
    """Remove what takes a value apart along a dimension and stacks it again: samples that a model has in a list for a while."""
    modified = False
    for node in list(editor.graph.nodes):
        if node.target is not aten.stack.default:
            continue
        parts: Any = node.args[0]
        whole = parts[0].args[0] if parts[0].target is operator.getitem else None
        if not isinstance(whole, fx.Node) or whole.target is not aten.unbind.int:
            continue
        same = [part.target is operator.getitem and part.args == (whole, i) for i, part in enumerate(parts)]
        source, rank = whole.args[0], node.meta["val"].ndim
        if all(same) and len(same) == len(whole.meta["val"]) and _dim(whole) % rank == _dim(node) % rank:
            node.replace_all_uses_with(source)  # type: ignore[arg-type]
            editor.graph.erase_node(node)
            modified = True
    return modified


def _dim(node: fx.Node) -> int:
    """The dimension of an `unbind` or a `stack`."""
    found: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(found)


_ASSERTS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default,
            aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}
_COPIES = {aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default,
           aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
           aten._to_copy.default, aten.type_as.default, aten.expand.default, aten.reshape.default, aten.view.default,
           aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, *_DROPOUTS}


def _same_value(node: fx.Node) -> fx.Node | None:
    """The operand that a node only repeats."""
    source = node.args[0] if node.args else None
    if node.target not in _COPIES or not isinstance(source, fx.Node):
        return None
    if node.target in _DROPOUTS and node.args[1] and node.args[2]:
        return None  # dropout in training mode
    before, after = source.meta.get("val"), node.meta.get("val")
    same = (isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape
            and before.dtype == after.dtype)
    return source if same else None


def _fold_constants(editor: Editor) -> bool:
    """Compute what depends on no input: masks and positions made of `arange`, position embeddings that are interpolated to
    the image's size, normalised weights. Weights that are only laid out in another way stay as they are."""
    values: dict[fx.Node, Any] = {}
    computed: dict[fx.Node, None] = {}  # in graph order, so that constants are named alike every time
    weights = parameters_of(editor.original)
    written = set(editor.original.graph_signature.buffers_to_mutate.values())
    for spec in editor.input_specs:
        if spec.target in written:  # what a cache holds at first is not what it holds
            weights.pop(spec.arg.name)
    for node in editor.graph.nodes:
        if node.op == "placeholder" and node.name in weights:
            values[node] = weights[node.name].detach()
        elif node.op == "call_function" and _foldable(node, values):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            if node.target not in _LAYOUTS or any(n in computed for n in node.all_input_nodes):
                computed[node] = None
    modified = False
    for node in computed:
        value = values[node]
        if isinstance(value, Tensor) and any(user not in computed for user in node.users):
            constant = editor.add_constant(value.clone().contiguous(), node.name)
            constant.meta.update({k: v for k, v in node.meta.items() if k == "stack_trace"})
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in computed)
            modified = True
    return modified


_LAYOUTS = {aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.t.default,
            aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.split_with_sizes.default,
            aten.split.Tensor, aten.chunk.default, aten.unbind.int, aten.expand.default, aten.unflatten.int,
            aten.flatten.using_ints, operator.getitem}


def _foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    value = node.meta.get("val")
    if (isinstance(value, Tensor) and value.numel() > MAX_FOLDED_ELEMENTS) or _random(node) or _dequantises(node):
        return False
    return all(operand in values for operand in node.all_input_nodes)


def _dequantises(node: fx.Node) -> bool:
    """Whether a node makes floating-point numbers of whole ones of eight bits, as a model that was quantised in torch does with its
    weights: folded, they would take four times the room."""
    if str(node.target).startswith("quantized_decomposed.dequantize"):
        return True
    before, after = (one.meta.get("val") if isinstance(one, fx.Node) else None for one in (*node.args[:1], node))
    return (node.target in (aten._to_copy.default, aten.to.dtype) and isinstance(before, Tensor) and isinstance(after, Tensor)
            and before.dtype in (torch.int8, torch.uint8) and after.is_floating_point() and after.ndim > 1)


def _drop_dead_masks(editor: Editor) -> bool:
    """Remove attention masks that mask nothing: all true, or all zero."""
    modified = False
    for node in editor.graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default or len(node.args) < 4:
            continue
        mask = node.args[3]
        while isinstance(mask, fx.Node) and mask.target is aten.expand.default:  # one that was too large to fold for all samples
            mask = mask.args[0]
        value = editor.constants.get(mask.name) if isinstance(mask, fx.Node) else None
        if value is not None and bool(value.all() if value.dtype == torch.bool else (value == 0).all()):
            node.args = (*node.args[:3], None, *node.args[4:])
            modified = True
    return modified


def _share_common(editor: Editor) -> bool:
    """Compute once what is computed twice from the same values (a slice taken for the attention and for its residual)."""
    seen: dict[Any, fx.Node] = {}
    modified = False
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or _random(node):
            continue
        leaves, spec = tree_flatten((node.args, node.kwargs))
        # The type is part of the key because 1, 1.0 and True are equal to Python and not to an op.
        key = (node.target, spec, tuple((type(leaf), leaf) for leaf in leaves))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            editor.graph.erase_node(node)
            modified = True
        else:
            seen[key] = node
    return modified


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


_STEPS: tuple[Callable[[Editor], bool], ...] = (
    Editor.drop_constant_inputs,
    _use_one_name,
    _decompose_einsum,  # first: what it is spelled out as needs the same cleaning as all else
    _join_parted,
    _drop_no_ops,  # before folding, so that asserts do not hold constants alive
    _fold_constants,
    _drop_dead_masks,  # a mask is known to be dead only when it is folded
    _share_common,
)
