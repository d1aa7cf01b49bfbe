"""Trace plain torch code into an ATen graph.

torch's own `make_fx` does that for anything, and takes two milliseconds an op to do so. What is traced here is code of ours:
functional, with static shapes and no values that control it. Recording it on tensors of the meta device takes a tenth of that,
and an export traces a thousand ops.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


@dataclass
class Traced:
    """A graph whose placeholders are the function's inputs, in order, and its constants by the target of their `get_attr`."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)


def trace(function: Callable[..., Any], values: Sequence[Tensor], fake_mode: FakeTensorMode, composite: bool = True) -> Traced:
    """Record the ATen ops, `edgewise::*` ops included, that a function runs on `values`, which may be fake.

    Each node gets its value, fake in `fake_mode`. `composite` keeps composite ops (matmul, softmax) whole. Raises RuntimeError
    for an op that writes in place or whose result decides about the graph.
    """
    recorder = _Recorder(fake_mode, composite)
    inputs = [recorder.input(value) for value in values]
    with enable_python_dispatcher(), _WrittenOut(), recorder:
        out = function(*inputs)
    recorder.traced.graph.output(recorder.nodes_of(out))
    recorder.traced.graph.eliminate_dead_code()
    return recorder.traced


class _WrittenOut(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Makes tensors that are written out in the code where they keep their values, and not on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": _CPU} if func in (torch.tensor, torch.as_tensor) else kwargs)


class _Recorder(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts a node into a graph for every op. Before composite ops are taken apart, torch lets none but its own modes look: hence
    the base, of which the stacking is used, and the tracer not."""

    def __init__(self, fake_mode: FakeTensorMode, composite: bool) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=composite)
        self.fake_mode = fake_mode
        self.traced = Traced()
        self.known: dict[int, Tensor] = {}
        """What stands for a constant, by the address of the constant."""

    def input(self, value: Tensor) -> Tensor:
        """What stands for an input."""
        return self._assign(_on_meta(value), self.traced.graph.placeholder("arg"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._known, (args, kwargs or {}))
        if func in _WRITTEN_OUT:
            return args[0]
        if func._schema.is_mutable or torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{func} cannot be traced: it writes in place, or its result decides about the graph")
        operands = tree_map_only(torch.device, lambda _: _CPU, self.nodes_of(args))
        options = self.nodes_of(kwargs)
        if "device" in kwargs:
            options["device"], kwargs["device"] = _CPU, _META
        out = func(*args, **kwargs)
        values = out if isinstance(out, (tuple, list)) else [out]
        if not all(isinstance(value, Tensor) for value in values):
            return out  # a question about sizes or types, which are known
        made = self.traced.graph.create_node("call_function", func, operands, options, func.overloadpacket.__name__)
        if values is out:
            made.meta["val"] = tuple(self._fake(value) for value in out)
            for i, value in enumerate(out):
                part = self.traced.graph.call_function(operator.getitem, (made, i))
                part.meta["val"] = made.meta["val"][i]
                self._assign(value, part)
            return out
        made.meta["val"] = self._fake(out)
        return self._assign(out, made)

    def _fake(self, value: Tensor) -> Tensor:
        # Not made of the tensor itself: to hold on to what a factory made would make torch copy it on its way to the caller.
        return FakeTensor(self.fake_mode, _on_meta(value), _CPU)

    def nodes_of(self, values: Any) -> Any:
        """The same with a node in the place of each tensor."""
        return tree_map_only(Tensor, lambda value: self._known(value).edgewise_node[1], values)

    def _assign(self, value: Any, node: fx.Node) -> Any:
        """A tensor carries its node."""
        value.edgewise_node = (self, node)
        return value

    def _known(self, value: Any) -> Any:
        """A tensor that has a node: the value itself, or what stands for a constant."""
        if getattr(value, "edgewise_node", (None,))[0] is self:
            return value
        if isinstance(value, FakeTensor) or value.device == _META:
            raise RuntimeError("a traced function uses a tensor without values that is not among its inputs")
        if id(value) not in self.known:
            name = f"constant{len(self.traced.constants)}"
            self.traced.constants[name] = value
            self.known[id(value)] = self._assign(_on_meta(value), self.traced.graph.create_node("get_attr", name))
        return self.known[id(value)]


_WRITTEN_OUT = (torch.ops.aten.lift_fresh.default, torch.ops.aten.detach_.default)
"""What `torch.tensor` does with the values that it is given."""
_META, _CPU = torch.device("meta"), torch.device("cpu")


def _on_meta(value: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
