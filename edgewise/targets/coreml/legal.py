"""Rewrite a program into what coremltools' frontend reads, and reads right.

The frontend reads few forms of each op, and gets several wrong without a word: it drops the keywords `approximate` of
gelu and `alpha` of sums, adds 1e-4 to the divisor of a reciprocal, and sorts without heeding ties. Each rewriting here
says the same in ops that it reads as they are meant. What it still does not read is refused in `convert`. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._export.verifier import Verifier
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.passes.cleanup import CleanUp
from edgewise.passes.graph import MADE_BY, Editor
from edgewise.passes.trace import trace
from edgewise.targets.coreml.rewritings import FUSED, RESHAPES, REWRITES, Made
from edgewise.targets.coreml.whole_weights import keep_whole
from edgewise.targets.half_arithmetic import within_half
from edgewise.targets.rewrite import arguments, become, simplify

aten = torch.ops.aten

MADE_HERE = "coreml"
MOST_PARTS = 4
"""How often what an op was rewritten into is itself looked at."""


def legal(
    exported: ExportedProgram, reads: Callable[[Node], bool], half: bool = False, fused: bool = False
) -> ExportedProgram:
    """A copy of the program, which shares its weights, in ops that coremltools reads. It must not write in place.

    `reads` says whether the frontend has a rule for a node's op. Ops without a rule are taken apart as torch does it;
    those that torch cannot take apart stay. `half`: the arithmetic will be in half precision. `fused`: attention will be one op.
    """
    editor = Editor(CleanUp()(exported).program)
    keep_whole(editor, MADE_HERE)
    rewritings = FUSED if fused else REWRITES
    for _ in range(MOST_PARTS):
        simplify(editor.graph)
        for node in list(editor.graph.nodes):
            if node.target in RESHAPES:
                become(node, aten.reshape.default, (node.args[0], list(node.meta["val"].shape)))
            elif node.target in rewritings:
                _rewrite(editor, node, rewritings[node.target](*arguments(node)))
        unread = [node for node in editor.graph.nodes if node.op == "call_function" and not reads(node)]
        if not unread:
            break
        for node in unread:
            _decompose(editor, node)
    _positional(editor)
    for node in editor.graph.nodes:
        if node.op == "placeholder":  # coremltools asks how inputs lie in memory, which means nothing to a package
            node.meta["val"] = node.meta["val"].contiguous()
    return _in_their_dialect(editor.finish(), half)


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
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
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
            node.args = torch.fx.node.map_aggregate(node.args, within_half)  # type: ignore[assignment]
        state = {name: within_half(value) for name, value in state.items()}
        constants = {name: within_half(value) for name, value in constants.items()}
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
