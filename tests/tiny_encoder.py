"""A tiny encoder with random weights, a class token and class scores, as the factory of `py:tiny_encoder:factory`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Encoder(nn.Module):
    """`image (B, 3, 32, 32)` to `logits (B, 10)`, by 64 tokens of 4 x 4 pixels in `blocks` blocks."""

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 64, width))
        self.blocks, self.head = nn.ModuleList(Block(width, 4) for _ in range(blocks)), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return 3 * self.head(x[:, 0])


def factory() -> tuple[nn.Module, tuple[Tensor]]:
    """The model, the same every time, and its example input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder().eval(), (torch.randn(1, 3, 32, 32),)
