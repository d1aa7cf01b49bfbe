"""Make the caches of a decoder buffers that the program writes to, which become states of a package.

The token of a run goes to its slot by a product with a one-hot row: no scatter, which leaves the Neural Engine. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgewise.errors import InputError
from edgewise.passes.graph import Editor, output_nodes, shape_of
from edgewise.passes.trace import trace
from edgewise.targets.base import Cache
from edgewise.targets.coreml.legal import MADE_HERE


def keep_caches(
    exported: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str], caches: Sequence[Cache]
) -> tuple[ExportedProgram, list[str]]:
    """The program whose `caches` are buffers of their names, which it leaves with the new token at its slot, and the names of the
    inputs that are left. Its outputs stay. Raises `InputError` for a cache that is no such pair of input and output."""
    signature = exported.graph_signature
    editor = Editor(exported)
    nodes = {node.name: node for node in editor.graph.nodes}
    inputs = {name: nodes[str(place)] for name, place in zip(input_names, signature.user_inputs, strict=True)}
    outputs = dict(zip(output_names, output_nodes(editor.graph)[-len(output_names) :], strict=True))
    for cache in caches:
        old, new, step = inputs.get(cache.input), outputs.get(cache.output), inputs.get(cache.step)
        if old is None or new is None or step is None:
            raise InputError(
                f"target coreml: the program has no cache {cache.input} that {cache.output} is added to at {cache.step}"
            )
        slots = shape_of(old)[2]
        if shape_of(new) != (*shape_of(old)[:2], 1, shape_of(old)[3]) or shape_of(step) != (1,) or not cache.first < slots:
            raise InputError(
                f"target coreml: cache {cache.input} is {shape_of(old)}, and {cache.output}, {shape_of(new)}, is no token of it"
            )
        operands = [old, new, step]
        traced = trace(_written(slots, cache.first), [node.meta["val"] for node in operands], editor.fake_mode)
        # Right behind the token: where a write is the last op of a graph, a pass of coremltools 9.0 fails (`optimize_state`).
        with editor.graph.inserting_before(new.next):
            editor.keep(old, cache.input, editor.inline(traced, operands, MADE_HERE, new))
    kept = {cache.input for cache in caches}
    return editor.finish(), [name for name in input_names if name not in kept]


def _written(slots: int, first: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The write of a token into a cache of so many slots."""

    def write(past: Tensor, token: Tensor, step: Tensor) -> Tensor:
        hot = (torch.arange(slots) == step + first).to(past.dtype)[:, None]
        return past * (1.0 - hot) + token * hot

    return write
