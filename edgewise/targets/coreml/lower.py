"""Lower an exported program to a Core ML package, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.errors import InputError
from edgewise.targets.program import prepare

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgewise.targets.base import Cache

DEPLOYMENT = {"w4a16": "iOS18"}
"""The oldest system that a package of a precision is for. All others: iOS17."""
FUNCTIONS = "iOS18"
"""The oldest system whose packages have several functions."""
STATES = "iOS18"
"""The oldest system whose packages keep states, and have attention as one op."""
PALETTES = "w8a16-palette"
_BITS = {"w8a16": 8, "w4a16": 4}


def lower(
    exported: ExportedProgram,
    folder: Path,
    stem: str,
    precision: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    functions: bool = False,
    images: Mapping[str, str] | None = None,
    oldest: str = "iOS17",
    tokens_last: bool = False,
    caches: Sequence[Cache] = (),
) -> list[Path]:
    """Write `stem.mlpackage`; see `Target.lower`. The main file is the package's `Manifest.json`.

    `functions`: it will be one of several functions of a package. `images`: inputs that take images, and their colours. `oldest`:
    the oldest system that it may be for; from iOS18 on, attention is one op. `tokens_last`: tokens are laid out as in `layout`.
    `caches`: inputs that the package keeps as states.
    """
    from edgewise.targets.coreml.caches import keep_caches
    from edgewise.targets.coreml.convert import quiet, reads, to_mil, to_model
    from edgewise.targets.coreml.layout import lay_out
    from edgewise.targets.coreml.legal import legal
    from edgewise.targets.coreml.ports import ports, state_ports
    from edgewise.targets.coreml.weights import check_whole, palettised, quantised
    from edgewise.targets.coreml.write import write_package

    half, deployment = precision != "fp32", FUNCTIONS if functions else DEPLOYMENT.get(precision, oldest)
    with quiet():
        prepared = prepare(exported, "coreml", input_names, output_names, keeps_state=True)
        if caches:
            prepared, input_names = keep_caches(prepared, input_names, output_names, caches)
        if prepared.graph_signature.buffers_to_mutate:
            deployment = STATES
            _check_states(prepared)
        program = legal(prepared, reads, half, fused=deployment == STATES and not tokens_last)
        if tokens_last:
            program = lay_out(program).program
        inputs, outputs = ports(program, input_names, output_names, half=half, images=images)
        states = state_ports(program, caches)
        model = to_model(to_mil(program, inputs, outputs, deployment), deployment, half, apart=tokens_last)
        if precision in _BITS:
            model = quantised(model, _BITS[precision])
        elif precision == PALETTES:
            model = palettised(model)
        check_whole(model)
    return write_package(model, inputs, outputs, Path(folder) / f"{stem}.mlpackage", states)


def _check_states(exported: ExportedProgram) -> None:
    """Refuse buffers that the program writes to and that cannot be states: those are half precision, and zeros at first."""
    import torch

    for name in exported.graph_signature.buffers_to_mutate.values():
        buffer = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
        if buffer.dtype != torch.float32:
            raise InputError(
                f"target coreml: the program writes to {name}, of type {str(buffer.dtype).removeprefix('torch.')}, and states of "
                "Core ML hold floating-point numbers: make the buffer float32 (it is stored in half precision), or an input"
            )
        if bool(buffer.count_nonzero()):
            raise InputError(
                f"target coreml: the program writes to {name}, which holds other values than zeros at first, and states of Core ML "
                "begin with zeros: export the model before it is used, or after the buffer was cleared"
            )
