"""Core ML packages for tests: made by coremltools from MIL, or from PyTorch by `torch.export`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ct = pytest.importorskip("coremltools", reason="packages are made by coremltools")

from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

# coremltools collects garbage at every conversion, which takes long after many imports.
gc.freeze()

TYPES = {
    "float32": types.fp32,
    "float16": types.fp16,
    "int32": types.int32,
    "bool": types.bool,
    "int8": types.int8,
    "uint8": types.uint8,
    "int16": types.int16,
    "uint16": types.uint16,
}


def from_mil(
    folder: Path, build: Callable[..., Any], inputs: Mapping[str, np.ndarray], target: Any = None, **options: Any
) -> Path:
    """A package of the MIL that `build(**inputs)` makes with the builder, without any pass."""
    target = target or ct.target.iOS18
    specs = [mb.TensorSpec(shape=array.shape, dtype=TYPES[array.dtype.name]) for array in inputs.values()]

    names = ", ".join(inputs)
    # The builder reads the names of the parameters.
    function = eval(f"lambda {names}: build({', '.join(f'{name}={name}' for name in inputs)})", {"build": build})
    program = mb.program(input_specs=specs, opset_version=target)(function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
        **options,
    )
    path = folder / "model.mlpackage"
    model.save(str(path))
    return path


def from_torch(
    folder: Path,
    module: Any,
    example: tuple[Any, ...],
    *,
    half: bool = False,
    target: Any = None,
    name: str = "model",
    **options: Any,
) -> Path:
    """A package of a module: inputs `x0, x1, ...`, outputs `y0, y1, ...`, in half or single precision."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, example, strict=False).run_decompositions({})
        # The frontend knows no alias, which means nothing here.
        for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
        outputs = len(exported.graph_signature.user_outputs)
        dtype = np.float16 if half else np.float32
        model = ct.convert(
            exported,
            minimum_deployment_target=target or ct.target.iOS17,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            inputs=[
                ct.TensorType(name=f"x{i}", shape=x.shape, dtype=dtype if x.is_floating_point() else np.int32)
                for i, x in enumerate(example)
            ],
            outputs=[ct.TensorType(name=f"y{i}") for i in range(outputs)],
            skip_model_load=True,
            **options,
        )
    path = folder / f"{name}.mlpackage"
    model.save(str(path))
    return path


def stateful(folder: Path) -> Path:
    """`total += x0`, kept between runs; gives `2 * total`, three halves."""
    import torch

    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x: Any) -> Any:
            self.total.add_(x)
            return self.total * 2.0

    return from_torch(folder, Counter(), (torch.zeros(3),), half=True, target=ct.target.iOS18, name="stateful")


def flexible(folder: Path, kind: str) -> Path:
    """`2 * x.sum(-1)` for shapes (2, 3) and (4, 5) if `kind` is "enumerated", or of 1 to 4 by 3 to 9 if it is "range"."""
    import torch

    class Sum(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return (x * 2).sum(-1)

    shape = ct.Shape(shape=(ct.RangeDim(1, 4, default=2), ct.RangeDim(3, 9, default=3)))
    if kind == "enumerated":
        shape = ct.EnumeratedShapes(shapes=[(2, 3), (4, 5)], default=(2, 3))
    dims = {0: torch.export.Dim("n", min=1, max=8), 1: torch.export.Dim("m", min=2, max=16)}
    exported = torch.export.export(Sum(), (torch.zeros(2, 3),), dynamic_shapes=(dims,)).run_decompositions({})
    model = ct.convert(
        exported,
        inputs=[ct.TensorType(name="x", shape=shape)],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    path = folder / f"{kind}.mlpackage"
    model.save(str(path))
    return path
