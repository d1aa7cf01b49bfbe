"""Rewrite a program into what coremltools' frontend reads, and reads right.

The frontend reads few forms of each op, and gets several wrong without a word: it drops the keywords `approximate` of
gelu and `alpha` of sums, adds 1e-4 to the divisor of a reciprocal, and sorts without heeding ties. Each rewriting here
says the same in ops that it reads as they are meant. What it still does not read is refused in `convert`. Imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._export.verifier import Verifier
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.passes.cleanup import CleanUp
from edgewise.passes.graph import MADE_BY, Editor
from edgewise.passes.realisations import descending_rank
from edgewise.passes.trace import trace
from edgewise.targets.rewrite import arguments, become, simplify

aten = torch.ops.aten

MADE_HERE = "coreml"
MOST_PARTS = 4
"""How often what an op was rewritten into is itself looked at."""


def legal(exported: ExportedProgram, reads: Callable[[Node], bool], half: bool = False) -> ExportedProgram:
    """A copy of the program, which shares its weights, in ops that coremltools reads. It must not write in place.

    `reads` says whether the frontend has a rule for a node's op. Ops without a rule are taken apart as torch does it;
    those that torch cannot take apart stay. `half`: the arithmetic will be in half precision.
    """
    editor = Editor(CleanUp()(exported).program)
    for _ in range(MOST_PARTS):
        simplify(editor.graph)
        for node in list(editor.graph.nodes):
            if node.target in RESHAPES:
                become(node, aten.reshape.default, (node.args[0], list(node.meta["val"].shape)))
            elif node.target in REWRITES:
                _rewrite(editor, node, REWRITES[node.target](*arguments(node)))
        unread = [node for node in editor.graph.nodes if node.op == "call_function" and not reads(node)]
        if not unread:
            break
        for node in unread:
            _decompose(editor, node)
    _positional(editor)
    return _in_their_dialect(editor.finish(), half)


Made = Callable[..., Any] | None
"""What computes the same from the tensors among an op's arguments, in their order; None: the node stays as it is."""


def _rewrite(editor: Editor, node: Node, make: Made) -> None:
    """Put the ops that `make` runs on a node's operands in the place of the node."""
    if make is None:
        return
    operands = node.all_input_nodes
    traced = trace(make, [n.meta["val"] for n in operands], editor.fake_mode)
    with editor.graph.inserting_before(node):
        new = editor.inline(traced, operands, node.meta.get(MADE_BY, MADE_HERE), node)
    if isinstance(new, (tuple, list)):
        for user in list(node.users):
            user.replace_all_uses_with(new[user.args[1]])  # type: ignore[index]
            editor.graph.erase_node(user)
    else:
        node.replace_all_uses_with(new)
    editor.graph.erase_node(node)


