"""Capture: from a PyTorch module and example inputs to a `Program`."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edgewise.errors import EdgewiseError, InputError
from edgewise.exporter.digest import plain_parts
from edgewise.passes.graph import user_inputs
from edgewise.passes.program import Program, make_program


def capture(module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture a module with the shapes of its example inputs, which become static.

    Args:
        module: any `nn.Module`; it is put into evaluation mode for the capture and restored.
        args, kwargs: example inputs, tensors of the shapes that the artifact will take.

    Raises InputError if a weight is NaN or infinite, the inputs do not fit, or the module cannot be captured (control
    flow that depends on values).
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"a model must be a torch.nn.Module, and this is {type(module).__name__}")
    args, kwargs = tuple(args), dict(kwargs or {})
    check_weights(module)
    with evaluating(module), quiet():
        with _buffers_kept(module):
            outputs = _run(module, args, kwargs)
        try:
            # Of a graph that it cannot trace, torch prints all there is.
            with redirect_stderr(StringIO()):
                exported = torch.export.export(module, args, kwargs, strict=False)
        except EdgewiseError:
            raise
        except Exception as error:
            raise InputError(_explain(module, error)) from error
    program = from_exported(exported, args, kwargs)
    expected = {
        n: v.detach()
        for n, v in zip(program.output_names, pytree.tree_leaves(outputs), strict=True)
        if isinstance(v, Tensor)
    }
    return program.with_role(expected=expected)


def from_exported(
    exported: ExportedProgram, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None
) -> Program:
    """A `Program` from an `ExportedProgram`, whose own example inputs are used where none are given.

    Raises InputError for dynamic shapes, and where there are no example inputs.
    """
    if args is None and kwargs is None:
        if exported.example_inputs is None:
            raise InputError(
                "the program has no example inputs: export it with torch.export.export(module, args) again"
            )
        args, kwargs = exported.example_inputs
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(not isinstance(n, int) for n in value.shape):
            raise InputError(
                f"the program has a dynamic shape {tuple(value.shape)} at {node.name}: edgewise compiles static "
                "shapes; export it without dynamic_shapes"
            )
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise InputError(
                f"the program has a size that depends on values, at {node.name} ({node.target}): it cannot "
                "be compiled with static shapes"
            )
    leaves = [leaf for leaf in pytree.tree_leaves((tuple(args or ()), dict(kwargs or {})))]
    names = [node.name for node in user_inputs(exported)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) != len(names):
        raise InputError(f"the program takes {len(names)} tensors ({', '.join(names)}), and {len(tensors)} were given")
    inputs = {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}
    return make_program(exported, inputs, output_names(exported)).with_role()


def output_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Names of the flat outputs: the fields of a Hugging Face output or the keys of a dict; `output` or `output_i`
    for plain tensors and tuples."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    flat = pytree.tree_unflatten(range(spec.num_leaves), spec)
    names = []
    for path, _ in pytree.tree_flatten_with_path(flat)[0]:
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        name = ".".join(parts)
        names.append("output" if not name else f"output_{name}" if name[0].isdigit() else name)
    return tuple(names)


def check_weights(module: nn.Module) -> None:
    """Raise InputError if any floating-point weight or buffer is NaN or infinite."""
    for kind, named in (("weight", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in named:
            if tensor.device.type != "meta" and not all(_finite(one) for one in plain_parts(tensor) if one.is_floating_point()):
                # Masks are stored as buffers with -inf in some models, which is no defect.
                if kind == "buffer" and not bool(tensor.isnan().any()):
                    continue
                raise InputError(
                    f"{kind} {name} of {type(module).__name__} holds NaN or infinite values: the checkpoint "
                    "is damaged, or training diverged"
                )
            if tensor.device.type == "meta":
                raise InputError(
                    f"{kind} {name} of {type(module).__name__} has no values (it is on the meta device): load "
                    "the weights before exporting"
                )


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A sum tells in one read of the memory; only a sum that overflows needs a second."""
    total = tensor.detach().sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back what running a module writes to its buffers: a cache is captured as it was given."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers() if not is_traceable_wrapper_subclass(buffer)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the model once, so that inputs that do not fit are told apart from what cannot be captured."""
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    except Exception as error:
        given = [*(_shape(a) for a in args), *(f"{k}={_shape(v)}" for k, v in kwargs.items())]
        takes = ", ".join(list(inspect.signature(module.forward).parameters)[:6])
        raise InputError(
            f"{type(module).__name__} cannot run on the example inputs ({', '.join(given) or 'none'}): {error}. "
            f"Its forward takes: {takes}"
        ) from error


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) if isinstance(value, Tensor) else repr(value)[:40]


def _explain(module: nn.Module, error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    where = [line.strip() for line in text.splitlines() if '.py", line' in line and "/torch/" not in line]
    dynamic = any(word in text for word in ("data-dependent", "Dynamic control flow", "torch.cond", "unbacked"))
    reason = (
        "its control flow or a shape depends on the values of the inputs; edgewise compiles static graphs. Replace the "
        "branch by torch.where or a fixed choice"
        if dynamic
        else "torch.export cannot trace it"
    )
    return f"{type(module).__name__} cannot be captured: {reason}.\n  torch says: {first}" + (
        f"\n  at {where[-1]}" if where else ""
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without the fused transformer path that hides attention; restored after."""
    training = {m: m.training for m in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, was in training.items():
            m.training = was


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings about tracing, which are of no use to who exports a model."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)
