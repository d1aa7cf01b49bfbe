"""Tiny exported programs for tests of targets, each with its arguments and the outputs that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A program with one set of inputs and outputs, named `i0`, `i1`, ... and `o0`, `o1`, ..."""

    exported: torch.export.ExportedProgram
    feeds: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    @property
    def input_names(self) -> list[str]:
        return list(self.feeds)

    @property
    def output_names(self) -> list[str]:
        return list(self.expected)


class Block(nn.Module):
    """Patches, a class token, one pre-norm transformer block with an optional mask, and a head."""

    def __init__(self, approximate: str = "none", masked: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)
        self.approximate = approximate
        self.register_buffer("mask", torch.randn(1, 1, 17, 17) if masked else None)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norms[0](x)).reshape(1, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        x = x + self.out(attention.transpose(1, 2).reshape(1, 17, 32))
        x = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate=self.approximate))
        return x, self.head(x[:, 0])


class Merge(nn.Module):
    """What compression leaves in a graph: ranking with ties, gather, one-hot products and sums by index."""

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        kept = torch.topk(score + 0.01 * torch.arange(8), 4).indices  # torch leaves the order of ties open
        order = torch.argsort(score, dim=-1, descending=True, stable=True)
        taken = torch.gather(x, 1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        one_hot = (kept[:, :, None] == torch.arange(x.shape[1])).to(x.dtype)
        merged = torch.zeros(1, 4, x.shape[2]).scatter_add(1, (order % 4)[:, :, None].expand_as(x), x)
        best = torch.where(score > 0, score, torch.zeros_like(score)).argmax(-1)
        return taken, one_hot @ x, merged, torch.index_select(x, 1, torch.tensor([2, 0])), order, best


class Odd(nn.Module):
    """Inputs of several types, one of them unused; outputs that are given twice, are an input, or constant."""

    def forward(
        self, x: Tensor, unused: Tensor, ids: Tensor, mask: Tensor, *, scale: Tensor
    ) -> dict[str, Tensor]:
        y = F.softmax(x * scale, -1)
        return {
            "y": y,
            "same": y,
            "ids": ids + 1,
            "x": x,
            "any": mask.any(),
            "one": torch.ones(3),
            "not": ~mask,
        }


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2), bias=False)
        self.three = nn.Conv3d(2, 4, 2, stride=2, groups=2)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU()

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.act(self.one(x)), self.drop(self.two(y)), self.three(z).unflatten(1, (2, 2)).contiguous()


class Synonyms(nn.Module):
    """Ops that are others by another name, as captured models have them."""

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        both = (x > 0) & (x < 1) | (x < -1) ^ (x > 2)
        clipped = torch.where(both, x, -1.5) + torch.where(both, 0.25, x) + torch.where(both, 2.0, 3.0)
        return (
            1 - clipped,
            torch.argsort(x),
            ids.to(torch.float32),
            (ids & 3) * 2,
            ids.type_as(x),
            2 - ids,
            x[None].movedim(1, -1),
        )


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(2, 3)
        y[0] += x[1]
        return F.relu_(y).reshape(3, 2)


class Unknown(nn.Module):
    """An op that no target has a rule for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def case(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Case:
    module.eval()
    with torch.no_grad():
        exported = torch.export.export(module, args, kwargs, strict=False)
        outputs = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
    inputs = [*args, *kwargs.values()]
    return Case(
        exported,
        {f"i{number}": value.numpy() for number, value in enumerate(inputs)},
        {f"o{number}": value.numpy() for number, value in enumerate(outputs)},
    )


def block() -> Case:
    return case(Block(), torch.randn(1, 3, 16, 16))


def masked_block() -> Case:
    return case(Block("tanh", masked=True), torch.randn(1, 3, 16, 16))


def merge() -> Case:
    # Ties on purpose, the first and the last among them.
    score = torch.tensor([[1.0, 0.5, 1.0, -2.0, 0.5, 1.0, 0.5, 1.0]])
    return case(Merge(), torch.randn(1, 8, 5), score)


def odd() -> Case:
    ids, mask = torch.tensor([3, -1, 7, 0]), torch.tensor([True, False])
    return case(Odd(), torch.randn(2, 5), torch.randn(3), ids, mask, scale=torch.tensor([2.0]))


def convolutions() -> Case:
    return case(Convolutions(), torch.randn(1, 4, 9), torch.randn(1, 4, 5, 6), torch.randn(1, 2, 4, 4, 4))


def synonyms() -> Case:
    return case(Synonyms(), torch.randn(3, 4), torch.tensor([1, 6, -3]))


def in_place() -> Case:
    return case(InPlace(), torch.randn(2, 3))


CASES: dict[str, Callable[[], Case]] = {
    "block": block,
    "masked_block": masked_block,
    "merge": merge,
    "odd": odd,
    "convolutions": convolutions,
    "synonyms": synonyms,
    "in_place": in_place,
}
