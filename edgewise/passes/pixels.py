"""An input that takes pixels: what the processor does to them goes into the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgewise.passes.graph import Editor
from edgewise.passes.trace import trace

PIXELS = "pixels"
"""Marks the nodes that this makes; targets keep them in single precision, so that the model sees what its processor would give."""


def scale_input(exported: ExportedProgram, name: str, scale: Sequence[float], bias: Sequence[float]) -> ExportedProgram:
    """The program whose input `name (B, C, H, W)` is `scale * input + bias`, a pair for each channel, wherever it is used."""
    editor = Editor(exported)
    node = next(one for one in editor.graph.nodes if one.op == "placeholder" and one.name == name)
    factors, offsets = (torch.tensor(one, dtype=torch.float64).reshape(-1, 1, 1) for one in (scale, bias))

    # Not `x * factor + offset`, which coremltools fuses into a batch norm whose epsilon makes it 5e-6 smaller.
    def scaled(x: Tensor, origin: Tensor, factor: Tensor) -> Tensor:
        return (x - origin) * factor

    constants = [editor.add_constant((-offsets / factors).float(), f"{PIXELS}_origin"),
                 editor.add_constant(factors.float(), f"{PIXELS}_scale")]  # fmt: skip
    operands = [node, *constants]
    traced = trace(scaled, [one.meta["val"] for one in operands], editor.fake_mode)
    users = list(node.users)
    with editor.graph.inserting_before(next(one for one in editor.graph.nodes if one.op != "placeholder")):
        new = editor.inline(traced, operands, PIXELS)
    for user in users:
        user.replace_input_with(node, new)
    return editor.finish()
