"""Methods that keep the most important tokens and fold the others into further tokens of their own."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.catalogue.attention import SCORE, importance, keep_is_needed, prefix
from edgewise.ops.match import first_best
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, assign, drop, method
from edgewise.ops.order import order_tokens, rank_tokens
from edgewise.ops.reduce import divisor, take
from edgewise.ops.score import attention_received, attention_rows, blank, hide_padding, unit, wide, without_rows
from edgewise.ops.select import mark, top_tokens

Grid = tuple[int, ...]


# -- context tokens


def _zip_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    most = free - parameters["context"]
    if most < 1:
        raise ValueError(f"context={parameters['context']} is out of range: 0 to {free - 1} for {free} tokens")
    return {n: {} for n in range(1, most + 1)}


CONTEXT = Parameter("context", 10, "context tokens that the others are folded into", least=0)


@method(
    name="visionzip", summary="Keep the tokens that most attention goes to, and fold the others into a few context tokens.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("block", "out", "projector"),
    needs=("attention", "keys"), pads=True, keeps_order=False, paper="VisionZip (CVPR 2025), arXiv 2412.04467",
    limits="keep counts the dominant tokens without the context tokens. Every step-th of the others is a context token; a context "
           "token is the sum of itself and the mean of those most like it, as published.",
    parameters=(KEEP, CONTEXT, SCORE), count=keep_is_needed, legal_counts=_zip_counts,
    extra=lambda parameters: int(parameters["context"]),
)
def _visionzip(t: Tokens, keep: int, context: int = 10, score: str = "auto", **_: Any) -> Reduced:
    return _zip(t, hide_padding(importance(t, score), t.padding), keep, context, 1)


def _frame_zip_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    assert frames is not None
    return {frames * n: {} for n in _zip_counts(free // frames, grid, None, parameters)}


def _frame_zip_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    most = max(_zip_counts(free // frames, grid, None, parameters))
    if parameters["per_frame"] > most:
        raise ValueError(f"per_frame={parameters['per_frame']} is out of range: 1 to {most} for {free // frames} tokens")
    return frames * int(parameters["per_frame"])


@method(
    name="frame-visionzip", summary="VisionZip on each frame: its dominant tokens, then its context tokens, frame after frame.",
    mechanism="attention", modalities=("video",), sites=("block", "out", "projector"), needs=("attention", "keys", "frames"),
    keeps_order=False, paper="VisionZip (CVPR 2025), arXiv 2412.04467, on each frame",
    limits="keep counts the dominant tokens of all frames, and is a multiple of the number of frames; context counts those of one.",
    parameters=(
        KEEP,
        Parameter("per_frame", 54, "dominant tokens of each frame, where keep is not given", least=1),
        CONTEXT,
        SCORE,
    ),
    count=_frame_zip_count, legal_counts=_frame_zip_counts,
    extra=lambda parameters: int(parameters["context"]) * int(parameters["frames"]),
)
def _frame_visionzip(t: Tokens, keep: int, context: int = 10, score: str = "auto", **_: Any) -> Reduced:
    assert t.frames is not None
    return _zip(t, importance(t, score), keep, context, t.frames)


def _zip(t: Tokens, score: Tensor, keep: int, context: int, groups: int) -> Reduced:
    """VisionZip on each of `groups` equal stretches of the unprotected tokens. Where there are sizes, the mean is weighted by
    them."""
    batch, count, dominant = t.tokens.shape[0], t.free // groups, keep // groups

    def apart(v: Tensor) -> Tensor:
        return v[:, t.protected:].reshape(batch * groups, count, *v.shape[2:])

    def together(v: Tensor) -> Tensor:
        return v.reshape(batch, -1, *v.shape[2:])

    def inside(place: Tensor, each: int) -> Tensor:
        """Places `(B groups, K)` in stretches of `each` tokens, as places `(B, groups K)` behind the protected."""
        start = torch.arange(t.protected, t.protected + groups * each, each, device=place.device)[:, None]
        return (place.reshape(batch, groups, -1) + start).reshape(batch, -1)

    best = top_tokens(apart(score), dominant, 0)
    if not context:
        return drop(t, torch.cat([*prefix(t), inside(best, count)], dim=1))
    assert t.keys is not None
    x, metric, size = apart(t.tokens), unit(apart(t.keys)), None if t.size is None else apart(t.size)
    padding = None if t.padding is None else apart(t.padding)
    targets = _targets(mark(best, count), dominant, context, padding)
    index = torch.cat([best, targets], dim=1)
    similar = metric @ take(metric, targets, 1, 0).transpose(1, 2)
    folded = ~mark(index, count)
    if padding is not None:
        folded = folded & ~padding
    nearest = first_best(similar)
    chosen = (nearest[:, None] == torch.arange(context, device=x.device)[:, None]) & folded[:, None]
    weight = chosen.to(wide(x).dtype)
    if size is not None:
        weight = weight * size.to(weight.dtype).transpose(1, 2)
    total = weight.sum(dim=-1, keepdim=True)
    mean = weight @ blank(wide(x), padding) / divisor(total)
    contexts = (wide(take(x, targets, 1, 0)) + mean).to(x.dtype)
    tokens = _behind(t.tokens, t.protected, together(torch.cat([take(x, best, 1, 0), contexts], dim=1)))
    if size is not None and t.size is not None:
        size = torch.cat([take(size, best, 1, 0), take(size, targets, 1, 0) + total.to(size.dtype)], dim=1)
        size = _behind(t.size, t.protected, together(size))
    kept = torch.cat([*prefix(t), inside(index, count)], dim=1)

    def assignment() -> Tensor:
        where = torch.where(chosen.any(dim=1), nearest + dominant, assign(count, index))
        return torch.cat([*prefix(t), inside(where, index.shape[1]).masked_fill(together(where) < 0, -1)], dim=1)

    return Reduced(tokens, size, kept, assignment)


def _behind(whole: Tensor, protected: int, x: Tensor) -> Tensor:
    """`x` behind the protected of `whole`."""
    return torch.cat([whole[:, :protected], x], dim=1) if protected else x


def _targets(taken: Tensor, dominant: int, context: int, padding: Tensor | None) -> Tensor:
    """Every step-th token that is not `taken (B, N)`, with the step that spreads `context` of them over all real ones:
    `(B, context)`."""
    count = taken.shape[1] - dominant
    last = -taken.to(torch.float32)
    if padding is None:
        step = max(1, count // context)
        return order_tokens(last, step * (context - 1) + 1)[:, ::step]
    free = order_tokens(2 * last - padding.to(torch.float32), count)
    # Counted in float: OpenVINO (2026.4) goes wrong where it fuses an addition into a sum of integers.
    real = (~taken & ~padding).to(torch.float32).sum(dim=-1, keepdim=True)
    places = (real / context).floor().clamp_min(1) * torch.arange(context, device=taken.device)
    return take(free, places.to(torch.int64), 1, 0)


# -- clusters by attention


def _prumerge_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    most = free - parameters["uniform"] - 1
    if most < 1:
        raise ValueError(f"uniform={parameters['uniform']} is out of range: 0 to {free - 2} for {free} tokens")
    return {n: {} for n in range(1, most + 1)}


@method(
    name="prumerge", summary="Keep the tokens that most attention goes to, add to each what is like it, and one token of the rest.",
    mechanism="attention", modalities=("image",), sites=("block", "out"), needs=("queries", "keys"), pads=True,
    keeps_order=False, represented=False, paper="LLaVA-PruMerge and PruMerge+ (ICCV 2025), arXiv 2403.15388",
    limits="The ratio is fixed, instead of found in the outliers of every image. Attention is computed over all heads at once, as "
           "published. Spatially uniform samples that are chosen already are made up for by the next in attention. The last token "
           "is none of the inputs, so what has one entry for each token cannot follow.",
    parameters=(
        KEEP,
        Parameter("uniform", 0, "spatially uniform samples that are kept besides (PruMerge+: as many as keep)", least=0),
        Parameter("neighbours", 32, "most similar tokens that are added to each kept one, weighted by their attention", least=0),
    ),
    count=keep_is_needed, legal_counts=_prumerge_counts, extra=lambda parameters: int(parameters["uniform"]) + 1,
)
def _prumerge(t: Tokens, keep: int, uniform: int = 0, neighbours: int = 32, **_: Any) -> Reduced:
    """Order: by falling attention, then the uniform samples in order, then the sum of all others, each weighted by its
    attention."""
    assert t.keys is not None
    attention = _single_head(t)[:, t.protected:]
    padding = None if t.padding is None else t.padding[:, t.protected:]
    score = hide_padding(attention, padding)
    kept = order_tokens(score, keep)
    if uniform:
        kept = torch.cat([kept, _uniform(score, padding, keep, uniform)], dim=1)
    taken = mark(kept, t.free)
    x, metric = wide(t.tokens[:, t.protected:]), unit(t.keys[:, t.protected:])
    attention = (attention if padding is None else attention.masked_fill(padding, 0)).to(x.dtype)
    own, x = take(x, kept, 1, 0), blank(x, padding)
    near = min(neighbours, t.free - 1)
    if near:
        similar = take(metric, kept, 1, 0) @ metric.transpose(1, 2)
        itself = kept[:, :, None] == torch.arange(t.free, device=kept.device)
        similar = similar.masked_fill(itself, -torch.inf)
        similar = similar if padding is None else similar.masked_fill(padding[:, None] & ~itself, -4.0)
        index = top_tokens(similar.flatten(0, 1), near, 0)
        own = own + mark(index, t.free).reshape(similar.shape).to(x.dtype) * attention[:, None] @ x
    rest = (attention * (~taken).to(attention.dtype))[:, None] @ x
    tokens = _behind(t.tokens, t.protected, torch.cat([own, rest], dim=1).to(t.tokens.dtype))
    return _with_rest(t, tokens, kept + t.protected, taken)


def _single_head(t: Tokens) -> Tensor:
    """Attention `(B, N)` from the class token, or from all unprotected tokens on average, over all heads side by side."""
    if t.queries is None or t.keys is None:
        return importance(t, "auto")
    rows = t.queries[:, :1] if t.has_class and t.protected else t.queries[:, t.protected:]
    attention = attention_rows(rows[:, None], t.keys[:, None], t.keys.shape[-1] ** -0.5, padding=t.padding)
    every = t.padding is not None and not (t.has_class and t.protected)
    padding = t.padding[:, t.protected:] if every and t.padding is not None else None
    return attention_received(without_rows(attention, padding), padding)


def _uniform(score: Tensor, padding: Tensor | None, keep: int, uniform: int) -> Tensor:
    """Spatially uniform samples `(B, uniform)` in order, without the `keep` best; others by score in the place of those."""
    count = score.shape[1]
    rank = rank_tokens(score)
    places = torch.tensor([[(2 * i + 1) * count // (2 * uniform) for i in range(uniform)]], device=score.device)
    wanted = mark(places, count) if padding is None else mark(places, count) & ~padding
    # Ranks, because they are finite whatever the scores are.
    free = torch.where(wanted, 1.0, -rank).masked_fill(rank < keep, -2.0 * count)
    return top_tokens(free, uniform, 0)


def _with_rest(t: Tokens, tokens: Tensor, kept: Tensor, taken: Tensor) -> Reduced:
    """A result whose last token stands for all real ones that are not `taken (B, N)`."""
    none = torch.full_like(kept[:, :1], -1)
    real = ~taken if t.padding is None else ~taken & ~t.padding[:, t.protected:]
    size = t.size
    if size is not None:
        rest = (size[:, t.protected:] * real[:, :, None].to(size.dtype)).sum(dim=1, keepdim=True)
        size = _behind(size, t.protected, torch.cat([take(size, kept, 1, 0), rest], dim=1))

    def assignment() -> Tensor:
        where = assign(t.count, torch.cat([*prefix(t), kept], dim=1))
        last = torch.cat([*(torch.zeros_like(p, dtype=torch.bool) for p in prefix(t)), real], dim=1)
        return where.masked_fill(last, tokens.shape[1] - 1)

    return Reduced(tokens, size, torch.cat([*prefix(t), kept, none], dim=1), assignment)


# -- text


def _all_but_one(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {n: {} for n in range(1, free)}


@method(
    name="trim", summary="Keep the tokens that the text embedding singles out, and the mean of the others as one more.",
    mechanism="attention", modalities=("image", "video"), sites=("block", "out", "projector"), needs=("text",), pads=True,
    keeps_order=False, represented=False, paper="TRIM (COLING 2025), arXiv 2409.10994",
    limits="The count is fixed (the published one may also follow from outliers). As in the published code those of the lowest dot "
           "product with the text are kept. In a model the tokens themselves are compared, so the text embedding must be of their "
           "space. The last token is none of the inputs, so what has one entry for each token cannot follow.",
    parameters=(KEEP,), count=keep_is_needed, legal_counts=_all_but_one, extra=lambda _: 1,
)
def _trim(t: Tokens, keep: int, **_: Any) -> Reduced:
    """Several rows of text count by their mean. The published softmax over the tokens keeps their order, and is left out."""
    compared = t.tokens if t.keys is None else t.keys
    assert t.text is not None
    if t.text.ndim != 2 or t.text.shape[-1] != compared.shape[-1]:
        raise ValueError(f"the text is {tuple(t.text.shape)}: (rows, {compared.shape[-1]}) is needed for tokens of that width")
    compared = wide(compared)
    score = -(compared @ t.text.to(compared.dtype).transpose(0, 1)).mean(dim=-1)
    kept = top_tokens(hide_padding(score, t.padding)[:, t.protected:], keep, 0)
    taken = mark(kept, t.free)
    padding = None if t.padding is None else t.padding[:, t.protected:]
    real = ~taken if padding is None else ~taken & ~padding
    x = t.tokens[:, t.protected:]
    weight = real[:, None].to(wide(x).dtype)
    weight = weight if t.size is None else weight * t.size[:, t.protected:].to(weight.dtype).transpose(1, 2)
    total = weight.sum(dim=-1, keepdim=True)
    mean = weight @ blank(wide(x), padding) / divisor(total)
    tokens = _behind(t.tokens, t.protected, torch.cat([take(x, kept, 1, 0), mean.to(x.dtype)], dim=1))
    return _with_rest(t, tokens, kept + t.protected, taken)
