"""Lower an exported program to a Core ML package, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.program import prepare

if TYPE_CHECKING:
    from torch.export import ExportedProgram


DEPLOYMENT = {"w4a16": "iOS18"}
"""The oldest system that a package of a precision is for. All others: iOS17."""
_BITS = {"w8a16": 8, "w4a16": 4}


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> list[Path]:
    """Write `stem.mlpackage`; see `Target.lower`. The main file is the package's `Manifest.json`."""
    from edgewise.passes.layers import layers
    from edgewise.targets.coreml.convert import quiet, reads, to_mil, to_model
    from edgewise.targets.coreml.legal import legal
    from edgewise.targets.coreml.ports import ports
    from edgewise.targets.coreml.weights import quantised
    from edgewise.targets.coreml.write import write_package

    half, deployment = precision != "fp32", DEPLOYMENT.get(precision, "iOS17")
    with quiet():
        program = legal(prepare(exported, "coreml", input_names, output_names), reads, half)
        inputs, outputs = ports(program, input_names, output_names, half=half)
        model = to_model(to_mil(program, inputs, outputs, deployment), deployment, half)
        if precision in _BITS:
            model = quantised(model, _BITS[precision])
    names = layers(program) if precision == "fp16" else None
    return write_package(model, inputs, outputs, Path(folder) / f"{stem}.mlpackage", names)
