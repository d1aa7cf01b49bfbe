"""Turn an exported program into an ONNX model, without those steps of torch's exporter that are not needed.

For ViT-B/16 torch's exporter spends two thirds of its time on tracing the program again for its
decompositions and on rewriting rules that find nothing. Both are left out; constant folding and clean-up
stay. The sources of all its rules are read once for a process, and not for each export.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import opset20, optimizer
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _registration

from edgewise.errors import InputError
from edgewise.targets.base import layer_name
from edgewise.targets.onnx import loops
from edgewise.targets.program import quiet
from edgewise.targets.rewrite import decompose, shorten_sorts, simplify

# 20 is the first opset with Gelu as one op, and the last that TensorRT before 10.9 reads (JetPack 6). What later opsets add is
# not read by all runtimes of the last years.
OPSET = 20


def to_onnx(exported: ExportedProgram, target: str, layers: Mapping[str, str]) -> onnx_ir.Model:
    """The ONNX model of a program, with its weights as initialisers.

    Its nodes still hold torch's notes about where they come from; `drop_notes` takes them out. The program must not write in
    place. `layers`: names of layers by those of their weights; a node that computes one is named after it. Raises
    `InputError`, which names the target, if an op has no rule.
    """
    with quiet():
        model = None
        for attempt in (_as_it_is, _without_composites, _by_the_exporter):
            try:
                model = _export(attempt(exported))
                break
            except torch.onnx.OnnxExporterError as error:
                # An op that has no rule as it is may have one after torch's decompositions.
                failure = error
        if model is None:
            reason = _reason(failure)
            raise InputError(f"target {target} cannot lower this program: {reason}") from failure
        _clean(model, layers)
    return model


def _as_it_is(exported: ExportedProgram) -> ExportedProgram:
    return _copy(exported, _Plain)


def _without_composites(exported: ExportedProgram) -> ExportedProgram:
    return _copy(decompose(exported), _Plain)


def _by_the_exporter(exported: ExportedProgram) -> ExportedProgram:
    return _copy(exported, ExportedProgram)


class _Plain(ExportedProgram):
    """A program that says that it needs no decompositions when the exporter asks for them."""

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        return self


def _copy(exported: ExportedProgram, kind: type[ExportedProgram]) -> ExportedProgram:
    """A copy of the program that shares its weights, with every view turned into a reshape.

    The exporter edits the graph. Its decompositions fail on a view of the output of masked attention, whose
    strides differ from those that the program was captured with; a reshape takes any strides.
    """
    graph = copy.deepcopy(exported.graph)
    for node, original in zip(graph.nodes, exported.graph.nodes, strict=True):
        node.name = original.name  # a copy renames inputs that are called like a function of Python
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    simplify(graph)
    shorten_sorts(graph)  # ONNX's TopK gives equal values in the order of their indices
    return kind(
        root=exported.graph_module,
        graph=graph,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _export(exported: ExportedProgram) -> onnx_ir.Model:
    with _rules_read_once():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=False,
            custom_translation_table=_TRANSLATIONS,
        )
    assert program is not None
    model: onnx_ir.Model = program.model
    return model


@contextmanager
def _rules_read_once() -> Iterator[None]:
    """For a list of its rules the exporter parses 500 functions, which gives the same every time, and takes longer than a small
    model. Where a version of it has no such list, nothing is changed."""
    apis: Any = getattr(_registration, "onnxscript_apis", None)
    known = getattr(apis, "get_torchlib_ops", None)
    if known is None:
        yield
        return
    apis.get_torchlib_ops = _kept(getattr(known, "__wrapped__", known))
    try:
        yield
    finally:
        apis.get_torchlib_ops = known


@cache
def _kept(read: Callable[[], Any]) -> Callable[[], Any]:
    return cache(read)


def _name_layers(graph: onnx_ir.Graph, layers: Mapping[str, str]) -> None:
    """Name the nodes that compute layers, while weights still have their names."""
    seen: list[str] = []
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weight = node.inputs[1]
        while weight is not None and (source := weight.producer()) is not None and source.op_type in _MOVES:
            weight = source.inputs[0]
        name = layers.get(weight.name or "") if weight is not None else None
        if name is not None:
            seen.append(name)
            node.name = layer_name(name, seen.count(name))


_MOVES = ("Cast", "Identity", "Reshape", "Transpose", "Unsqueeze")


def _clean(model: onnx_ir.Model, layers: Mapping[str, str]) -> None:
    """Fold constants, and drop what nobody uses."""
    common.InlinePass()(model)
    _name_layers(model.graph, layers)
    optimizer.fold_constants(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)
    model.graph.name = "edgewise"
    model.producer_name, model.producer_version = "edgewise", None


def drop_notes(model: onnx_ir.Model) -> None:
    """Drop what the exporter noted about the source: it holds paths of this machine."""
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _sort_stable(
    self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    # ONNX's TopK gives equal values in the order of their indices, so that a TopK of all is a stable sort.
    size: Any = opset20.Constant(value_ints=[self.shape[dim]])
    values, indices = opset20.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
    return values, indices


def _conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    # The rule of torch's exporter gives a convolution without bias one of a wrong shape.
    strides, pads, dilations = (list(given) * (3 // len(given)) for given in (stride, padding, dilation))
    operands = (input, weight) if bias is None else (input, weight, bias)
    return opset20.Conv(*operands, strides=strides, pads=pads * 2, dilations=dilations, group=groups)


# ONNX for those ATen ops that torch's exporter has no rule for, or a wrong one.
_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _sort_stable,
    torch.ops.aten.conv3d.default: _conv3d,
    **loops.TRANSLATIONS,
}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    op = re.search(r"OpOverload\(op='([^']+)'", text)
    return f"it has no rule for {op.group(1)} ({text})" if op else f"{type(error).__name__}: {text}"
