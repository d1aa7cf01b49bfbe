"""What capture makes of a call: flags in it are settled, and ops of several names have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgewise
from edgewise.exporter.capture import capture, from_exported


class Flagged(nn.Module):
    """A call with flags and sizes among its tensors, at all places."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, double: bool, x: Tensor, pair: Any, *, more: Any = None, scale: float = 1.0) -> Tensor:
        y = torch.concat([self.linear(x), torch.multiply(pair[1], scale)], -1)
        y = torch.subtract(y, more["shift"]) if more is not None else y
        return torch.swapaxes(y * 2 if double else y, 0, 1)


X, Y, Z = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 8)
CALLS = {
    "all": ((True, X, (7, Y)), {"more": {"shift": Z, "unused": None}, "scale": 0.5}),
    "few": ((False, X, [None, Y]), {}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("saved", [False, True])
def test_flags_are_no_inputs(name: str, saved: bool, tmp_path: Path) -> None:
    args, kwargs = CALLS[name]
    model = Flagged().eval()
    if saved:
        torch.export.save(torch.export.export(model, args, kwargs, strict=False), tmp_path / "m.pt2")
        program = from_exported(torch.export.load(tmp_path / "m.pt2"))
    else:
        program = capture(model, args, kwargs)
    tensors = [X, Y, Z] if name == "all" else [X, Y]
    assert [v.shape for v in program.inputs.values()] == [t.shape for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(program.inputs.values(), tensors, strict=True))
    placeholders = [n.name for n in program.base.graph.nodes if n.op == "placeholder"]
    assert set(program.inputs) | {n for n in placeholders if n.startswith("p_")} == set(placeholders)
    left, named = program.base.example_inputs
    torch.testing.assert_close(program.base.module()(*left, **named), model(*args, **kwargs))


def test_ops_have_one_name() -> None:
    args, kwargs = CALLS["all"]
    targets = {str(n.target) for n in capture(Flagged(), args, kwargs).base.graph.nodes}
    assert {"aten.cat.default", "aten.sub.Tensor", "aten.transpose.int"} <= targets
    assert not {t for t in targets if "concat" in t or "multiply" in t or "subtract" in t or "swap" in t}


class Parted(nn.Module):
    """A batch as a list for a while: of all samples in order along one dimension, or not."""

    def __init__(self, dim: int, order: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.order = dim, order

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.unbind(x * 2, 1)
        return torch.stack([parts[i] for i in self.order], self.dim)


@pytest.mark.parametrize(
    ("dim", "order", "gone"),
    [(1, (0, 1, 2), True), (-2, (0, 1, 2), True), (0, (0, 1, 2), False), (1, (0, 2, 1), False), (1, (0, 1), False)],
)
def test_what_is_parted_and_joined_is_left_whole(dim: int, order: tuple[int, ...], gone: bool) -> None:
    model, x = Parted(dim, order), torch.randn(3, 3, 4)
    program = capture(model, (x,))
    targets = {str(n.target) for n in program.base.graph.nodes}
    assert ("aten.stack.default" not in targets) == ("aten.unbind.int" not in targets) == gone
    torch.testing.assert_close(program.base.module()(x), model(x))


class Squeezed(nn.Module):
    """Of what is squeezed some is of size one, or nothing is."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return y.squeeze(0), y.squeeze(1), y.squeeze((0, -2)), y.squeeze(), y[:, 0].squeeze()


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 2, 3), (1, 1, 3), (1, 2, 3)])
def test_only_what_is_of_size_one_is_squeezed(shape: tuple[int, ...], tmp_path: Path) -> None:
    """torch leaves alone what is not, and ONNX and Core AI refuse it."""
    model, x = Squeezed(), torch.randn(shape)
    for node in capture(model, (x,)).base.graph.nodes:
        if node.target in (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims):
            dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
            assert dims and all(node.args[0].meta["val"].shape[dim] == 1 for dim in dims)
        assert node.target is not torch.ops.aten.squeeze.default
    bundle = edgewise.export(model, tmp_path / "b", example={"x": x}, targets=["onnxruntime"])
    with edgewise.load(bundle) as loaded:
        found = list(loaded.run({"x": x.numpy()}).values())
    for one, wanted in zip(found, model(x), strict=True):
        assert one.shape == tuple(wanted.shape)
        np.testing.assert_allclose(one, wanted.numpy())


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_flags_through_an_export(target: str, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=48, patch_size=8)).eval()
    example = {"pixel_values": torch.randn(1, 3, 32, 32), "interpolate_pos_encoding": True}
    bundle = edgewise.export(model, tmp_path / "b", example=example, targets=[target], compress="topk:keep=0.5")
    assert [one.name for one in bundle.manifest.components[0].inputs] == ["pixel_values"]
    assert [(s.tokens_in, s.tokens_out) for s in bundle.manifest.components[0].sites if s.tokens_in != s.tokens_out] == [(17, 9)]
