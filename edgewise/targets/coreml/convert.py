"""Run coremltools on a program, and see that it reads all of it.

coremltools skips what its rules do not ask for, and says nothing. Every keyword is watched here, and so are the shape and
the type of every value that it makes. Imports torch and coremltools.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.errors import InputError
from edgewise.passes.graph import MADE_BY, describe, parameters_of
from edgewise.passes.pixels import PIXELS
from edgewise.targets.coreml.legal import MADE_HERE
from edgewise.targets.coreml.ports import Port
from edgewise.targets.half_arithmetic import wide

NAME = "coreml"
_TO_BATCH_NORM = "common::fuse_elementwise_to_batchnorm"
"""A pass of coremltools that makes a batch norm of a product and a sum for each channel, with an epsilon of 1e-5 beside a variance
of one: the product becomes 5e-6 smaller."""


_MISREAD = {
    *(torch.ops.aten._upsample_bilinear2d_aa.default, torch.ops.aten._upsample_bilinear2d_aa.vec),
    *(torch.ops.aten._upsample_bicubic2d_aa.default, torch.ops.aten._upsample_bicubic2d_aa.vec),
}
"""Ops that the frontend has a rule for, and reads as others: it resizes without the filter against aliases."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' notes about itself (it cannot predict on Linux, torch is new) and its bars from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Before stderr is another, which its logger would keep for ever.
            import coremltools  # noqa: F401

            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def reads(node: Node) -> bool:
    """Whether the frontend has a rule for a node's op."""
    from coremltools.converters.mil.frontend.torch import ops as _ops  # noqa: F401 (it registers the rules)
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    return node.target not in _MISREAD and _TORCH_OPS_REGISTRY.get_func(_kind(node)) is not None


def _kind(node: Node) -> str:
    name = getattr(node.target, "name", None)
    return name() if callable(name) else str(getattr(node.target, "__name__", node.target))


def to_mil(exported: ExportedProgram, inputs: Sequence[Port], outputs: Sequence[Port], deployment: str) -> Any:
    """The program as coremltools' Program, before any of its passes, for a `deployment` such as `iOS17`.

    `exported` is what `legal` makes. Raises `InputError`, which names the node and its source line, for what the frontend has
    no rule for, does not read, or reads as something else.
    """
    import coremltools
    from coremltools.converters.mil.converter import _reset_conversion_state
    from coremltools.converters.mil.frontend.torch.converter import TorchConverter

    nodes = {node.name: node for node in exported.graph.nodes}
    for node in exported.graph.nodes:
        if node.op == "call_function" and not reads(node):
            raise InputError(f"target {NAME} cannot lower this program: it has no rule for {describe(node)}")
    _check_constants(exported)
    # An image comes in single precision, and the model sees it as its processor would have made it.
    single = wide(exported, not_of=MADE_HERE) | {node for node in nodes.values() if node.meta.get(MADE_BY) == PIXELS}
    for node in exported.graph.nodes:
        node.meta["debug_handle"] = _WIDE if node in single else None
    _reset_conversion_state()  # a conversion that failed leaves counters behind, which names are made of
    kinds = [coremltools.TensorType(p.feature, p.stored_shape, np.dtype(p.stored).type) for p in inputs]
    converter = TorchConverter(exported, kinds, opset_version=getattr(coremltools.target, deployment))
    converter.graph.nodes = _Watched(converter.graph.nodes)
    for one in converter.graph.nodes:
        if one.kwinputs is not None:
            one.kwinputs = _Asked(one.kwinputs)
    try:
        program = converter.convert()
    except Exception as error:
        # Rules fail with errors of every kind, assertions among them.
        at = converter.graph.nodes.current
        where = f"at {describe(nodes[at.name])}: " if at is not None and at.name in nodes else ""
        raise InputError(
            f"target {NAME} cannot lower this program: {where}coremltools says: {_first_line(error)}"
        ) from error
    for one in converter.graph.nodes:
        _check_node(nodes[one.name], one, converter.context)
    _name_outputs(program, outputs)
    return program


