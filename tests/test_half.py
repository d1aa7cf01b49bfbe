"""Half-precision storage: what is rounded, once, and stored by every target without loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgewise
from edgewise.exporter.half import rounded
from edgewise.passes.graph import parameters_of
from edgewise.targets.half import HALVE_FROM, as_half

COUNT = HALVE_FROM // 4


def exact(size: int = COUNT) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(np.float16).astype(np.float32)


def test_what_is_exact_and_large_is_stored_in_half_precision() -> None:
    half = as_half(exact())
    assert half is not None and half.dtype == np.float16 and np.array_equal(half.astype(np.float32), exact())
    subnormal = as_half(np.full(COUNT, 2.0**-24, np.float32))
    assert subnormal is not None and (subnormal > 0).all()


@pytest.mark.parametrize(
    "array",
    [
        exact(COUNT - 1),
        exact() + np.float32(1e-6),
        np.full(COUNT, 65536, np.float32),
        np.full(COUNT, -np.inf, np.float32),
        np.full(COUNT, np.nan, np.float32),
        exact().astype(np.float64),
        np.arange(COUNT),
    ],
    ids=["small", "inexact", "large", "infinite", "nan", "float64", "int64"],
)
def test_all_else_stays(array: np.ndarray) -> None:
    assert as_half(array) is None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.tied = nn.Linear(16, 64, bias=False)
        self.tied.weight = self.up.weight
        self.register_buffer("positions", torch.arange(2048.0, 4096.0))
        self.register_buffer("mask", torch.full((16, 64), torch.finfo(torch.float32).min))
        self.register_buffer("table", torch.randn(16, 64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # All of a row is masked, which is no mask at all.
        hidden = torch.softmax(self.mask, -1) + self.table + self.up(x) + self.tied(x)
        return self.down(hidden) + self.positions[:16]


def test_a_program_is_rounded() -> None:
    torch.manual_seed(0)
    exported = torch.export.export(Model().eval(), (torch.randn(16, 16),))
    before = {name: tensor.clone() for name, tensor in parameters_of(exported).items()}
    half = rounded(exported)
    tensors = parameters_of(half)
    changed = {name for name in tensors if not torch.equal(tensors[name], before[name])}
    assert changed == {"p_up_weight", "p_down_weight", "b_table"} | ({"p_tied_weight"} & set(tensors))
    for name in changed:
        assert torch.equal(tensors[name], before[name].half().float())
        assert as_half(tensors[name].detach().numpy()) is not None
    assert half.state_dict["up.weight"] is half.state_dict["tied.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters_of(exported).items())
    x = torch.randn(16, 16)
    assert torch.allclose(half.module()(x), exported.module()(x), atol=0.1)
    assert all(tensor is tensors[name] for name, tensor in parameters_of(rounded(half)).items())


def test_artifacts_in_half_precision_are_as_near_as_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32)).eval()
    model[0].weight.data[1, 1] = 1e5  # more than half precision holds
    bundle = edgewise.export(
        model,
        tmp_path / "b",
        example=(torch.randn(1, 32),),
        targets=["openvino", "onnxruntime"],
        precision="fp16",
        cache=False,
    )
    rungs = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    assert len(rungs) == 2
    for rung in rungs:
        assert rung.threshold == 1e-4
        assert all(errors.relative is not None and errors.relative < 1e-5 for errors in rung.outputs.values())
