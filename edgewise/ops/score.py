"""Scores: one number a token. Only the attention rows that a score needs are ever computed."""
from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None,
                   padding: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows over all keys, in at least fp32.

    Args:
        queries: `(B, H, Q, D)`, the rows that are wanted. keys: `(B, G, N, D)`, where G divides H (grouped queries).
        scale: factor on the logits. bias: added to the logits (float), or True where attended (bool).
        padding: `(B, N)`, true where a key only fills up the length: it has no part in the softmax, whatever it holds.

    Returns: `(B, H, Q, N)`.
    """
    if queries.dtype.itemsize < 4:
        queries, keys = queries.float(), keys.float()
    if keys.shape[1] != queries.shape[1]:
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries @ keys.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if padding is not None:
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    return logits.softmax(dim=-1)


def without_rows(attention: Tensor, padding: Tensor | None) -> Tensor:
    """Attention `(B, heads, Q, N)` with zeros in the rows that are `padding (B, Q)`, whatever they hold."""
    return attention if padding is None else attention.masked_fill(padding[:, None, :, None], 0)


def to_real(attention: Tensor, padding: Tensor | None) -> Tensor:
    """Attention `(B, heads, Q, N)` as if keys that are `padding (B, N)` had had no part in its softmax."""
    if padding is None:
        return attention
    attention = wide(attention).masked_fill(padding[:, None, None], 0)
    return attention / attention.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)


def wide(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x.float() if x.dtype.itemsize < 4 else x


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 in at least fp32; a zero vector stays zero, and is similar to nothing."""
    x = wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def attention_received(rows: Tensor, padding: Tensor | None = None) -> Tensor:
    """Mean attention `(B, N)` that each key receives, over heads and query rows `(B, H, Q, N)`, without the rows that are
    `padding (B, Q)`."""
    if padding is None:
        return rows.mean(dim=(1, 2))
    real = (~padding).to(rows.dtype)[:, None]
    return (real @ rows.mean(dim=1) / real.sum(dim=-1, keepdim=True).clamp_min(1))[:, 0]


def blank(x: Tensor, padding: Tensor | None) -> Tensor:
    """`x (B, N, C)` with zeros in place of padding `(B, N)`: a weight of zero would not keep a NaN in it from the others."""
    return x if padding is None else x.masked_fill(padding[:, :, None], 0)


def with_real(padding: Tensor, tail: int) -> Tensor:
    """`padding (B, N)` for the same tokens with `tail` real ones behind them."""
    return torch.cat([padding, torch.zeros_like(padding[:, :1]).expand(-1, tail)], dim=1) if tail else padding


def hide_padding(score: Tensor, padding: Tensor | None) -> Tensor:
    """A score `(B, N)` that puts padding `(B, N)` behind every real token."""
    return score if padding is None else score.masked_fill(padding, -torch.inf)
