"""Programs in Apple's layout for the Neural Engine: the numbers of the program, and few transpositions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import build
from tiny_programs import Case, case
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.errors import InputError
from edgewise.passes.legalise import Legalise
from edgewise.targets.base import Lowering
from edgewise.targets.coreml import layout_math
from edgewise.verify import compare

pytest.importorskip("coremltools")

TARGET = targets.get("coreml-ane")


def ran(one: Case, folder: Path, precision: str = "fp32") -> tuple[float, dict[str, int]]:
    """The largest relative error of the package, and its ops."""
    files = TARGET.lower(
        one.exported, folder, "m", precision=precision, input_names=one.input_names, output_names=one.output_names
    )
    with TARGET.load(files) as session:
        outputs = session.run(one.feeds)
    errors = [compare(expected, outputs[name]).relative for name, expected in one.expected.items()]
    assert None not in errors
    made = TARGET.ops(files)
    assert made is not None
    return max(errors), made  # type: ignore[type-var]


def family(name: str, spec: str | None) -> Case:
    """A small model of a family, compressed and in ATen ops."""
    model, inputs = build(name, small=True)
    program = edgewise.capture(model, (), inputs)
    program = edgewise.compress(program, spec) if spec else program
    exported = Legalise(TARGET.realisations)(program.exported).program
    given = exported.module()(**inputs)
    outputs = torch.utils._pytree.tree_leaves(given)
    feeds = {f"i{i}": value.numpy() for i, value in enumerate(inputs.values())}
    return Case(exported, feeds, {f"o{i}": value.numpy() for i, value in enumerate(outputs)})


@pytest.mark.parametrize(
    ("name", "spec", "moved"),
    [
        # The keys of three attentions, the output, and what compression reads and gives: tokens, keys or scores.
        ("vit", "tome@encoder.block[1]:r=9", 3 + 1 + 3),
        ("dinov2", "topk@encoder.block[1]:keep=0.5", 3 + 1 + 4),
        ("ast", "tome@encoder.block[1]:r=9", 3 + 1 + 3),  # it transposes its input itself, and gives one row
        ("whisper", None, 3 + 1),
    ],
)
def test_a_family_computes_the_same_with_few_transpositions(
    name: str, spec: str | None, moved: int, tmp_path: Path
) -> None:
    error, ops = ran(family(name, spec), tmp_path)
    assert error <= 1e-5
    assert ops["transpose"] == moved
    # Two blocks' worth of heads each: scores and sums of values. Norms are fused again.
    assert ops["einsum"] == 3 * 2 * 2 and ops["layer_norm"] >= 7 and ops["conv"] >= 3 * 6 + 1
    assert "scaled_dot_product_attention" not in ops


def test_only_compression_and_outputs_ask_for_another_layout() -> None:
    from edgewise.targets.coreml.convert import quiet, reads
    from edgewise.targets.coreml.layout import lay_out
    from edgewise.targets.coreml.legal import legal

    with quiet():
        plain = lay_out(legal(family("vit", None).exported, reads))
        merged = lay_out(legal(family("vit", "tome@encoder.block[1]:r=9").exported, reads))
        turned = lay_out(legal(attention(lambda q, k, v: _by_hand(q, k, v)).exported, reads))
    assert [(move.of.name, move.why.op) for move in plain.moves] == [("layer_norm_6", "output")]
    assert len(merged.moves) == 4 and merged.strays == []
    assert {move.why.target for move in turned.strays} >= {torch.ops.aten.matmul.default}


def _by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention between linear layers, of which a part is another's to write."""

    def __init__(self, attend: Callable[..., Tensor], heads: int, width: int) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        normed = self.norm(x)
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (layer(normed).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return x + self.out(attended) * self.scale


def attention(attend: Callable[..., Tensor], batch: int = 2, tokens: int = 7, heads: int = 2, width: int = 8) -> Case:
    torch.manual_seed(0)
    return case(Attention(attend, heads, width).eval(), torch.randn(batch, tokens, width))


sdpa = F.scaled_dot_product_attention
MASKS: dict[str, Callable[..., Tensor]] = {
    "none": sdpa,
    "scale": lambda q, k, v: sdpa(q, k, v, scale=1.0),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "truths": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(7, 7, dtype=torch.bool).tril(2)),
    "constant for each head": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.arange(98.0).reshape(1, 2, 7, 7).sin()),
    "computed for keys": lambda q, k, v: sdpa(q, k, v, attn_mask=k.mean((1, 3))[:, None, None, :]),
    "computed for all": lambda q, k, v: sdpa(q, k, v, attn_mask=q @ k.transpose(-1, -2)),
    "computed truths": lambda q, k, v: sdpa(q, k, v, attn_mask=(k[:, :1, :, :1] > k[:, :1, :, :1].amin(2, True)).transpose(2, 3)),
    "other tokens": lambda q, k, v: sdpa(q, k[:, :, :3], v[:, :, :3]),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_with_any_mask(mask: str, tmp_path: Path) -> None:
    error, ops = ran(attention(MASKS[mask]), tmp_path)
    assert error <= 1e-5
    assert ops["einsum"] == 4 and ops["conv"] == 4


@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(1, 8, 2, 8), (8, 8, 8, 8), (3, 1, 1, 5), (2, 5, 1, 5)])
def test_sizes_that_could_be_taken_for_each_other(batch: int, tokens: int, heads: int, width: int, tmp_path: Path) -> None:
    error, ops = ran(attention(sdpa, batch, tokens, heads, width), tmp_path)
    assert error <= 1e-5 and ops["einsum"] == 2 * heads


