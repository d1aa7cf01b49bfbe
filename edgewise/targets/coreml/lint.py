"""What would fail on Core ML, or leave the Neural Engine, said of a program before it is lowered.

Apple does not document which ops the Neural Engine runs. Each rule here names its source; those that nobody has confirmed say so.
Where a program really runs, only a device can tell (`MLComputePlan`). Imports torch and coremltools.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.errors import InputError
from edgewise.passes.graph import describe, parameters_of, shape_of
from edgewise.passes.legalise import is_compression_op
from edgewise.targets.coreml.convert import reads
from edgewise.targets.coreml.layout import lay_out
from edgewise.targets.coreml.legal import legal

aten = torch.ops.aten

MOST_DIMENSIONS = 5
LARGEST = 1_000_000_000


@dataclass(frozen=True)
class Rule:
    """Ops that are likely to leave the Neural Engine: why, and who says so."""

    ops: frozenset[Any]
    reason: str
    source: str


def _rule(ops: set[Any], reason: str, source: str) -> Rule:
    return Rule(frozenset(ops), reason, source)


_LISTED = "a reverse-engineered list, unverified"
RULES = (
    _rule(
        {aten.gather.default, aten.index.Tensor, aten.index_select.default, aten.embedding.default},
        "gathers run on the CPU or GPU",
        "coremltools issue 1103; hollance/neural-engine, unsupported layers",
    ),
    _rule(
        {aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default},
        "topk and sort run outside of the Neural Engine; one cost 1.75 ms beside a graph of 1.23 ms",
        "coreai-torch issue 66, iPhone 17 Pro",
    ),
    _rule(
        {
            *(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_put.default),
            *(aten.slice_scatter.default, aten.select_scatter.default),
        },
        "scatters are among the ops that were only seen on the CPU",
        f"{_LISTED}; FluidAudio for caches",
    ),
    _rule(
        {aten.cumsum.default, aten.one_hot.default, aten.tril.default, aten.triu.default},
        "sums of all before, one-hot codes and triangles are among the ops that were only seen on the CPU",
        _LISTED,
    ),
    _rule(
        {
            *(aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
            *(aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default, aten.logical_not.default),
        },
        "choices and logic are among the ops that were only seen on the CPU",
        _LISTED,
    ),
    _rule(
        {aten.rand.default, aten.randn.default, aten.rand_like.default, aten.randn_like.default},
        "random numbers are among the ops that were only seen on the CPU",
        _LISTED,
    ),
)
STATES_FAIL = "models with states were refused by the Neural Engine (coremltools issue 2553)"
UNEVEN = "and so was one with a state of which a size is no multiple of 32 (coremltools issue 2631)"


def lint(exported: ExportedProgram, *, tokens_last: bool = False, fused: bool = False) -> list[str]:
    """One line for each thing that would fail, and for each kind of op that is at risk of leaving the Neural Engine.

    Those that run all the same begin with `slow: `. `tokens_last`: tokens will be laid out as in `layout`. `fused`: attention will
    be one op.
    """
    program = legal(exported, lambda node: is_compression_op(node) or reads(node), half=True, fused=fused)
    laid = _layout(program) if tokens_last else []
    return [*_failures(program), *laid, *_risks(program), *_states(program), *_size(program)]


def _layout(program: ExportedProgram) -> Iterator[str]:
    try:
        strays = lay_out(program).strays
    except InputError as refused:
        yield str(refused)
        return
    if strays:
        first = strays[0]
        yield (
            f"slow: {len(strays)} times tokens are transposed between ops that have a form in the layout and ops that have none, "
            f"first from {describe(first.of)} to {describe(first.why)} (Apple, Deploying Transformers on the Neural Engine)"
        )


def _states(program: ExportedProgram) -> Iterator[str]:
    names = program.graph_signature.buffers_to_mutate.values()
    if names:
        known = {**program.state_dict, **program.constants}
        uneven = [name for name in names if any(size % 32 for size in known[name].shape)]
        more = f", {UNEVEN}: {uneven[0]} {tuple(known[uneven[0]].shape)}" if uneven else ""
        yield f"slow: {next(iter(names))} becomes a state: {STATES_FAIL}{more}"


def _failures(program: ExportedProgram) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op == "call_function" and not is_compression_op(node) and not reads(node):
            yield f"{describe(node)}: Core ML has no rule for it"
    for node in program.graph.nodes:
        if len(shape_of(node)) > MOST_DIMENSIONS and not _passing(node):
            yield f"{describe(node)}: it has {len(shape_of(node))} dimensions, and Core ML takes {MOST_DIMENSIONS}"


def _passing(node: Node) -> bool:
    """Whether a value of many dimensions is only permuted on its way from one shape to another, which coremltools takes apart."""
    plain = (aten.reshape.default, aten.permute.default, aten.transpose.int)
    return node.target in plain and all(
        user.target in plain and (len(shape_of(user)) <= MOST_DIMENSIONS or _passing(user)) for user in node.users
    )


def _risks(program: ExportedProgram) -> Iterator[str]:
    for rule in RULES:
        found = [node for node in program.graph.nodes if node.target in rule.ops]
        if found:
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            yield f"slow: {describe(found[0])}{more}: may leave the Neural Engine: {rule.reason} ({rule.source})"


def _size(program: ExportedProgram) -> Iterator[str]:
    size = sum(2 * tensor.numel() for tensor in parameters_of(program).values())
    if size > LARGEST:
        yield (
            f"slow: the weights have {size / 1e9:.1f} GB in half precision: models beyond 1 GB do not run on the Neural Engine "
            "(coremltools guide, MLModel utilities); split it, or take w8a16 or w4a16"
        )
