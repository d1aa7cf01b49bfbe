"""Models whose weights are whole numbers, as tools that quantise in torch leave them: they stay so in artifacts, and the numbers
are those of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgewise
from edgewise.errors import InputError
from edgewise.exporter.digest import tensor_digest
from edgewise.passes.cleanup import CleanUp
from edgewise.targets import get

INPUT, HIDDEN = 64, 96


class Held(nn.Module):
    """A layer whose weight is held in whole numbers, with a scale for each row, for all, or none, as `kind` says."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs) / inputs**0.5
        scale = weight.abs().amax(None if kind == "one scale" else 1, keepdim=True) / 127
        code = (weight / scale).round()
        self.kind = kind
        if kind == "unsigned":
            code = code + 128
        self.register_buffer("weight", code.to(torch.uint8 if kind == "unsigned" else torch.int8))
        self.scale = nn.Parameter(scale)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "behind the product":
            return (x @ self.weight.t().to(torch.float32)) * self.scale.reshape(-1) + self.bias
        if self.kind == "unsigned":
            return F.linear(x, (self.weight.to(torch.float32) - 128) * self.scale, self.bias)
        if self.kind == "shared":
            wide = self.weight.to(torch.float32)
            return F.linear(x, wide * self.scale, self.bias) + 0 * wide.sum()
        return F.linear(x, self.weight.to(torch.float32) * self.scale, self.bias)


class Picture(nn.Module):
    """A convolution of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (24, 4, 4, 4), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(24, 1, 1, 1) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 4, 4, 4), self.weight.to(torch.float32) * self.scale).flatten(1)


def by_torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(INPUT, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, INPUT))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "torchao":
        return by_torchao().eval()
    if kind == "convolution":
        return Picture().eval()
    return nn.Sequential(Held(INPUT, HIDDEN, kind), nn.GELU(), Held(HIDDEN, INPUT, kind)).eval()


KINDS = ("a scale for each row", "one scale", "behind the product", "convolution", "shared", "torchao")
X = torch.randn(2, INPUT, generator=torch.Generator().manual_seed(3))


def lower(model: nn.Module, target: str, precision: str, folder: Path) -> list[Path]:
    program = edgewise.capture(model, (X,))
    names = {"input_names": list(program.inputs), "output_names": list(program.output_names)}
    folder.mkdir(exist_ok=True)
    return get(target).lower(program.exported, folder, "m", precision=precision, **names)


def error(model: nn.Module, target: str, files: list[Path]) -> float:
    with torch.no_grad():
        wanted = model(X).numpy()
    with get(target).load(files) as session:
        (found,) = session.run({session.inputs[0].name: X.numpy()}).values()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_core_ml_packages_keep_them(kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.coreml import legal

    model = make(kind)
    whole = lower(model, "coreml", precision, tmp_path / "whole")
    assert error(model, "coreml", whole) < (1e-6 if precision == "fp32" else 2e-3)
    layers = 1 if kind == "convolution" else 2
    assert (get("coreml").ops(whole) or {})["constexpr_affine_dequantize"] == layers
    # Without it coremltools multiplies them out, and says nothing.
    monkeypatch.setattr(legal, "keep_whole", lambda *_: None)
    dense = lower(model, "coreml", precision, tmp_path / "dense")
    assert "constexpr_affine_dequantize" not in (get("coreml").ops(dense) or {})
    sizes = [sum(one.stat().st_size for one in files if one.name == "weight.bin") for files in (whole, dense)]
    assert sizes[0] < sizes[1] * (0.4 if precision == "fp32" else 0.7)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "coreai"])
@pytest.mark.parametrize("kind", [*KINDS, "unsigned"])
def test_numbers_are_those_of_the_model(kind: str, target: str, tmp_path: Path) -> None:
    """To single precision: OpenVINO would round activations to eight bits, too, where it finds such weights."""
    model = make(kind)
    assert error(model, target, lower(model, target, "fp32", tmp_path)) < 2e-6


def test_a_package_of_unsigned_numbers_is_right(tmp_path: Path) -> None:
    model = make("unsigned")
    assert error(model, "coreml", lower(model, "coreml", "fp32", tmp_path)) < 1e-6


def test_openvino_files_keep_them(tmp_path: Path) -> None:
    files = lower(make("a scale for each row"), "openvino", "fp32", tmp_path)
    assert sum(one.stat().st_size for one in files if one.suffix == ".bin") < 1.2 * 2 * INPUT * HIDDEN


def test_wrapped_weights_are_looked_into() -> None:
    """torchao's tensors compute no sum and show no bytes: what they hold is checked, and told apart."""
    one, same, other = make("torchao"), make("torchao"), make("torchao")
    with torch.no_grad():
        other[0].weight.scale[3] *= 1.5
    first = tensor_digest(one[0].weight)
    assert first == tensor_digest(same[0].weight) != tensor_digest(other[0].weight)
    with torch.no_grad():
        other[0].weight.scale[3] = torch.nan
    with pytest.raises(InputError, match=r"weight 0\.weight of Sequential holds NaN"):
        edgewise.capture(other, (X,))


def test_other_constants_are_folded_as_ever() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("lookup", torch.arange(6, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.lookup.to(torch.float32) + torch.ones(6, 6, dtype=torch.bool).to(torch.float32)

    program = edgewise.capture(Masks(), (torch.randn(6, 6),))
    targets: list[Any] = [node.target for node in CleanUp()(program.exported).program.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten._to_copy.default not in targets and torch.ops.aten.to.dtype not in targets
