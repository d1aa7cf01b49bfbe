"""Attention methods for encoders: tokens that little attention goes to are dropped or folded together."""
from __future__ import annotations

from typing import Any

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, drop, method
from edgewise.ops.score import attention_received, hide_padding
from edgewise.ops.select import top_tokens


@method(
    name="topk", summary="Keep the tokens that the class token (or all tokens on average) attends to most.",
    mechanism="attention", modalities=("image", "video", "audio"), sites=("block", "out"), needs=("attention",),
    pads=True, aliases=("fastervlm",),
    paper="FasterVLM, arXiv 2412.01818; top-K for AST and AudioMAE, arXiv 2504.01690", limits="",
    parameters=(
        KEEP,
        Parameter("score", "auto", "class: the class token's attention; column: mean attention received from all "
                  "unprotected queries; auto: class where there is a class token", ("auto", "class", "column")),
    ),
)
def _topk(t: Tokens, keep: int, score: str = "auto", **_: Any) -> Reduced:
    assert t.attend is not None
    if score == "class" and not t.has_class:
        raise ValueError("score=class needs a class token, and this model has none: use score=column")
    by_class = t.has_class if score == "auto" else score == "class"
    rows = t.attend(slice(0, 1) if by_class else slice(t.protected, None))
    received = attention_received(rows)
    return drop(t, top_tokens(hide_padding(received, t.padding), keep, t.protected))
