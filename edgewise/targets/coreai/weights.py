"""A program whose layers have weights of 8 or 4 bits. Imports torch and coreai-torch.

Apple's `coreai-opt` compresses every large constant that a product reads, those that a compression counts with among them. Here a
layer is what it is for every target: its weight alone is stored in few bits, by the op that coreai-torch has for it.
"""

from __future__ import annotations

import warnings
from typing import Any

import coreai_torch._compression.custom_layers  # noqa: F401  (registers the op)
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgewise.passes.graph import parameters_of, user_inputs
from edgewise.passes.layers import layers

BLOCK = 32
"""Inputs of a layer that share a scale at four bits."""
_TYPES: dict[int, torch.dtype] = {8: torch.int8, 4: getattr(torch, "int4")}  # noqa: B009  (torch's stubs lack it)


def in_bits(exported: ExportedProgram, bits: int) -> ExportedProgram:
    """The program with the weights of its layers as whole numbers and scales, multiplied where they are read.

    Of 8 bits, with a scale for each output, or of 4, with one for each `BLOCK` of its inputs where these divide them. The program
    must not write in place.
    """
    examples = [torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype) for node in user_inputs(exported)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(_Stored(exported, bits).eval(), tuple(examples), strict=False)


class _Stored(nn.Module):
    """Runs a program on weights that it makes of what is stored."""

    def __init__(self, exported: ExportedProgram, bits: int) -> None:
        super().__init__()
        self._graph = exported.graph_module
        self._names = [node.name for node in exported.graph.nodes if node.op == "placeholder"]
        self._kept: dict[str, str] = {}
        self._layers: dict[str, tuple[str, str, torch.dtype]] = {}
        quantised, weights = layers(exported), parameters_of(exported)
        for number, name in enumerate(one for one in self._names if one in weights):
            value = weights[name].detach()
            if name in quantised:
                fits = bits == 8 or value.shape[1] % BLOCK == 0
                whole, scale = _rounded(value, bits) if fits else _rounded(value, 8)
                self._layers[name] = (f"whole_{number}", f"scale_{number}", _TYPES[bits if fits else 8])
                self.register_buffer(f"whole_{number}", whole)
                self.register_buffer(f"scale_{number}", scale)
            else:
                self._kept[name] = f"weight_{number}"
                self.register_buffer(f"weight_{number}", value)

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        return fx.Interpreter(self._graph).run(*(self._value(name) if self._known(name) else next(given) for name in self._names))

    def _known(self, name: str) -> bool:
        return name in self._layers or name in self._kept

    def _value(self, name: str) -> Tensor:
        if name in self._kept:
            kept: Tensor = getattr(self, self._kept[name])
            return kept
        whole, scale, kind = self._layers[name]
        stored = getattr(self, whole), getattr(self, scale)
        made: Tensor = torch.ops.coreai.constexpr_blockwise_shift_scale(*stored, input_dtype=kind)
        return made


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of `weight`'s shape, and the scales, of as many dimensions. What is all zeros has the scale 1."""
    most = 2 ** (bits - 1) - 1  # symmetric: the lowest number is not used
    blocks = weight.shape[1] // BLOCK if bits == 4 else 1
    parts = weight.reshape(weight.shape[0], blocks, -1, *weight.shape[2:])
    largest = parts.abs().amax(tuple(range(2, parts.ndim)))
    # Scales are stored in half precision, so the whole numbers are of what that leaves of them.
    scale = (largest / most).half().float().reshape(*largest.shape, *[1] * (weight.ndim - 2))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    wide = scale.repeat_interleave(weight.shape[1] // blocks, 1)
    return (weight / wide).round().clamp(-most, most).to(torch.int8), scale
