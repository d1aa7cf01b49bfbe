"""A vision transformer written by hand, with names like nothing in any library, and many ways to be unusual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reference import Eager
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What a `Plain` is like. `tokens` are those besides the `prefix` leading constants."""

    tokens: int = 20
    width: int = 24
    heads: int = 2
    depth: int = 2
    batch: int = 1
    prefix: int = 1
    order: str = "pre"  # pre, post, parallel
    attend: str = "matmul"  # matmul, sdpa, sdpa3, einsum, einsum_heads_first, heads_first, bmm, baddbmm, gqa
    norm: str = "layer"  # layer, rms, written
    bias: bool = False
    rotary: bool = False
    mask: str = ""  # bool, float, padding: an input
    scale: bool = False
    skip: str = ""  # cat, add
    ends: str = "tokens"  # tokens, class, mean, grid, last, flat
    between: str = ""  # conv, pool, mix, flip, reversed: what stands between the blocks
    seq_first: bool = False


class WrittenNorm(nn.Module):
    """Root mean square norm spelled out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.foo2 = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.foo2


def catch_up(value: Tensor, then: Tensor, now: Tensor) -> Tensor:
    """Of tokens as they were `then`, those that are still there `now` (both name original tokens)."""
    return torch.stack([v[[a.tolist().index(i) for i in b.tolist()]] for v, a, b in zip(value, then, now, strict=True)])


def make_norm(kind: str, width: int) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": WrittenNorm}[kind](width)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    """Rotary positions on all tokens but the prefix. `x (B, H, N, D)`, tables `(N - prefix, D)` or batched."""
    head, rest = x[:, :, :prefix], x[:, :, prefix:]
    a, b = rest.chunk(2, dim=-1)
    rest = rest * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([head, rest], dim=2) if prefix else rest


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, count = shape.width, shape.tokens + shape.prefix
        groups = 1 if shape.attend == "gqa" else shape.heads
        self.foo1 = nn.Linear(width, width + 2 * groups * (width // shape.heads))
        self.bar1 = nn.Linear(width, width)
        self.baz1, self.baz2 = make_norm(shape.norm, width), make_norm(shape.norm, width)
        self.qux1, self.qux2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        if shape.bias:
            self.quux = nn.Parameter(torch.randn(shape.heads, count, count))
        if shape.scale:
            self.corge, self.grault = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        if shape.skip == "cat":
            self.garply = nn.Linear(2 * width, width)

    def attention(self, x: Tensor, tables: Any, mask: Tensor | None, state: Eager | None) -> Tensor:
        s = self.shape
        batch, count, width = x.shape
        d = width // s.heads
        groups = (self.foo1.out_features - width) // (2 * d)
        y = self.foo1(x)
        q, k, v = (
            t.reshape(batch, count, -1, d).transpose(1, 2) for t in y.split([width, groups * d, groups * d], dim=-1)
        )
        bias = self.quux if s.bias else None
        if tables is not None:
            q, k = rotate(q, *tables, s.prefix), rotate(k, *tables, s.prefix)
        if state is not None:
            full = None if bias is None else state.side(bias[None], (2, 3))
            if mask is not None:
                extra = state.side(mask.expand(batch, 1, *mask.shape[2:]), (3,) if mask.shape[2] == 1 else (2, 3))
                full = extra if full is None else full + extra
            return self.bar1(state.attention(q, k, v, d**-0.5, full).transpose(1, 2).reshape(batch, count, width))
        full = bias if mask is None else mask if bias is None else mask + bias
        if s.attend == "sdpa" or s.attend == "gqa":
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=full, enable_gqa=s.attend == "gqa")
        elif s.attend == "sdpa3":
            a = F.scaled_dot_product_attention(*(t.reshape(-1, count, d) for t in (q, k, v))).view(
                batch, s.heads, count, d
            )
        elif s.attend == "einsum":
            a = torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * d**-0.5).softmax(-1), v)
        elif s.attend == "einsum_heads_first":
            w = (torch.einsum("bhid,bhjd->hbij", q, k) * d**-0.5).softmax(-1)
            a = torch.einsum("hbij,bhjd->bhid", w, v)
        elif s.attend == "heads_first":
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            a = ((q @ k.transpose(-1, -2) * d**-0.5).softmax(-1) @ v).transpose(0, 1)
        elif s.attend == "bmm":
            q, k, v = (t.reshape(-1, count, d) for t in (q, k, v))
            a = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * d**-0.5).softmax(-1), v).view(batch, s.heads, count, d)
        elif s.attend == "baddbmm":
            q, k, v = (t.reshape(-1, count, d) for t in (q, k, v))
            logits = torch.baddbmm(bias.repeat(batch, 1, 1), q, k.transpose(1, 2), alpha=d**-0.5)
            a = torch.bmm(logits.softmax(-1), v).view(batch, s.heads, count, d)
        else:
            logits = q @ k.transpose(-1, -2) * d**-0.5
            if full is not None:
                logits = logits.masked_fill(~full, -torch.inf) if full.dtype == torch.bool else logits + full
            a = logits.softmax(-1) @ v
        return self.bar1(a.transpose(1, 2).reshape(batch, count, width))

    def mlp(self, x: Tensor) -> Tensor:
        return self.qux2(F.gelu(self.qux1(x)))

    def forward(self, x: Tensor, tables: Any, mask: Tensor | None, state: Eager | None, index: int) -> Tensor:
        s = self.shape

        def site(x: Tensor) -> Tensor:
            return x if state is None else state.between(index, x)

        first, second = (self.corge, self.grault) if s.scale else (1, 1)
        if s.order == "post":
            x = site(self.baz1(x + first * self.attention(x, tables, mask, state)))
            return self.baz2(x + second * self.mlp(x))
        if s.order == "parallel":
            y = self.baz1(x)
            return site(x + first * self.attention(y, tables, mask, state) + second * self.mlp(y))
        x = site(x + first * self.attention(self.baz1(x), tables, mask, state))
        return x + second * self.mlp(self.baz2(x))


class Plain(nn.Module):
    """Tokens in (already embedded), something out. `state` makes it the eager reference."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.state = shape, None
        width = shape.width
        self.waldo = nn.Linear(6, width)
        self.fred = nn.Parameter(torch.randn(1, shape.prefix, width)) if shape.prefix else None
        self.plugh = nn.Parameter(torch.randn(1, shape.tokens + shape.prefix, width))
        self.xyzzy = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.thud = make_norm(shape.norm, width)
        if shape.rotary:
            angles = torch.rand(shape.tokens, width // shape.heads // 2).mul(3).repeat(1, 2)
            self.register_buffer("hoge", angles.cos())
            self.register_buffer("piyo", angles.sin())
        if shape.between == "conv":
            self.fuga = nn.Conv1d(width, width, 3, padding=1, groups=width)
        if shape.between == "mix":
            self.fuga = nn.Linear(shape.tokens + shape.prefix, shape.tokens + shape.prefix)

    def join(self, x: Tensor, block: Any) -> Tensor:
        kind = self.shape.between
        if kind == "conv":
            return x + self.fuga(x.transpose(1, 2)).transpose(1, 2)
        if kind == "mix":
            return x + self.fuga(x.transpose(1, 2)).transpose(1, 2)
        if kind == "pool":
            return x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)
        if kind == "flip":
            return x + x.flip(1)
        if kind == "rolled":
            return x + x.roll(1, 1)
        if kind == "shift":
            return x + F.pad(x[:, 1:], (0, 0, 0, 1))
        if kind == "window":
            return x + x.unflatten(1, (-1, 3)).mean(2, keepdim=True).expand(-1, -1, 3, -1).flatten(1, 2)
        return x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        s, state = self.shape, self.state
        x = self.waldo(x)
        if self.fred is not None:
            x = torch.cat([self.fred.expand(len(x), -1, -1), x], dim=1)
        x = x + self.plugh
        skips: list[Tensor] = []
        then: Tensor | None = None
        mask = None if mask is None else mask[:, None, None] if s.mask == "padding" else mask[:, None]
        for index, block in enumerate(self.xyzzy):
            tables = None
            if s.rotary:
                tables = (self.hoge, self.piyo)
                if state is not None:
                    tables = tuple(state.side(t[None], (1,), s.prefix)[:, None] for t in tables)
            if s.skip and index == s.depth - 1:
                skip = (
                    skips[0]
                    if state is None or then is None or state.origin is None
                    else catch_up(skips[0], then, state.origin)
                )
                x = block.garply(torch.cat([x, skip], dim=-1)) if s.skip == "cat" else x + skip
            if index == 1:
                x = self.join(x, block)
            x = block(x, tables, mask, state, index)
            if index == 0:
                skips.append(x)
                then = None if state is None else state.origin
        x = self.thud(x)
        if state is not None:
            x = state.between("out", x)
        return self.end(x)

    def end(self, x: Tensor) -> Any:
        ends = self.shape.ends
        if ends == "class":
            return x[:, 0]
        if ends == "mean":
            return x[:, self.shape.prefix :].mean(1)
        if ends == "grid":
            side = round(self.shape.tokens**0.5)
            return F.avg_pool2d(x[:, self.shape.prefix :].transpose(1, 2).unflatten(2, (side, side)), 2)
        if ends == "last":
            return x[:, -1]
        if ends == "flat":
            return x.flatten(1) @ torch.ones(x.shape[1] * x.shape[2], 2)
        return x


def make(shape: Shape) -> tuple[Plain, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Plain(shape).eval().requires_grad_(False)
    for block in model.xyzzy:
        nn.init.normal_(block.foo1.weight, std=2 * shape.width**-0.5)
    inputs = {"x": torch.randn(shape.batch, shape.tokens, 6)}
    count = shape.tokens + shape.prefix
    if shape.mask == "bool":
        inputs["mask"] = (torch.rand(shape.batch, count, count) > 0.3) | torch.eye(count, dtype=torch.bool)
    elif shape.mask == "float":
        inputs["mask"] = torch.randn(shape.batch, count, count)
    elif shape.mask == "padding":
        inputs["mask"] = torch.arange(count) < torch.tensor([count - 3 - i for i in range(shape.batch)])[:, None]
    return model, inputs
