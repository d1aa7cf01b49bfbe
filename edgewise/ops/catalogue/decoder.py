"""Methods for decoders: visual tokens are taken out between two blocks, by what the prompt attends to.

They are called on a whole sequence: the tokens before the span of the image are protected, those behind it are put back by
the caller and appear in the attention's query rows only.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, drop, method
from edgewise.ops.reduce import take
from edgewise.ops.score import attention_received, hide_padding
from edgewise.ops.select import top_tokens


@method(
    name="fastv", summary="Drop the visual tokens that the last token of the prompt attends to least, after an early block.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("decoder",), needs=("attention",),
    paper="An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024), arXiv 2403.06764",
    limits="decoder.block[K] is before block K, scored by the attention of block K-1. Kept tokens keep their positions.",
    parameters=(KEEP,), pads=True, pads_tail=True,
)
def _fastv(t: Tokens, keep: int, **_: Any) -> Reduced:
    assert t.attend is not None
    return drop(t, top_tokens(hide_padding(attention_received(t.attend(slice(-1, None))), t.padding), keep, t.protected))


@method(
    name="pyramiddrop", summary="Drop visual tokens in stages, by the attention that the next block's last row would pay them.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("decoder",), needs=("attention",),
    paper="PyramidDrop (CVPR 2025), arXiv 2410.17247",
    limits="Ratios are of the tokens that were there at first. The score needs the next block's queries and keys of all tokens; "
           "positions are numbered anew without gaps.",
    parameters=(KEEP, Parameter("stages", (0.5, 0.25, 0.125), "the share of the visual tokens that stays after each stage"),),
    positions="dense", scored_by="next", pads=True, pads_tail=True,
)
def _pyramiddrop(t: Tokens, keep: int, **_: Any) -> Reduced:
    return _fastv(t, keep)


@method(
    name="sparsevlm", summary="Drop the visual tokens that the text tokens which look at the image attend to least, in stages.",
    mechanism="attention", modalities=("image", "video"), sites=("decoder",), needs=("attention", "embeddings"),
    paper="SparseVLM (ICML 2025), arXiv 2410.04417",
    limits="Counts are fixed, as in the released code. The raters (text tokens more relevant than the average, as the decoder is "
           "given them) are weights of zero and one, so that their number may differ from input to input. Dropped tokens are not "
           "recycled.",
    parameters=(KEEP, Parameter("stages", (300 / 576, 200 / 576, 110 / 576),
                                "the share (or, above 1, the number) of visual tokens that stays after each stage")),
    pads_tail=True,
)
def _sparsevlm(t: Tokens, keep: int, **_: Any) -> Reduced:
    assert t.attend is not None
    if t.tail is None:
        raise ValueError("sparsevlm rates by text tokens behind the visual ones, and the span leaves none")
    # Raters are chosen once, by what the decoder is given: deeper, every token tells of the others.
    visual, text = t.tokens[:, t.protected:], t.tail.tokens
    if t.first is not None:
        visual, text = t.first[:, t.protected:-t.tail.count], t.first[:, -t.tail.count:]
    visual, text = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (visual, text))
    likeness, real = visual @ text.transpose(1, 2), torch.ones_like(text[:, :, 0])
    if t.tail.padding is not None:
        likeness, real = likeness.masked_fill(t.tail.padding[:, None], -torch.inf), (~t.tail.padding).to(text.dtype)
    relevance = likeness.softmax(dim=-1).mean(dim=1)
    raters = (relevance > relevance.sum(dim=-1, keepdim=True) / real.sum(dim=-1, keepdim=True)).to(relevance.dtype)
    # Where all are equally relevant none is above the average: all of them rate.
    raters = torch.where(raters.sum(dim=-1, keepdim=True) > 0, raters, real)
    # From the end: at a site of several methods there are rows of visual tokens that are gone.
    paid = t.attend(slice(-t.tail.count, None)).mean(dim=1)
    score = (paid * raters[:, :, None]).sum(dim=1) / raters.sum(dim=-1, keepdim=True)
    return drop(t, top_tokens(score, keep, t.protected))


@method(
    name="dart", summary="Keep a few pivot tokens, and for each of them the tokens that are least like it.",
    # With queries, which it does not read, keys come with their heads side by side.
    mechanism="similarity", modalities=("image", "video"), sites=("decoder",), needs=("keys", "queries"),
    paper="Stop Looking for Important Tokens: Duplication Matters More (2025), arXiv 2502.11494",
    limits="Pivots take their turns by falling L1 norm of their keys, visual ones first; what does not divide evenly goes to the "
           "first. Where there are fewer text tokens than pivots, the largest stands in for each that lacks. Kept tokens are in "
           "order. Tokens are compared as they are, without the decoder's final norm.",
    parameters=(KEEP, Parameter("image_pivots", 4, "visual tokens that others are compared with", least=1),
                Parameter("text_pivots", 4, "text tokens behind the visual ones that others are compared with", least=0)),
    pads_tail=True,
)
def _dart(t: Tokens, keep: int, image_pivots: int = 4, text_pivots: int = 4, **_: Any) -> Reduced:
    assert t.keys is not None
    place = torch.arange(t.count, device=t.tokens.device)
    taken = (place < t.protected).expand(t.tokens.shape[0], -1)
    image_pivots = min(image_pivots, keep)
    pivots, taken = _pivots(t.tokens, t.keys, taken, image_pivots)
    if t.tail is not None and t.tail.keys is not None and text_pivots:
        none = torch.zeros_like(t.tail.tokens[:, :, 0], dtype=torch.bool)
        pivots += _pivots(t.tail.tokens, t.tail.keys, none, min(text_pivots, t.tail.count), t.tail.padding)[0]
    unit = normalize(t.tokens.to(torch.promote_types(t.tokens.dtype, torch.float32)), dim=-1)
    share, more = divmod(keep - image_pivots, len(pivots))
    for turn, pivot in enumerate(pivots):
        wanted = share + (turn < more)
        if wanted:
            unlike = -(unit * normalize(pivot.to(unit.dtype), dim=-1)).sum(dim=-1)
            taken = taken | _marked(top_tokens(unlike.masked_fill(taken, -torch.inf), wanted, 0), place)
    return drop(t, top_tokens(taken.to(unit.dtype), keep, t.protected))


def _pivots(
    tokens: Tensor, keys: Tensor, taken: Tensor, count: int, padding: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The `count` tokens `(B, 1, C)` of the largest L1 norm of their keys among those not `taken`, the largest first. Where padding
    leaves fewer, the largest stands in for the rest."""
    taken = taken if padding is None else taken | padding
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    norm, place = wide.abs().sum(dim=-1), torch.arange(keys.shape[1], device=keys.device)
    pivots: list[Tensor] = []
    for _ in range(count):
        pick = top_tokens(norm.masked_fill(taken, -torch.inf), 1, 0)
        found = take(tokens, pick, 1, 0)
        if padding is not None and pivots:
            found = torch.where(taken.all(dim=1)[:, None, None], pivots[0], found)
        pivots.append(found)
        taken = taken | _marked(pick, place)
    return pivots, taken


def _marked(index: Tensor, place: Tensor) -> Tensor:
    """Which of the positions `place (N)` are among `index (B, K)`: `(B, N)`."""
    return (index[:, :, None] == place).any(dim=1)
