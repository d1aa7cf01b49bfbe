"""Similarity methods for encoders: tokens that are alike are merged or dropped."""
from __future__ import annotations

from typing import Any

from edgewise.ops.match import bipartite_match, represent
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, assign, method
from edgewise.ops.reduce import merge_real


@method(
    name="tome", summary="Token merging: the most similar pairs become size-weighted means, at every block.",
    mechanism="similarity", modalities=("image", "video", "audio"), sites=("block", "out"), needs=("keys",),
    paper="Token Merging: Your ViT But Faster (ICLR 2023), arXiv 2210.09461", every_block=True, merges=True, halves=True,
    keeps_order=False, pads=True,
    limits="At most half of the unprotected tokens go at one site; r beyond that is clipped at later blocks, as published.",
    parameters=(
        KEEP,
        Parameter("r", None, "tokens merged away at every block, or a list [r0,r1,...] with one number for each block"),
        Parameter("schedule", "constant", "how r (or the removal that keep asks for) is spread over the blocks",
                  ("constant", "increasing", "decreasing")),
        Parameter("prop_attn", True, "add log(size) to later attention logits (off for models trained with merging)"),
    ),
)
def _tome(t: Tokens, keep: int, **_: Any) -> Reduced:
    assert t.keys is not None
    padding = () if t.padding is None else (t.padding,)
    kept, src, into = bipartite_match(t.keys, t.free - keep, t.protected, *padding)
    tokens, size = merge_real(t.tokens, t.size, kept, src, into, t.padding)
    kept = represent(kept, src, into, t.padding)
    return Reduced(tokens, size, kept, lambda: assign(t.count, kept, src, into))