def _decompose(editor: Editor, node: Node) -> None:
    table = torch._decomp.core_aten_decompositions()
    if node.target not in table:
        return
    operands = node.all_input_nodes

    def parts(*tensors: Tensor) -> Any:
        values = dict(zip(operands, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return table[node.target](*args, **kwargs)  # type: ignore[index]

    _rewrite(editor, node, parts)


_MEMORY = {"device", "layout", "pin_memory", "memory_format", "generator", "non_blocking", "copy"}
"""Keywords that say where and how a value lies in memory, and not what it is."""


_WHOLE = {
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.cosine_similarity.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
}
"""Ops whose rules want all arguments, defaults as well."""


def _positional(editor: Editor) -> None:
    """Give by position what may be given so, and leave out keywords that have their defaults, or no meaning here."""
    for node in editor.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema.arguments
        values = dict(zip((one.name for one in schema), arguments(node), strict=True))
        plain = [one for one in schema if not one.kwarg_only]
        last = max((i + 1 for i, one in enumerate(plain) if one.name in node.kwargs), default=0)
        kwargs = {
            one.name: values[one.name]
            for one in schema
            if one.kwarg_only and one.name in node.kwargs and one.name not in _MEMORY
            if type(values[one.name]) is not type(one.default_value) or values[one.name] != one.default_value
        }
        if node.target in _WHOLE:
            last = len(plain)
            values["stride"] = values.get("stride") or values.get("kernel_size")
        node.args = tuple(values[one.name] for one in plain[: max(len(node.args), last)])
        node.kwargs = kwargs


def _in_their_dialect(exported: ExportedProgram, half: bool) -> ExportedProgram:
    """The same program under the name of the dialect without ops for training, which is what coremltools asks for."""
    state, constants = dict(exported.state_dict), dict(exported.constants)
    if half:
        for node in exported.graph.nodes:
            node.args = torch.fx.node.map_aggregate(node.args, _within_half)  # type: ignore[assignment]
        state = {name: _within_half(value) for name, value in state.items()}
        constants = {name: _within_half(value) for name, value in constants.items()}
    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=exported.graph_signature,
        state_dict=state,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=constants,
        verifiers=[Verifier],
    )


_AS_INFINITE = 1e38
"""coremltools makes half-precision infinities of finite numbers beyond this, and zero times infinity is not a number."""
_MOST_HALF = 65504.0


def _within_half(value: Any) -> Any:
    """A number or a tensor, its largest finite numbers (which mask something, or bound a range) as large as halves can be."""
    if isinstance(value, float) and _AS_INFINITE <= abs(value) < math.inf:
        return math.copysign(_MOST_HALF, value)
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        large = (value.abs() >= _AS_INFINITE) & value.isfinite()
        if bool(large.any()):
            return torch.where(large, value.sign() * _MOST_HALF, value).detach()
    return value


# The rewritings. Each takes an op's arguments, nodes for tensors and defaults filled in, and gives what computes the same.


def _gelu(value: Node, approximate: str) -> Made:
    if approximate == "none":
        return None
    # In the form that coremltools fuses into one op again, with the right mode.
    scale = math.sqrt(2 / math.pi)
    return lambda x: x * (((x + x.pow(3.0) * 0.044715) * scale).tanh() + 1.0).mul(0.5)


def _scaled(combine: Callable[[Any, Any], Any]) -> Callable[..., Made]:
    """Sums of which one part is multiplied by `alpha`."""

    def rewrite(value: Any, other: Any, alpha: float = 1) -> Made:
        if alpha == 1:
            return None
        if not isinstance(other, Node):
            return lambda x: combine(x, other * alpha)
        if other is value:
            return lambda x: combine(x, x * alpha)
        return lambda x, y: combine(x, y * alpha)

    return rewrite


def _subtract_from(value: Node, other: Any, alpha: float = 1) -> Made:
    if not isinstance(other, Node):
        return lambda x: (x * -alpha) + other
    return (lambda x: x - x * alpha) if other is value else (lambda x, y: y - x * alpha)


def _reciprocal(value: Node) -> Made:
    # Not 1 / x, which torch takes for a reciprocal again.
    return lambda x: torch.tensor(1.0) / x


def _rsqrt(value: Node) -> Made:
    return lambda x: torch.tensor(1.0) / x.sqrt()


def _rms_norm(value: Node, shape: list[int], weight: Node | None, epsilon: float | None) -> Made:
    axes = list(range(-len(shape), 0))
    epsilon = torch.finfo(value.meta["val"].dtype).eps if epsilon is None else epsilon

    def norm(x: Tensor, scale: Tensor | None = None) -> Tensor:
        normed = x / ((x * x).mean(axes, keepdim=True) + epsilon).sqrt()
        return normed if scale is None else normed * scale

    return norm


def _attention(
    query: Node,
    key: Node,
    value: Node,
    mask: Node | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Made:
    width = query.meta["val"].shape[-1]
    groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3] if grouped else 1
    usual = scale is None or math.isclose(scale, width**-0.5, rel_tol=1e-12)
    if groups == 1 and (scale is None or not usual):
        return None
    nodes = list(dict.fromkeys(n for n in (query, key, value, mask) if n is not None))

    def attention(*tensors: Tensor) -> Tensor:
        known = dict(zip(nodes, tensors, strict=True))
        q, k, v = known[query], known[key], known[value]
        if groups > 1:
            k, v = (_repeated(x, groups) for x in (k, v))
        return aten.scaled_dot_product_attention.default(
            q, k, v, None if mask is None else known[mask], dropout, causal, **({} if usual else {"scale": scale})
        )

    return attention


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Every head `groups` times, one after the other."""
    *batch, heads, tokens, width = x.shape
    wide = x.unsqueeze(-3).expand(*batch, heads, groups, tokens, width)
    return wide.reshape(*batch, heads * groups, tokens, width)


def _sort(value: Node, stable: bool | None, dim: int = -1, descending: bool = False) -> Made:
    if not stable:
        return None
    return lambda x: _stable_sort(x, dim, descending)


def _stable_sort(x: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Core ML leaves the order of equal values open, so that places are counted first, of which no two are equal."""
    last = x.ndim - 1
    moved = x.transpose(dim, last)
    flat = moved.reshape(-1, moved.shape[-1])
    if not flat.is_floating_point():
        flat = flat.to(torch.float32)
    place = descending_rank(flat if descending else -flat)
    order = place.topk(flat.shape[-1], dim=-1, largest=False, sorted=True)[1]
    values = moved.reshape(flat.shape).gather(1, order)
    return tuple(part.reshape(moved.shape).transpose(dim, last) for part in (values, order))  # type: ignore[return-value]


RESHAPES = {
    *(
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
    ),
    *(aten.flatten.using_ints, aten.unflatten.int),
}
"""Ops that give other dimensions to the same values in the same order, for the frontend to read as one."""


def _logical(on_truth: Any) -> Callable[..., Made]:
    """Bit by bit is one by one for truth values, the only ones that the frontend does it for."""

    def rewrite(value: Node, *other: Any) -> Made:
        if value.meta["val"].dtype != torch.bool or any(not isinstance(n, Node) for n in other):
            return None
        return lambda *x: on_truth(*(x if len(x) > len(other) else x * 2))

    return rewrite


def _along(value: Node, index: Node, dim: int | None) -> Made:
    def along(x: Tensor, i: Tensor) -> Tensor:
        if dim is None:
            return x.reshape(-1).gather(0, i.reshape(-1))
        at = dim % x.ndim
        sizes = [max(a, b) for a, b in zip(x.shape, i.shape, strict=True)]
        sizes_x, sizes_i = ([*sizes[:at], one.shape[at], *sizes[at + 1 :]] for one in (x, i))
        return x.expand(sizes_x).gather(at, i.expand(sizes_i))

    return along


def _in_another_type(op: Any) -> Callable[..., Made]:
    """Reductions whose keyword `dtype` says in which type they are done."""

    def rewrite(value: Node, *rest: Any) -> Made:
        *others, dtype = rest
        return None if dtype is None else lambda x: op(x.to(dtype), *others)

    return rewrite


REWRITES: dict[Any, Callable[..., Made]] = {
    aten.bitwise_and.Tensor: _logical(aten.logical_and.default),
    aten.bitwise_or.Tensor: _logical(aten.logical_or.default),
    aten.bitwise_xor.Tensor: _logical(aten.logical_xor.default),
    aten.bitwise_not.default: _logical(aten.logical_not.default),
    aten.gelu.default: _gelu,
    aten.add.Tensor: _scaled(lambda x, y: x + y),
    aten.add.Scalar: _scaled(lambda x, y: x + y),
    aten.sub.Tensor: _scaled(lambda x, y: x - y),
    aten.sub.Scalar: _scaled(lambda x, y: x - y),
    aten.rsub.Tensor: _subtract_from,
    aten.rsub.Scalar: _subtract_from,
    aten.reciprocal.default: _reciprocal,
    aten.rsqrt.default: _rsqrt,
    aten.scaled_dot_product_attention.default: _attention,
    aten.rms_norm.default: _rms_norm,
    aten.sort.stable: _sort,
    aten.take_along_dim.default: _along,
    **{
        op: _in_another_type(op)
        for op in (
            *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default),
            *(aten.prod.default, aten.prod.dim_int, aten.linalg_vector_norm.default),
        )
    },
}
