"""What every lowering does with a program first: make it free of side effects, and check its inputs and
outputs.

Imports no torch; it only asks the program.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgewise.errors import InputError

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def prepare(
    exported: ExportedProgram,
    target: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    keeps_state: bool = False,
) -> ExportedProgram:
    """The program without ops that write in place; itself if it has none. `keeps_state`: buffers that it writes to, such as a
    cache, may be states of the artifact.

    Raises `InputError` if an input or output is no tensor or has a dynamic shape, if the program keeps state that the artifact
    cannot, or if the names do not fit.
    """
    if any(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in exported.graph.nodes
    ):
        with quiet():
            exported = exported.run_decompositions({})
    signature = exported.graph_signature
    buffers = () if keeps_state else signature.buffers_to_mutate.values()
    written = [*buffers, *signature.user_inputs_to_mutate.values()]
    if written:
        raise InputError(
            f"target {target}: the program writes to {', '.join(written)}; artifacts of this target keep no state. Give the "
            "values as inputs and outputs, or use the target coreml"
        )
    nodes = {node.name: node for node in exported.graph.nodes}
    for kind, ports, names in (
        ("input", signature.user_inputs, input_names),
        ("output", signature.user_outputs, output_names),
    ):
        for port in ports:
            _check_port(nodes, port, f"target {target}: {kind} '{port}' of the program")
        _check_names(names, len(ports), f"target {target}: {kind}")
    return exported


def _check_port(nodes: dict[str, Any], port: object, what: str) -> None:
    value = nodes[port].meta.get("val") if isinstance(port, str) and port in nodes else None
    shape = getattr(value, "shape", None)
    if shape is None:
        raise InputError(f"{what} is no tensor")
    if not all(isinstance(size, int) for size in shape):
        raise InputError(f"{what} has the dynamic shape {tuple(shape)}")


def _check_names(names: Sequence[str], count: int, what: str) -> None:
    if len(names) != count:
        raise InputError(f"{what}s are {count} and {len(names)} names were given: {', '.join(names)}")
    if len(set(names)) != count or "" in names:
        raise InputError(f"{what} names must be different and not empty: {', '.join(names)}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' notes about themselves (torchvision is absent, ...) from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            exporters = r"(torch\.onnx|onnxscript|onnx_ir)\b"
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=exporters)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
