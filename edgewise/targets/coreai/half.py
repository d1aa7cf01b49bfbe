"""A program in half-precision arithmetic, for a runtime that takes the types of values from the program. Imports torch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from edgewise.passes.graph import parameters_of, user_inputs
from edgewise.targets.half_arithmetic import wide, within_half


def halved(exported: ExportedProgram) -> ExportedProgram:
    """The program with floating-point weights, inputs, outputs and arithmetic in half precision; what counts more tokens than
    halves tell apart stays in single precision, with casts around it. It must not write in place."""
    examples = [_half(torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype)) for n in user_inputs(exported)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(_Halved(exported).eval(), tuple(examples), strict=False)


class _Halved(nn.Module):
    """Runs a program node by node, each in its precision."""

    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__()
        self._graph, self._wide = exported.graph_module, wide(exported)
        self._placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
        self._buffer_of: dict[str, str] = {}
        weights = parameters_of(exported)
        for number, node in enumerate(one for one in self._placeholders if one.name in weights):
            value = within_half(weights[node.name].detach())
            kept = bool(node.users) and all(user in self._wide for user in node.users)
            self.register_buffer(f"weight_{number}", value if kept else _half(value))
            self._buffer_of[node.name] = f"weight_{number}"

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        values = [
            getattr(self, self._buffer_of[node.name]) if node.name in self._buffer_of else next(given)
            for node in self._placeholders
        ]
        made = _Interpreter(self._graph, self._wide).run(*values)
        return pytree.tree_map_only(Tensor, _half, made)


class _Interpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, wide: set[fx.Node]) -> None:
        super().__init__(graph)
        self._wide = wide

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        change = _single if n in self._wide else _half
        args, kwargs = pytree.tree_map(change, (args, kwargs), is_leaf=lambda one: isinstance(one, torch.dtype))
        return self.call_function(n.target, args, kwargs)  # type: ignore[arg-type]


def _half(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.half() if value.dtype == torch.float32 else value
    return torch.float16 if value is torch.float32 else within_half(value)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value
