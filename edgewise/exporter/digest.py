"""Digests: the identity of weights, of a graph with all its arguments, and of an artifact's whole making."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edgewise.passes.graph import parameters_of


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: itself, but for those that tools such as torchao wrap (whole numbers and their
    scales, say), which compute little else than the products that they are for."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values."""
    parts = plain_parts(tensor)
    if parts[0] is not tensor:
        whole = f"{type(tensor).__name__}{tuple(tensor.shape)}{[tensor_digest(part) for part in parts]}"
        return hashlib.sha256(whole.encode()).hexdigest()
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Weights:
    """Digests of tensors, each computed once however many programs hold it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, str]] = {}

    def of(self, tensor: Tensor) -> str:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = (tensor, tensor_digest(tensor))
        return self._known[id(tensor)][1]

    def of_program(self, exported: ExportedProgram) -> str:
        """One digest for all weights of a program, by name."""
        named = {str(k): self.of(v) for k, v in exported.state_dict.items()}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def graph_text(exported: ExportedProgram, weights: Weights) -> str:
    """A graph as text: every node with its op, all arguments, shape and type, and the digest of every weight."""
    tensors = parameters_of(exported)
    lines = []
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        kind = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else ""
        weight = weights.of(tensors[node.name]) if node.name in tensors else ""
        arguments = fx.node.map_aggregate((node.args, node.kwargs), _text)
        lines.append(f"{node.name} {node.op} {node.target} {arguments} {kind} {weight}")
    return "\n".join(lines)


def _text(value: Any) -> Any:
    # repr keeps every digit of a float and tells 1 from 1.0 and True.
    return f"%{value.name}" if isinstance(value, fx.Node) else repr(value)


def artifact_key(exported: ExportedProgram, weights: Weights, making: Mapping[str, Any]) -> str:
    """The cache key of an artifact: its graph and weights, and how it is made (`making`: target, precision, tool versions,
    names)."""
    text = json.dumps(dict(making), sort_keys=True, default=str) + "\n" + graph_text(exported, weights)
    return hashlib.sha256(text.encode()).hexdigest()
