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
