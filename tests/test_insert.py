"""Insertion: several methods in one program, stock torch layers, and time that grows with depth alone."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from handmade import Plain, Shape, make
from reference import Eager, relative_error
from test_families import capture
from torch import Tensor, nn

from edgewise.errors import EdgewiseError
from edgewise.passes.program import Program, compress

SHAPES = {
    "fused": Shape(tokens=24, attend="sdpa", depth=4),
    "unfused": Shape(tokens=24, depth=4),
    "masked": Shape(tokens=24, attend="sdpa", mask="float", batch=2, depth=4),
    "biased": Shape(tokens=24, bias=True, depth=4, batch=2, heads=4),
    "rotary": Shape(tokens=24, attend="sdpa", rotary=True, prefix=5, depth=4),
    "no_prefix": Shape(tokens=24, prefix=0, depth=4, attend="sdpa", batch=2),
    "post": Shape(tokens=24, order="post", depth=4),
    "gqa": Shape(tokens=24, attend="gqa", heads=4, depth=4, rotary=True, batch=2),
}
TOGETHER: dict[str, list[str]] = {
    "merge_then_drop_at_end": ["tome:keep=0.5", "topk:keep=4"],
    "drop_then_merge": ["topk@encoder.block[0]:keep=16", "tome@encoder.block[1:]:r=2"],
    "merge_drop_same_site": ["tome@encoder.block[1]:r=4", "topk@encoder.block[1]:keep=10"],
    "drop_merge_same_site": ["topk@encoder.block[1]:keep=20", "tome@encoder.block[1]:r=4"],
    "interleaved": [
        "tome@encoder.block[0]:r=3",
        "topk@encoder.block[1]:keep=15",
        "tome@encoder.block[2]:r=2",
        "topk@encoder.block[3]:keep=8",
        "topk@encoder.out:keep=5",
    ],
    "drop_drop": ["topk@encoder.block[0,1,2,3]:keep=0.7"],
    "published_r": ["tome:r=5"],
    "not_proportional": ["tome:r=4,prop_attn=off"],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("specs", TOGETHER)
def test_composition(shape: str, specs: str) -> None:
    model, inputs = prepared(shape)
    program = compress(PROGRAMS[shape], *TOGETHER[specs])
    plan: dict[int | str, list[tuple[str, int]]] = {}
    for step in program.steps:
        name = step.place.name
        plan.setdefault("out" if name.endswith("out") else int(name[:-1].rpartition("[")[2]), []).append(
            (step.method.name, step.tokens_out)
        )
    state = Eager(plan, model.shape.prefix, model.shape.prefix > 0, proportional=specs != "not_proportional")
    ours = program.module()(**inputs)
    model.state = state
    theirs = model(**inputs)
    model.state = None
    assert relative_error(ours, theirs) < 1e-5
    assert state.counts[-1] == program.sites[-1].tokens_out == program.steps[-1].tokens_out


MODELS: dict[str, tuple[Plain, dict[str, Tensor]]] = {}
PROGRAMS: dict[str, Program] = {}


def prepared(shape: str) -> tuple[Plain, dict[str, Tensor]]:
    if shape not in MODELS:
        model, inputs = make(SHAPES[shape])
        # In double precision: without a class token the order of nearly equal similarities decides on all that follows.
        model, inputs = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        MODELS[shape], PROGRAMS[shape] = (model, inputs), capture(model, inputs)
    return MODELS[shape]


class Stock(nn.Module):
    """A stack of `nn.TransformerEncoderLayer`, and the same in eager steps when it has a `state`."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, norm_first=norm_first) for _ in range(3)
        )
        self.batch_first, self.norm_first = batch_first, norm_first
        self.pos = nn.Parameter(torch.randn(14, 16))
        self.state: Eager | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.pos if self.batch_first else self.pos[:, None])
        for i, layer in enumerate(self.layers):
            x = layer(x) if self.state is None else self.step(x, layer, i, self.state)
        if self.state is not None:
            x = self.turn(self.state.between("out", self.turn(x)))
        return x

    def turn(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)

    def step(self, x: Tensor, layer: Any, index: int, state: Eager) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            y = self.turn(y)
            qkv = y @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias
            q, k, v = qkv.reshape(*y.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            out = state.attention(q, k, v, 8**-0.5).transpose(1, 2).flatten(2)
            return self.turn(layer.self_attn.out_proj(out))

        def site(y: Tensor) -> Tensor:
            return self.turn(state.between(index, self.turn(y)))

        def feed(y: Tensor) -> Tensor:
            return layer.linear2(layer.linear1(y).relu())

        if self.norm_first:
            x = site(x + attend(layer.norm1(x)))
            return x + feed(layer.norm2(x))
        x = site(layer.norm1(x + attend(x)))
        return layer.norm2(x + feed(x))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stock_layers(batch_first: bool, norm_first: bool, batch: int) -> None:
    torch.manual_seed(0)
    model = Stock(batch_first, norm_first).eval().double().requires_grad_(False)
    model.layers.train()  # the fast path of inference is one opaque op
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
        nn.init.normal_(layer.self_attn.in_proj_weight, std=0.5)
    inputs = {"x": torch.randn(*((batch, 14) if batch_first else (14, batch)), 16).double()}
    program = capture(model, inputs)
    for spec in ("tome:keep=0.5", "topk:keep=0.5", "topk@encoder.block[1]:keep=0.5"):
        compressed = compress(program, spec)
        assert compressed.sites[-1].tokens_out == 7
        plan = {
            ("out" if s.place.name.endswith("out") else int(s.place.name[-2])): [(s.method.name, s.tokens_out)]
            for s in compressed.steps
        }
        model.state = Eager(plan, 0, False)
        theirs = model(**inputs)
        model.state = None
        assert relative_error(compressed.module()(**inputs), theirs) < 1e-9, spec


def test_the_given_program_is_not_changed() -> None:
    model, inputs = prepared("fused")
    program = PROGRAMS["fused"]
    before = str(program.base.graph)
    compressed = compress(program, "tome:keep=0.5")
    assert str(program.base.graph) == before and program.sites[-1].tokens_out == 25
    assert str(compressed.uncompressed().exported.graph) == before
    torch.testing.assert_close(program.module()(**inputs), model(**inputs))


def test_specs_add_up() -> None:
    prepared("fused")
    once = compress(PROGRAMS["fused"], "tome:keep=0.5", "topk:keep=4")
    twice = compress(compress(PROGRAMS["fused"], "tome:keep=0.5"), "topk:keep=4")
    assert str(once.exported.graph) == str(twice.exported.graph)


def test_merging_under_a_causal_mask_is_refused() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.ModuleList(nn.Linear(12, 36) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.qkv:
                q, k, v = f(x)[:, None].chunk(3, -1)
                x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
            return x

    program = capture(Causal().eval(), {"x": torch.randn(1, 9, 12)})
    with pytest.raises(EdgewiseError, match=r"(?s)causal.*test_insert.py"):
        compress(program, "tome:r=2")
    with pytest.raises(EdgewiseError, match=r"(?s)causal.*test_insert.py"):
        compress(program, "topk@decoder.block[1]:keep=4")


def test_time_is_linear_in_depth() -> None:
    def best(depth: int) -> float:
        model, inputs = make(replace(Shape(tokens=20, attend="sdpa"), depth=depth))
        program = capture(model, inputs)
        times = []
        for _ in range(3):
            program.__dict__.pop("analysis", None)
            start = time.process_time()
            compress(program, "tome:keep=0.5")
            times.append(time.process_time() - start)
        return min(times)

    best(2)
    assert best(24) / best(12) < 2.6
