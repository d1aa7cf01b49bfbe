"""Attention, found by its shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_families import capture
from torch import Tensor, nn

from edgewise.passes.anchors import Anchor, find_anchors
from edgewise.passes.graph import shape_of


class Attend(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        elif self.how == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "matmul":
            y = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
        elif self.how == "scaled_keys":
            y = (q @ (k * 0.3).mT).softmax(dim=3) @ v
        elif self.how == "einsum":
            y = torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).div(3).softmax(-1), v)
        elif self.how == "other_axis":
            y = (q @ k.transpose(-1, -2)).softmax(-2) @ v
        else:
            y = (q.mean(2, keepdim=True) * k).softmax(-1) + v
        return x + self.b(y.transpose(1, 2).flatten(2))


def anchors(module: nn.Module, **inputs: Any) -> list[Anchor]:
    return find_anchors(capture(module.eval(), inputs).base.graph)


@pytest.mark.parametrize("how", ["fused", "causal", "matmul", "scaled_keys", "einsum"])
def test_found(how: str) -> None:
    (anchor,) = anchors(Attend(how), x=torch.randn(1, 7, 12))
    assert anchor.fused is (how in ("fused", "causal")) and anchor.causal is (how == "causal")
    assert shape_of(anchor.q) == (1, 2, 7, 6) and shape_of(anchor.k)[anchor.key_axis] == 7
    assert anchor.residual is not None and anchor.residual.name == "x" and anchor.joined is not None
    if how == "fused":
        assert anchor.scale == 0.3


@pytest.mark.parametrize("how", ["other_axis", "gate"])
def test_not_taken_for_attention(how: str) -> None:
    assert anchors(Attend(how), x=torch.randn(1, 7, 12)) == []


def test_attention_without_residual() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe, self.inner = nn.Parameter(torch.randn(1, 1, 12)), nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.probe, x, x)[0]

    (anchor,) = anchors(Pool(), x=torch.randn(1, 7, 12))
    assert anchor.residual is None and shape_of(anchor.k)[anchor.key_axis] == 7


def test_every_block_of_a_stock_encoder() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    found = anchors(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), src=torch.randn(1, 7, 12))
    assert [a.index for a in found] == [0, 1, 2] and all(a.joined is not None for a in found)
