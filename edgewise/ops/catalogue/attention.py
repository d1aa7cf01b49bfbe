"""Attention methods for encoders that drop the tokens that little attention goes to."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.match import bipartite_match
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, drop, method
from edgewise.ops.order import order_tokens
from edgewise.ops.reduce import take
from edgewise.ops.score import attention_received, hide_padding
from edgewise.ops.select import group_tokens, mark, top_tokens

Grid = tuple[int, ...]

SCORE = Parameter("score", "auto", "class: the class token's attention; column: mean attention received from all unprotected "
                  "queries; auto: class where there is a class token", ("auto", "class", "column"))


def importance(t: Tokens, score: str) -> Tensor:
    """The attention `(B, N)` that each token receives, averaged over heads: from the class token or from all real tokens."""
    assert t.attend is not None
    if score == "class" and not t.has_class:
        raise ValueError("score=class needs a class token, and this model has none: use score=column")
    if t.has_class if score == "auto" else score == "class":
        return attention_received(t.attend(slice(0, 1)))
    rows = t.attend(slice(t.protected, None))
    # Rows of an attention from before an earlier cut are more than the tokens are now, and which are padding is not known.
    known = t.padding is not None and rows.shape[2] == t.free
    return attention_received(rows, t.padding[:, t.protected:] if known and t.padding is not None else None)


def keep_is_needed(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    raise ValueError("give keep=... (tokens that stay: a fraction such as 0.5, or a count) or r=... (tokens that go)")


def prefix(t: Tokens) -> list[Tensor]:
    """The indices `(B, protected)` of the protected tokens, in a list that is empty where there are none."""
    return [torch.arange(t.protected, device=t.tokens.device).expand(t.tokens.shape[0], -1)] if t.protected else []


@method(
    name="topk", summary="Keep the tokens that the class token (or all tokens on average) attends to most.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=("attention",),
    pads=True, aliases=("fastervlm",),
    paper="FasterVLM, arXiv 2412.01818; top-K for AST and AudioMAE, arXiv 2504.01690",
    limits="Kept tokens stay in order, as in FasterVLM; the published code for AST and AudioMAE has them by score. A fraction is "
           "rounded down, and there up.",
    parameters=(KEEP, SCORE),
)
def _topk(t: Tokens, keep: int, score: str = "auto", **_: Any) -> Reduced:
    return drop(t, top_tokens(hide_padding(importance(t, score), t.padding), keep, t.protected))


@method(
    name="frame-topk", summary="Keep equally many tokens of each frame, those that most attention goes to.",
    mechanism="attention", modalities=("video",), sites=("block", "out", "projector"), needs=("attention", "frames"), pads=True,
    paper="FasterVLM (arXiv 2412.01818) on each frame",
    limits="keep counts the tokens of all frames. What it leaves over when shared out equally goes to the best of all frames.",
    parameters=(KEEP, SCORE),
)
def _frame_topk(t: Tokens, keep: int, score: str = "auto", **_: Any) -> Reduced:
    assert t.frames is not None
    return drop(t, group_tokens(importance(t, score), keep, t.protected, t.frames, t.padding))


def _segment_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    if parameters["segments"] > free:
        raise ValueError(f"segments={parameters['segments']} is out of range: 1 to {free} for {free} tokens")
    return {n: {} for n in range(1, free + 1)}


@method(
    name="segment-topk", summary="Keep equally many tokens of each segment of time, those that most attention goes to.",
    mechanism="attention", modalities=("audio",), sites=("block", "out", "projector"), needs=("attention",), pads=True,
    paper="Segmentwise Pruning in Audio-Language Models, arXiv 2511.14293",
    limits="Each of the S segments keeps floor(K / S); what that leaves of K goes to the best of all other tokens. The first "
           "segments are one token longer where S does not divide the tokens.",
    parameters=(KEEP, Parameter("segments", 10, "stretches of time of the same length", least=1), SCORE),
    count=keep_is_needed, legal_counts=_segment_counts,
)
def _segment_topk(t: Tokens, keep: int, segments: int = 10, score: str = "auto", **_: Any) -> Reduced:
    return drop(t, group_tokens(importance(t, score), keep, t.protected, segments, t.padding))


@method(
    name="hired", summary="Keep a share of the whole image's tokens, and of each of its tiles an equal number.",
    mechanism="attention", modalities=("image",), sites=("block", "out", "projector"), needs=("attention", "frames"),
    paper="HiRED (AAAI 2025), arXiv 2408.10945",
    limits="frames = tiles, the first of which is the whole image. Tiles share equally what the whole image leaves, instead of by "
           "what the first block's attention finds in each (a count that depends on the data), and what equal shares leave over "
           "goes to the best of all tiles, so that the count is exact. The attention is that of the site's block. The tiles' "
           "tokens must lie one after the other in one sequence: where tiles are a batch there is nothing to share.",
    parameters=(
        KEEP,
        Parameter("alpha", 0.5, "share of the tokens kept that goes to the whole image: min(int(alpha K), N)", least=0, most=1),
        SCORE,
    ),
)
def _hired(t: Tokens, keep: int, alpha: float = 0.5, score: str = "auto", **_: Any) -> Reduced:
    assert t.frames is not None
    attention, length = importance(t, score), t.free // t.frames
    # The tiles hold a limited number as well: what does not fit into them goes back to the whole image.
    whole = max(min(int(keep * alpha), length), keep - (t.frames - 1) * length)
    start, kept = t.protected + length, prefix(t)
    if whole:
        kept.append(top_tokens(attention[:, t.protected:start], whole, 0) + t.protected)
    if keep > whole:
        kept.append(group_tokens(attention[:, start:], keep - whole, 0, t.frames - 1) + start)
    return drop(t, torch.cat(kept, dim=1))


@method(
    name="vispruner", summary="Keep the tokens that most attention goes to, and of the others those that differ most.",
    mechanism="attention", modalities=("image",), sites=("block", "out", "projector"), needs=("attention",),
    paper="VisPruner (ICCV 2025), arXiv 2412.01818v2",
    limits="The others, by falling attention, are matched again and again, even places against odd ones, and at most 8 of the even "
           "ones go each time: a small matching for every 8 tokens that go. An odd number of others is no error here. Each round "
           "pairs by the order that the last one left, so a rounding error in it can change much of what is kept after many "
           "rounds: where many tokens go, a target's choice may differ from the reference's, as fp32 does from fp64.",
    parameters=(
        KEEP,
        Parameter("important", 0.5, "share of the kept tokens that is chosen by attention: int(important K)", least=0, most=1),
        SCORE,
    ),
)
def _vispruner(t: Tokens, keep: int, important: float = 0.5, score: str = "auto", **_: Any) -> Reduced:
    chosen = int(keep * important)
    by_attention = order_tokens(importance(t, score)[:, t.protected:], t.free)
    best, others = by_attention[:, :chosen], by_attention[:, chosen:]
    if keep == chosen:
        others = others[:, :0]
    x = t.tokens[:, t.protected:]
    while others.shape[1] > keep - chosen:
        count = others.shape[1]
        gone = min(8, count - (keep - chosen), count // 2)
        # What a matching leaves is what is published: the even places by falling similarity, then the odd ones.
        left = bipartite_match(take(x, others, 1, 0), gone, 0)[0]
        others = take(others, left, 1, 0)
    kept = mark(torch.cat([best, others], dim=1), t.free)
    index = top_tokens(kept.to(torch.float32), keep, 0) + t.protected
    return drop(t, torch.cat([*prefix(t), index], dim=1))
