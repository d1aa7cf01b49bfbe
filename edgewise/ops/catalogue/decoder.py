"""Methods for decoders: visual tokens are taken out between two blocks, by what the prompt attends to.

They are called on a whole sequence: the tokens before the span of the image are protected, those behind it are put back by
the caller and appear in the attention's query rows only.
"""
from __future__ import annotations

from typing import Any

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, drop, method
from edgewise.ops.score import attention_received, hide_padding
from edgewise.ops.select import top_tokens


@method(
    name="fastv", summary="Drop the visual tokens that the last token of the prompt attends to least, after an early block.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("decoder",), needs=("attention",),
    paper="An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024), arXiv 2403.06764",
    limits="decoder.block[K] is before block K, scored by the attention of block K-1. Kept tokens keep their positions.",
    parameters=(KEEP,), pads=True,
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
    parameters=(Parameter("stages", (0.5, 0.25, 0.125), "the share of the visual tokens that stays after each stage"),),
    positions="dense", scored_by="next", pads=True,
)
def _pyramiddrop(t: Tokens, keep: int, **_: Any) -> Reduced:
    return _fastv(t, keep)
