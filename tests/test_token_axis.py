"""The token axis: models that stress the analysis, each compressed exactly or refused with a reason."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from handmade import Plain, Shape, make
from reference import Eager, relative_error
from test_families import capture, eager_plan

from edgewise.errors import EdgewiseError
from edgewise.passes.program import Program, compress

BASE = Shape()
EXACT: dict[str, Shape] = {
    "plain": BASE,
    "width_equals_tokens": Shape(tokens=196, width=197, heads=1, depth=2),
    "width_heads_tokens_64": Shape(tokens=63, width=64, heads=1, depth=2),
    "tokens_64_no_prefix": Shape(tokens=64, width=64, heads=1, depth=2, prefix=0),
    "tokens_equal_heads": Shape(tokens=7, width=32, heads=8, prefix=1),
    "tokens_equal_heads_and_batch": Shape(tokens=3, width=32, heads=4, prefix=1, batch=4),
    "batch_2": replace(BASE, batch=2),
    "batch_3": replace(BASE, batch=3),
    "batch_equals_heads_sdpa": replace(BASE, batch=2, attend="sdpa"),
    "odd": replace(BASE, tokens=21),
    "odd_no_prefix": replace(BASE, tokens=21, prefix=0),
    "even_no_prefix": replace(BASE, tokens=22, prefix=0, batch=2),
    "five_registers": replace(BASE, prefix=5),
    "two_prefix_batch": replace(BASE, prefix=2, batch=2),
    "post": replace(BASE, order="post"),
    "post_rms": replace(BASE, order="post", norm="rms"),
    "post_written_rms": replace(BASE, order="post", norm="written"),
    "post_scaled": replace(BASE, order="post", scale=True, batch=2),
    "parallel": replace(BASE, order="parallel"),
    "parallel_scaled": replace(BASE, order="parallel", scale=True),
    "bias": replace(BASE, bias=True),
    "bias_sdpa": replace(BASE, bias=True, attend="sdpa"),
    "bias_sdpa_batch_2": replace(BASE, bias=True, attend="sdpa", batch=2, heads=4),
    "bias_sdpa_batch_3": replace(BASE, bias=True, attend="sdpa", batch=3, heads=2),
    "bias_batch_equals_heads": replace(BASE, bias=True, batch=2),
    "rotary": replace(BASE, rotary=True),
    "rotary_sdpa_registers_batch": replace(BASE, rotary=True, prefix=5, attend="sdpa", batch=2),
    "rotary_no_prefix": replace(BASE, rotary=True, prefix=0),
    "rotary_tokens_equal_head_width": replace(BASE, rotary=True, tokens=12, batch=2),
    "mask_bool": replace(BASE, mask="bool"),
    "mask_bool_sdpa_batch": replace(BASE, mask="bool", attend="sdpa", batch=2),
    "mask_float": replace(BASE, mask="float", batch=2),
    "mask_float_sdpa": replace(BASE, mask="float", attend="sdpa", batch=3),
    "mask_padding": replace(BASE, mask="padding", batch=2),
    "mask_padding_sdpa": replace(BASE, mask="padding", attend="sdpa", batch=2),
    "mask_and_bias": replace(BASE, mask="float", bias=True, attend="sdpa", batch=2),
    "sdpa": replace(BASE, attend="sdpa"),
    "sdpa3": replace(BASE, attend="sdpa3"),
    "sdpa3_batch": replace(BASE, attend="sdpa3", batch=2),
    "sdpa_one_head": replace(BASE, attend="sdpa", heads=1, prefix=0),
    "einsum": replace(BASE, attend="einsum"),
    "einsum_batch": replace(BASE, attend="einsum", batch=3),
    "bmm_batch": replace(BASE, attend="bmm", batch=3),
    "baddbmm_bias": replace(BASE, attend="baddbmm", bias=True),
    "baddbmm_bias_batch": replace(BASE, attend="baddbmm", bias=True, batch=2),
    "heads_first": replace(BASE, attend="heads_first"),
    "gqa": replace(BASE, attend="gqa", heads=4),
    "gqa_batch": replace(BASE, attend="gqa", heads=4, batch=2, rotary=True),
    "rms": replace(BASE, norm="rms"),
    "written_rms": replace(BASE, norm="written", scale=True),
    "layer_scale": replace(BASE, scale=True),
    "class_out": replace(BASE, ends="class"),
    "mean_out": replace(BASE, ends="mean"),
    "mean_out_no_prefix": replace(BASE, ends="mean", prefix=0, batch=2),
}
EITHER: dict[str, Shape] = {
    # Which of several equal sizes is the batch or the heads may be undecidable; it may never be guessed.
    "heads_first_batch": replace(BASE, attend="heads_first", batch=2),
    "heads_first_batch_3": replace(BASE, attend="heads_first", batch=3),
    "einsum_heads_first": replace(BASE, attend="einsum_heads_first", batch=2),
    "skip_add": replace(BASE, skip="add", depth=4),
    "skip_cat": replace(BASE, skip="cat", depth=4, batch=2),
    "skip_cat_width_equals_tokens": Shape(tokens=23, width=24, depth=4, skip="cat"),
}
REFUSED: dict[str, tuple[Shape, str]] = {
    "grid": (replace(BASE, tokens=16, ends="grid"), "grid|form it"),
    "conv": (replace(BASE, between="conv"), "neighbours"),
    "pool": (replace(BASE, between="pool"), "no rule"),
    "mix": (replace(BASE, between="mix"), "baked in|token"),
    "mix_width_equals_tokens": (replace(BASE, between="mix", tokens=23, width=24), "baked in|token"),
    "flip": (replace(BASE, between="flip"), "positions change"),
    "rolled": (replace(BASE, between="rolled"), "positions change"),
    "shift": (replace(BASE, between="shift"), "no rule|position"),
    "window": (replace(BASE, between="window"), "form it|positions change"),
    "last": (replace(BASE, ends="last"), "from the end|position"),
    "flat": (replace(BASE, ends="flat"), "baked in|token"),
}


def program_of(model: Plain, inputs: dict[str, Any]) -> Program:
    return capture(model, inputs)


def run(model: Plain, program: Program, inputs: dict[str, Any], spec: str) -> tuple[float, Program, Eager]:
    shape = model.shape
    compressed = compress(program, spec)
    state = Eager(eager_plan(compressed, "encoder"), shape.prefix, shape.prefix > 0)
    ours = compressed.module()(**inputs)
    model.state = state
    try:
        theirs = model(**inputs)
    finally:
        model.state = None
    return relative_error(ours, theirs), compressed, state


SPECS = ["tome:keep=0.5", "topk:keep=0.5", "topk@encoder.block[0]:keep=0.5"]


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    shape = EXACT[name]
    model, inputs = make(shape)
    program = program_of(model, inputs)
    for spec in SPECS:
        error, compressed, state = run(model, program, inputs, spec)
        left = shape.prefix + shape.tokens // 2
        assert compressed.sites[-1].tokens_out == left == state.counts[-1]
        assert error < 1e-5, f"{spec}: {error:.3g}"


@pytest.mark.parametrize("name", EITHER)
def test_exact_or_refused(name: str) -> None:
    model, inputs = make(EITHER[name])
    program = program_of(model, inputs)
    for spec in SPECS:
        try:
            error, _, _ = run(model, program, inputs, spec)
        except EdgewiseError as refused:
            assert re.search(r"node '?\w+", str(refused)), str(refused)
            assert "handmade.py:" in str(refused), str(refused)
        else:
            assert error < 1e-5, f"{spec}: {error:.3g}"


@pytest.mark.parametrize("name", ["skip_add", "skip_cat", "skip_cat_width_equals_tokens"])
def test_long_skips(name: str) -> None:
    """Dropped tokens are dropped from what was kept aside; what was kept aside is not merged."""
    model, inputs = make(EITHER[name])
    program = program_of(model, inputs)
    for site in ("block[1]", "block[2]", "block[0,1,2,3]", "out"):
        error, _, _ = run(model, program, inputs, f"topk@encoder.{site}:keep=0.6")
        assert error < 1e-5, f"{site}: {error:.3g}"
    with pytest.raises(EdgewiseError, match=r"(?s)merged with them.*handmade.py"):
        compress(program, "tome:keep=0.5")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    shape, reason = REFUSED[name]
    model, inputs = make(shape)
    program = program_of(model, inputs)
    for spec in SPECS[:1] if name in ("conv", "pool", "mix") else SPECS[:3]:
        with pytest.raises(EdgewiseError) as caught:
            compress(program, spec)
        assert re.search(reason, str(caught.value)), str(caught.value)
        assert "handmade.py:" in str(caught.value) and re.search(r"node '?\w+", str(caught.value))
