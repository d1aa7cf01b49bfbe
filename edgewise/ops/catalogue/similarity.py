"""Similarity methods for encoders: tokens that are alike are merged or dropped."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgewise.ops.match import bipartite_match, represent
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, assign, drop, method
from edgewise.ops.order import order_tokens
from edgewise.ops.reduce import divisor, merge_real, take
from edgewise.ops.score import blank, hide_padding, unit
from edgewise.ops.select import top_tokens

R = Parameter("r", None, "tokens merged away at every block, or a list [r0,r1,...] with one number for each block")
SCHEDULE = Parameter("schedule", "constant", "how r (or the removal that keep asks for) is spread over the blocks",
                     ("constant", "increasing", "decreasing"))
PROP_ATTN = Parameter("prop_attn", True, "add log(size) to later attention logits (off for models trained with merging)")


@method(
    name="tome", summary="Token merging: the most similar pairs become size-weighted means, at every block.",
    mechanism="similarity", modalities=("image", "video", "audio"), sites=("block", "out"), needs=("keys",),
    paper="Token Merging: Your ViT But Faster (ICLR 2023), arXiv 2210.09461", every_block=True, merges=True, halves=True,
    keeps_order=False, pads=True,
    limits="At most half of the unprotected tokens go at one site; r beyond that is clipped at later blocks, as published.",
    parameters=(KEEP, R, SCHEDULE, PROP_ATTN),
)
def _tome(t: Tokens, keep: int, **_: Any) -> Reduced:
    assert t.keys is not None
    padding = () if t.padding is None else (t.padding,)
    matched, src, into = bipartite_match(t.keys, t.free - keep, t.protected, *padding)
    tokens, size = merge_real(t.tokens, t.size, matched, src, into, t.padding)
    kept = represent(matched, src, into, t.padding)
    return Reduced(tokens, size, kept, lambda: assign(t.count, matched, src, into))


@method(
    name="tofu", summary="Token fusion: the matching of tome; early blocks prune the matched token, later ones "
                         "merge it and keep the largest norm.",
    mechanism="similarity", modalities=("image", "video", "audio"), sites=("block", "out"), needs=("keys",),
    paper="Token Fusion: Bridging the Gap between Token Pruning and Token Merging (WACV 2024), arXiv 2312.01026",
    every_block=True, merges=True, halves=True, keeps_order=False, pads=True,
    limits="As tome. A token counts all that were fused into it, pruned ones too.",
    parameters=(
        KEEP, R, SCHEDULE, PROP_ATTN,
        Parameter("switch", 0.5, "where merging takes over from pruning: a share of the blocks if below 1 (or 1.0), else a "
                  "number of blocks", least=0),
        Parameter("mode", "auto", "prune: what is matched goes; mlerp: it is merged, and the largest norm kept; auto: by the "
                  "block, mlerp where there is none", ("auto", "prune", "mlerp")),
    ),
)
def _tofu(t: Tokens, keep: int, switch: float = 0.5, mode: str = "auto", **_: Any) -> Reduced:
    assert t.keys is not None
    padding = () if t.padding is None else (t.padding,)
    matched, src, into = bipartite_match(t.keys, t.free - keep, t.protected, *padding)
    kept = represent(matched, src, into, t.padding)
    if mode == "auto":
        block, blocks = t.block or (1, 1)
        first = switch * blocks if isinstance(switch, float) and switch <= 1 else switch
        mode = "prune" if block < first else "mlerp"
    if mode == "prune":
        tokens = take(t.tokens, kept, 1, 0)
        size = merge_real(t.tokens[:, :, :1], t.size, matched, src, into, t.padding)[1]
    else:
        tokens, size = merge_real(t.tokens, t.size, matched, src, into, t.padding)
        tokens = _largest_norm(t, tokens, matched, src, into)
    return Reduced(tokens, size, kept, lambda: assign(t.count, matched, src, into))


def _largest_norm(t: Tokens, merged: Tensor, kept: Tensor, src: Tensor, into: Tensor) -> Tensor:
    """Merged tokens with the largest norm that a real one of those in them has. What nothing was merged into stays as it is."""
    if not src.shape[1]:
        return take(t.tokens, kept, 1, 0)
    wide = torch.promote_types(merged.dtype, torch.float32)
    norm = t.tokens.to(wide).norm(dim=-1, keepdim=True)
    if t.padding is not None:
        norm = norm.masked_fill(t.padding[:, :, None], 0)
    own, others = take(norm, kept, 1, 0), take(norm, src, 1, 0)
    place = torch.arange(kept.shape[1], device=norm.device, dtype=torch.float32)
    mine = place[:, None] == into.to(torch.float32)[:, None, :]
    largest = torch.maximum(own, torch.where(mine, others.transpose(1, 2), 0.0).amax(dim=-1, keepdim=True))
    fused = (mine.to(torch.float32).amax(dim=-1, keepdim=True) > 0) & (largest > 0)
    now = merged.to(wide)
    scaled = now * (largest / now.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return torch.where(fused, scaled.to(merged.dtype), take(t.tokens, kept, 1, 0))


@method(
    name="dpcknn", summary="Density peaks clustering: each of the clusters becomes the size-weighted mean of its tokens.",
    mechanism="similarity", modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=(),
    paper="Chat-UniVi (CVPR 2024), arXiv 2311.08046; Study on density peaks clustering based on k-nearest neighbors (2016)",
    merges=True, keeps_order=False, pads=True,
    limits="No random noise on the density: of equally dense tokens the first counts as the denser. Clusters come by falling "
           "score of their centres, as published.",
    parameters=(KEEP, Parameter("k", 5, "nearest neighbours that make the density, the token itself included", least=1)),
)
def _dpcknn(t: Tokens, keep: int, k: int = 5, **_: Any) -> Reduced:
    x = t.tokens[:, t.protected:]
    batch, count, width = x.shape
    padding = None if t.padding is None else t.padding[:, t.protected:]
    wide = blank(x.to(torch.promote_types(x.dtype, torch.float32)), padding)
    real = None if padding is None else ~padding
    distance = _distances(wide) / width ** 0.5
    between = distance if real is None else distance.masked_fill(~(real[:, :, None] & real[:, None, :]), 0.0)
    farthest = between.amax(dim=(1, 2), keepdim=True)
    if padding is not None:  # as far from all as nothing real is
        distance = torch.where(padding[:, None, :], farthest + 1, distance)
    near = distance.topk(min(k, count), dim=-1, largest=False).values
    density = (-near.square().mean(dim=-1)).exp()
    if padding is not None:
        density = density.masked_fill(padding, -1.0)
    place = torch.arange(count, device=x.device, dtype=torch.float32)
    mine, other = density[:, :, None], density[:, None, :]
    denser = (other > mine) | ((other == mine) & (place < place[:, None]))
    score = torch.where(denser, distance, farthest).amin(dim=-1) * density
    centre = order_tokens(hide_padding(score, padding), keep)
    # The nearest centre, the first of several; a centre belongs to itself.
    row = take(distance.transpose(1, 2), centre, 2, 0).transpose(1, 2)
    number = torch.arange(keep, device=x.device, dtype=torch.float32)[:, None]
    nearest = torch.where(row == row.amin(dim=1, keepdim=True), number, float(keep)).amin(dim=1)
    own = (centre.to(torch.float32)[:, :, None] == place).to(torch.float32)
    cluster = torch.where(own.sum(dim=1) > 0, (own * number).sum(dim=1), nearest)
    share = (cluster[:, None, :] == number).to(wide.dtype)
    if t.size is not None:
        share = share * t.size[:, t.protected:].to(wide.dtype).transpose(1, 2)
    if padding is not None:
        share = share.masked_fill(padding[:, None, :], 0)
    total = share.sum(dim=-1, keepdim=True)
    weight = share / (total if padding is None else divisor(total))
    tokens, size = (weight @ wide).to(x.dtype), total.to(x.dtype)
    kept = centre + t.protected
    if t.protected:
        head = t.tokens[:, :t.protected]
        tokens = torch.cat([head, tokens], dim=1)
        size = torch.cat([torch.ones_like(head[:, :, :1]) if t.size is None else t.size[:, :t.protected], size], dim=1)
        kept = torch.cat([torch.arange(t.protected, device=x.device).expand(batch, -1), kept], dim=1)

    def assignment() -> Tensor:
        where = cluster.to(torch.int64) + t.protected
        if padding is not None:  # padding is in no cluster but the one that it had to be the centre of
            where = where.masked_fill(padding & (own.sum(dim=1) == 0), -1)
        return torch.cat([torch.arange(t.protected, device=x.device).expand(batch, -1), where], dim=1)

    return Reduced(tokens, size, kept, assignment)


def _distances(x: Tensor) -> Tensor:
    """Euclidean distances `(B, N, N)` of `x (B, N, C)`, zero between equal tokens."""
    x = x - x.mean(dim=1, keepdim=True)  # the smaller the numbers, the less is lost in the differences
    product = x @ x.transpose(1, 2)
    place = torch.arange(x.shape[1], device=x.device)
    square = torch.where(place[:, None] == place, product, 0.0).sum(dim=-1)
    return (square[:, :, None] + square[:, None, :] - 2 * product).clamp_min(0).sqrt()


@method(
    name="text-topk", summary="Keep the tokens that are most like the text: cosine with its embedding.",
    mechanism="query", modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=("text",),
    paper="", pads=True,
    limits="The text must have as many features as the tokens (a joint embedding).",
    parameters=(KEEP, Parameter("over", "mean", "over several text tokens: mean or max of the cosines", ("mean", "max"))),
)
def _text_topk(t: Tokens, keep: int, over: str = "mean", **_: Any) -> Reduced:
    cosine = text_cosines(t)
    score = cosine.mean(dim=-1) if over == "mean" else cosine.amax(dim=-1)
    return drop(t, top_tokens(hide_padding(score, t.padding), keep, t.protected))


def text_cosines(t: Tokens) -> Tensor:
    """Cosine `(B, N, T)` of every token (its image embedding, where that is given as keys) with every text token."""
    assert t.text is not None
    compared = t.tokens if t.keys is None else t.keys
    if t.text.ndim != 2 or t.text.shape[1] != compared.shape[2]:
        raise ValueError(f"the text is {tuple(t.text.shape)}, and must be (T, {compared.shape[2]}) to be compared with the tokens")
    pictured = unit(compared)
    return pictured @ unit(t.text).to(pictured.dtype).t()
