"""Tracing against torch's own tracer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from edgewise.ops import bipartite_match, take
from edgewise.passes.realisations import REALISATIONS
from edgewise.passes.trace import Traced, trace

CLOSED_OVER = torch.tensor([[1.0], [2.0]])


def written_out(x: Tensor) -> Tensor:
    first = x.index_select(1, torch.tensor([0, 2], device=x.device))
    return first + x.index_select(1, torch.tensor([1, 3]).to(x.device)) * CLOSED_OVER + torch.zeros(1, device=x.device)


def factories(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    return torch.where(x > place, place[None, :], 7.0).softmax(-1) @ torch.full((x.shape[1], 2), 0.5)


def own_ops(x: Tensor) -> Tensor:
    kept, src, _ = bipartite_match(x[:, :, None].expand(-1, -1, 3), 2, 1)
    return take(x, torch.cat([kept, src], dim=1), 1, 0)


def realised(x: Tensor) -> Tensor:
    kept, _, into = REALISATIONS["bipartite_match"]["topk"](x[:, :, None] * torch.tensor([1.0, -1.0]), 2, 1)
    return kept.sum() + into


def run(traced: Traced, x: Tensor) -> Tensor:
    return torch.fx.GraphModule({k: v.clone() for k, v in traced.constants.items()}, traced.graph)(x)


@pytest.mark.parametrize("function", [written_out, factories, own_ops, realised])
def test_as_torch_traces(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 8)
    mode = FakeTensorMode()
    traced = trace(function, [mode.from_tensor(x)], mode)
    torch.testing.assert_close(run(traced, x), function(x))
    theirs = make_fx(function, pre_dispatch=True, tracing_mode="real")(x).graph
    theirs.eliminate_dead_code()
    skipped = {torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default, torch.ops.aten.detach.default}
    ops = [[n.target for n in graph.nodes if n.op == "call_function" and n.target not in skipped]
           for graph in (traced.graph, theirs)]
    assert ops[0] == ops[1]


def test_values_are_fake_and_of_the_right_shape() -> None:
    mode = FakeTensorMode()
    traced = trace(factories, [mode.from_tensor(torch.randn(2, 8))], mode)
    values = [n.meta["val"] for n in traced.graph.nodes if n.op == "call_function"]
    assert values[-1].shape == (2, 2) and all(v.device.type == "cpu" and v.fake_mode is mode for v in values)
    devices = [n.kwargs["device"] for n in traced.graph.nodes if "device" in n.kwargs]
    assert devices and all(device == torch.device("cpu") for device in devices)


@pytest.mark.parametrize("function", [lambda x: x.add_(1), lambda x: x[x > 0], lambda x: x * float(x.sum())])
def test_refused(function: Callable[[Tensor], Tensor]) -> None:
    mode = FakeTensorMode()
    with pytest.raises(RuntimeError):
        trace(function, [mode.from_tensor(torch.randn(4))], mode)