class Written(nn.Module):
    """An expression of a linear layer's output `(2, 6, 24)`."""

    def __init__(self, expression: Callable[..., Any]) -> None:
        super().__init__()
        self.expression, self.first, self.last = expression, nn.Linear(24, 24), nn.Linear(24, 4)
        self.register_buffer("scale", torch.linspace(0.5, 2, 24))

    def forward(self, x: Tensor) -> Any:
        return self.expression(self, self.first(x))


def _heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.reshape(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "packed": lambda m, x: sdpa(*_heads(x)).transpose(1, 2).reshape(2, 6, 8),
    "chunks": lambda m, x: sdpa(*(part[:, None] for part in x.chunk(3, -1)))[:, 0],
    "pieces": lambda m, x: x.split([4, 20], -1)[1] * x.split([20, 4], -1)[0],
    "one token": lambda m, x: m.last(x[:, 1]),
    "last channels": lambda m, x: m.last(torch.cat([x[..., 20:], x[..., :20]], -1)),
    "mean": lambda m, x: (x.mean(1), x.mean(1, keepdim=True) + x, x.mean(-1)),
    "tokens joined": lambda m, x: m.last(torch.cat([x[:, :1], x[:, 2::2], m.scale.expand(2, 1, 24)], 1)),
    "spread": lambda m, x: m.last(x * m.scale + 2 - x[:, :1] / 3),
    "another order": lambda m, x: m.last((x.transpose(1, 2) * 2).transpose(1, 2)),
    "mixed tokens": lambda m, x: F.gelu(F.linear(x.transpose(1, 2), m.scale[:6].outer(m.scale[:6])), approximate="tanh"),
    "the same twice": lambda m, x: (x, x + x * x, x),
    "flat": lambda m, x: x.reshape(12, 24).cumsum(0),
    "two norms": lambda m, x: F.layer_norm(x, (24,)) + F.layer_norm(x, (6, 24)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values_are_followed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    error, _ = ran(case(Written(EXPRESSIONS[name]).eval(), torch.randn(2, 6, 24)), tmp_path)
    assert error <= 1e-5


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (nn.Linear(4, 4), torch.randn(2, 3, 5, 4), r"node linear.* is a linear layer over windows"),
        (nn.Conv2d(3, 4, 2), torch.randn(1, 3, 4, 4), "no linear layer of this program reads such"),
        (Written(lambda m, x: sdpa(x, x, x)), torch.randn(2, 6, 24), r"attention that is not \(batch, heads"),
    ],
    ids=["windows", "convolution", "attention without heads"],
)
def test_what_has_no_form_is_refused(module: nn.Module, x: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"target coreml-ane.*{message}"):
        ran(case(module.eval(), x), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "most"), [("fp16", 5e-3), ("w8a16", 5e-2), ("w4a16", 0.5)])
def test_lower_precisions(precision: str, most: float, tmp_path: Path) -> None:
    one = attention(sdpa, tokens=33, heads=4, width=64)
    error, ops = ran(one, tmp_path, precision)
    assert error <= most
    kind = {"w8a16": "constexpr_affine_dequantize", "w4a16": "constexpr_blockwise_shift_scale"}.get(precision)
    assert sum(count for name, count in ops.items() if name.startswith("constexpr")) == (4 if kind else 0)
    assert kind is None or ops[kind] == 4


def test_layers_keep_their_names_for_quantisation(tmp_path: Path) -> None:
    one = attention(sdpa, tokens=33, heads=4, width=64)
    names = {"input_names": one.input_names, "output_names": one.output_names}
    quantiser = TARGET.quantiser([], "w8a8", [one.feeds], made_of=Lowering(one.exported, **names))  # type: ignore[arg-type]
    assert quantiser.layers == ("query", "key", "value", "out")
    with TARGET.load(quantiser.write(tmp_path / "q", "m")) as session:
        error = compare(one.expected["o0"], session.run(one.feeds)["o0"]).relative
    assert error is not None and error <= 0.1


def test_half_precision_does_not_overflow_in_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Attention(sdpa, 2, 64).eval()
    x = torch.randn(1, 5, 64) * 300
    error, _ = ran(case(module, x), tmp_path, "fp16")
    assert error <= 5e-3


def test_shapes_are_matched_from_the_left() -> None:
    assert layout_math.matched((1, 17, 96), (1, 17, 3, 4, 8)) == [([0], [0]), ([1], [1]), ([2], [2, 3, 4])]
    assert layout_math.matched((2, 3), (6,)) == [([0, 1], [0])]
    assert layout_math.matched((2, 3), (3, 2)) == [([0, 1], [0, 1])]
    assert layout_math.matched((4,), (2, 3)) is None
    split = layout_math.reshaped((96,), (-1, -2, 0), (1, 17, 96), (1, 17, 3, 4, 8))
    assert split == ((3, 4, 8), (-1, -2, 0, 1, 2))
    assert layout_math.reshaped((2, 4), (-1, -2, 0, 1), (1, 17, 2, 4), (1, 17, 8)) == ((8,), (-1, -2, 0))
    assert layout_math.reshaped((2, 4), (-1, -2, 1, 0), (1, 17, 4, 2), (1, 17, 8)) is None
    assert layout_math.reshaped((8,), (-1, -2, 0), (1, 17, 8), (17, 8)) is None
    assert np.prod((1, 17, 8)) == np.prod((17, 8))
