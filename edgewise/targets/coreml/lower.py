"""Lower an exported program to a Core ML package, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.program import prepare

if TYPE_CHECKING:
    from torch.export import ExportedProgram


DEPLOYMENT = "iOS17"
"""The oldest system that a package is for."""


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> list[Path]:
    """Write `stem.mlpackage`; see `Target.lower`. The main file is the package's `Manifest.json`."""
    from edgewise.targets.coreml.convert import quiet, reads, to_mil, to_model
    from edgewise.targets.coreml.legal import legal
    from edgewise.targets.coreml.ports import ports
    from edgewise.targets.coreml.write import write_package

    half = precision != "fp32"
    with quiet():
        program = legal(prepare(exported, "coreml", input_names, output_names), reads, half)
        inputs, outputs = ports(program, input_names, output_names, half=half)
        model = to_model(to_mil(program, inputs, outputs, DEPLOYMENT), DEPLOYMENT, half)
    return write_package(model, inputs, outputs, Path(folder) / f"{stem}.mlpackage")
