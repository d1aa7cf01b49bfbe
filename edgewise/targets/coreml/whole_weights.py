"""Keep weights that a model holds in whole numbers of eight bits in whole numbers.

Tools that quantise a model in torch (torchao, say) leave `integers.to(float)`, times a scale, in its graph. coremltools computes
that when it converts, and writes dense weights: the package is right, and as large as if nothing had been quantised. Imports
torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (it registers the ops)
from torch.export.graph_signature import InputKind
from torch.fx import Node

from edgewise.passes.graph import MADE_BY, Editor, parameters_of

aten = torch.ops.aten

_CASTS = {aten._to_copy.default, aten.to.dtype}
_VIEWS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.detach.default, aten.alias.default}
_BOUNDS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
_CONSTANT = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def keep_whole(editor: Editor, made_by: str) -> None:
    """Let every cast of a constant of whole numbers to floating point, and the scale for each row that it is multiplied by, be an
    op that coremltools reads as compressed weights. The numbers stay the same."""
    values = parameters_of(editor.original)
    constants = {spec.arg.name: spec.target for spec in editor.input_specs if spec.kind in _CONSTANT}
    for cast in list(editor.graph.nodes):
        if cast.target not in _CASTS or cast.meta["val"].dtype != torch.float32:
            continue
        views = []
        weight = cast.args[0]
        while weight.target in _VIEWS:
            views.append(weight)
            weight = weight.args[0]
        if weight.name not in constants or weight.meta["val"].dtype not in _BOUNDS or weight.meta["val"].ndim < 2:
            continue
        with editor.graph.inserting_before(cast):
            product = None if views else _scaled(cast, constants)
            if product is None:
                new, old = _call(editor, *_of_one_scale(weight)), cast
            else:
                scale, axis = next(one for one in product.all_input_nodes if one is not cast), _axis(cast, product)
                known = values[scale.name].detach().reshape(-1)
                scales = editor.add_constant(known, f"{weight.name}_scale")
                zeros = editor.add_constant(torch.zeros(len(known), dtype=weight.meta["val"].dtype), f"{weight.name}_zero")
                new, old = _call(editor, *_of_scales(weight, scales, zeros, axis)), product
            new.meta[MADE_BY] = made_by
            for view in reversed(views):
                new = _call(editor, view.target, (new, *view.args[1:]), view.kwargs)
        old.replace_all_uses_with(new)
        editor.graph.erase_node(old)
        if old is not cast:
            editor.graph.erase_node(cast)


def _of_one_scale(weight: Node) -> tuple[Any, tuple[Any, ...]]:
    dtype = weight.meta["val"].dtype
    return torch.ops.quantized_decomposed.dequantize_per_tensor.default, (weight, 1.0, 0, *_BOUNDS[dtype], dtype)


def _of_scales(weight: Node, scales: Node, zeros: Node, axis: int) -> tuple[Any, tuple[Any, ...]]:
    dtype = weight.meta["val"].dtype
    op = torch.ops.quantized_decomposed.dequantize_per_channel.default
    return op, (weight, scales, zeros, axis, *_BOUNDS[dtype], dtype)


def _scaled(cast: Node, constants: dict[str, Any]) -> Node | None:
    """The product of a cast, and of it alone, with a constant that has one number for each place along an axis."""
    (user, *others) = cast.users
    if others or user.target is not aten.mul.Tensor or user.meta["val"].shape != cast.meta["val"].shape:
        return None
    rest = [one for one in user.all_input_nodes if one is not cast]
    return user if len(rest) == 1 and rest[0].name in constants and _axis(cast, user) is not None else None


def _axis(cast: Node, product: Node) -> Any:
    """The axis along which the other factor of a product differs; None: there is not exactly one."""
    (scale,) = (one.meta["val"] for one in product.all_input_nodes if one is not cast)
    shape = cast.meta["val"].shape
    full = (1,) * (len(shape) - scale.ndim) + tuple(scale.shape)
    axes = [axis for axis, size in enumerate(full) if size > 1]
    if scale.dtype != torch.float32 or len(axes) != 1 or full[axes[0]] != shape[axes[0]]:
        return None
    return axes[0]


def _call(editor: Editor, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    node = editor.graph.call_function(target, args, kwargs or {})
    with editor.fake_mode:
        values = torch.fx.node.map_arg(args, lambda one: one.meta["val"])
        node.meta["val"] = target(*values, **(kwargs or {}))
    return node