def _name_outputs(program: Any, outputs: Sequence[Port]) -> None:
    """Give every output a value of its own, under its name: it may be an input, a constant, a scalar, or another output, too."""
    import coremltools
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

    function = program.functions["main"]
    scopes = [ScopeInfo(ScopeSource.EXIR_STACK_TRACE, [None]), ScopeInfo(ScopeSource.EXIR_DEBUG_HANDLE, [None])]
    made: dict[str, Any] = {}
    with function, Builder.scope(*scopes):
        for port, value in zip(outputs, function.outputs, strict=True):
            if port.feature in made:
                continue
            if not port.shape:
                value = Builder.expand_dims(x=value, axes=[0], name=port.feature)
            elif value.op is None or value.op.op_type == "const":
                value = Builder.identity(x=value, name=port.feature)
            else:
                value.name = port.feature
            made[port.feature] = value
    function.set_outputs(list(made.values()))
    stored = {p.feature: (p.stored_shape, np.dtype(p.stored).type) for p in outputs}
    function.set_output_types([coremltools.TensorType(name, *stored[name]) for name in made])


_INTO_WEIGHTS = {"common::fuse_conv_scale", "common::fuse_conv_batchnorm"}


def to_model(program: Any, deployment: str, half: bool, apart: bool = False) -> Any:
    """coremltools' model, in a temporary package, of its Program. `half`: fp16 arithmetic, and else fp32. `apart`:
    convolutions keep the weights that they have, under their names, and no scale behind one is folded into them."""
    import coremltools
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipeline, PassPipelineManager

    PassPipelineManager.apply_pipeline(program, PassPipeline.get_pipeline("frontend_pytorch"))
    pipeline = PassPipeline.get_pipeline("default")
    pipeline.remove_passes({_TO_BATCH_NORM, *(_INTO_WEIGHTS if apart else ())})
    try:
        return coremltools.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            compute_precision=coremltools.transform.FP16ComputePrecision(_may_be_half)
            if half
            else coremltools.precision.FLOAT32,
            minimum_deployment_target=getattr(coremltools.target, deployment),
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
    except ValueError as error:  # a tensor of more than five dimensions
        raise InputError(f"target {NAME} cannot lower this program: coremltools says: {_first_line(error)}") from error


_WIDE = 1
"""Marks the ops that stay in single precision."""


def _may_be_half(op: Any) -> bool:
    from coremltools.converters.mil.mil.scope import ScopeSource

    return _WIDE not in op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, ())


class _Asked(dict[str, Any]):
    """Keywords of a node, and which of them were asked for."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        super().__init__(keywords)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


class _Watched(list[Any]):
    """Nodes, and which of them is being converted."""

    current: Any = None

    def __iter__(self) -> Iterator[Any]:
        for node in super().__iter__():
            self.current = node
            yield node


def _check_node(node: Node, read: Any, context: Any) -> None:
    """Refuse a node of which a keyword was not asked for, or whose value came out in another shape or kind of number."""
    lost = sorted(set(read.kwinputs) - read.kwinputs.asked) if read.kwinputs is not None else []
    if lost:
        said = ", ".join(f"{name}={node.kwargs[name]!r}" for name in lost)
        raise InputError(
            f"target {NAME} cannot lower this program: coremltools does not read {said} of {describe(node)}; "
            f"write that part of the model in other ops"
        )
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or node.name not in context:
        return
    made = context[node.name]
    shape = tuple(made.shape)
    if shape != tuple(value.shape) and all(isinstance(size, (int, np.integer)) for size in shape):
        raise InputError(
            f"target {NAME} cannot lower this program: coremltools gives shape {shape} to {describe(node)}, "
            f"and it is {tuple(value.shape)}"
        )
    kind = _kind_of_number(made)
    wanted = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
    if kind != wanted:
        raise InputError(
            f"target {NAME} cannot lower this program: coremltools gives {kind} values to {describe(node)}, "
            f"and they are {wanted}"
        )


def _kind_of_number(made: Any) -> str:
    from coremltools.converters.mil.mil import types

    return "float" if types.is_float(made.dtype) else "bool" if types.is_bool(made.dtype) else "int"


def _check_constants(exported: ExportedProgram) -> None:
    """Refuse whole numbers that 32 bits do not hold: coremltools cuts their upper half off."""
    for name, tensor in parameters_of(exported).items():
        if tensor.dtype == torch.int64 and tensor.numel():
            bounds = torch.iinfo(torch.int32)
            if int(tensor.min()) < bounds.min or int(tensor.max()) > bounds.max:
                raise InputError(
                    f"target {NAME} cannot lower this program: the constant {name} holds whole numbers beyond 32 bits"
                )
    for node in exported.graph.nodes:
        numbers = [one for one in node.args if isinstance(one, int) and not -(2**31) <= one < 2**31]
        if numbers and node.target is not torch.ops.aten.slice.Tensor:  # where they mean the end
            raise InputError(
                f"target {NAME} cannot lower this program: {numbers[0]} of {describe(node)} is beyond 32 bits"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
