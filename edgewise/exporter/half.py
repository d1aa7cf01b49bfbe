"""Round the weights of a program to what half-precision storage leaves of them.

It is done once, before any target sees the program: all store the rounded weights without loss, and the golden outputs
are those of the very same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgewise.targets.half import HALVE_FROM


def rounded(exported: ExportedProgram) -> ExportedProgram:
    """The program with every weight rounded that is stored in half precision. The graph and all other tensors are shared."""
    # A tensor with two names stays one tensor.
    memo: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = _rounded(tensor)
        return memo[id(tensor)]

    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=exported.graph_signature,
        state_dict={name: once(tensor) for name, tensor in exported.state_dict.items()},
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants={k: once(v) if isinstance(v, Tensor) else v for k, v in exported.constants.items()},
        verifiers=exported.verifiers,
    )


def _rounded(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    if value.dtype != torch.float32 or value.numel() * value.element_size() < HALVE_FROM:
        return tensor
    half = value.half().float()
    if not bool(torch.isfinite(half).all()) or torch.equal(half, value):
        return tensor
    if torch.equal(value, value.round()):
        return tensor  # it counts or indexes something, and one more or less is another thing
    return nn.Parameter(half, requires_grad=False) if isinstance(tensor, nn.Parameter) else half
