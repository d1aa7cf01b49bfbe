"""Compression of known model families at their published sizes, against an independent eager implementation."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build
from reference import Eager, patched, relative_error

from edgewise.errors import EdgewiseError
from edgewise.passes.program import Program, compress, make_program

TOLERANCE = 1e-5
NEAR_TIES = {"whisper", "wav2vec2", "hubert", "videomae"}
"""Merging without a class token puts the unmerged tokens in order of their similarity, so the order of hundreds of
nearly equal numbers decides on all that follows: in single precision two right implementations differ by a swap. These
are run in double precision."""
END = {
    "vit": "layernorm",
    "vit_classifier": "vit.layernorm",
    "deit_distilled": "deit.layernorm",
    "dinov2": "layernorm",
    "dinov2_registers": "layernorm",
    "siglip": "post_layernorm",
    "ast": "audio_spectrogram_transformer.layernorm",
    "whisper": "layer_norm",
    "vivit": "layernorm",
    "dinov3": "norm",
    "wav2vec2_large": "encoder.layer_norm",
}
"""Where the value that leaves the encoder is that of a norm behind the last block."""
COMPILED = [name for name, f in FAMILIES.items() if f.refused is None]
REFUSED = [name for name, f in FAMILIES.items() if f.refused is not None]


def capture(model: torch.nn.Module, inputs: dict[str, Any]) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (), inputs, strict=False)
    return make_program(exported, inputs, output_names=())


@lru_cache(maxsize=1)
def captured(name: str, small: bool, double: bool = False) -> tuple[torch.nn.Module, dict[str, Any], Program]:
    """The last family captured: tests of the same family follow each other."""
    model, inputs = build(name, small)
    if double:
        model, inputs = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model, inputs, capture(model, inputs)


def eager_plan(program: Program, site: str) -> dict[int | str, list[tuple[str, int]]]:
    """What the compiled program says it keeps at every site of a stream, for the reference to do the same."""
    plan: dict[int | str, list[tuple[str, int]]] = {}
    for place in program.sites:
        if place.methods:
            assert len(place.methods) == 1 and place.name.startswith(site + ".")
            where = re.search(r"block\[(\d+)\]$", place.name)
            plan[int(where.group(1)) if where else "out"] = [(place.methods[0], place.tokens_out)]
    return plan


def error_of(name: str, small: bool, spec: str) -> tuple[float, Program, Eager]:
    """Compile, run both, and measure."""
    family = FAMILIES[name]
    model, inputs, program = captured(name, small, name in NEAR_TIES and not small and spec.startswith("tome"))
    compressed = compress(program, spec)
    state = Eager(eager_plan(compressed, family.site), family.protected, family.has_class)
    with torch.no_grad():
        ours = compressed.module()(**inputs)
        with patched(model, family.layers, state, END.get(name)):
            theirs = model(**inputs)
    return relative_error(ours, theirs), compressed, state


def check(family: Family, small: bool, spec: str) -> None:
    error, compressed, state = error_of(family.name, small, spec)
    tokens = family.tokens if not small else compressed.sites[0].tokens_in
    left = family.protected + (tokens - family.protected) // 2
    sites = [s for s in compressed.sites if s.name.startswith(family.site + ".")]
    assert sites[0].tokens_in == tokens and sites[-1].tokens_out == left
    assert state.counts[-1] == left
    assert error < TOLERANCE, f"{family.name} {spec}: relative error {error:.3g}"


def specs(family: Family) -> list[str]:
    return ["tome:keep=0.5", "topk:keep=0.5", f"topk@{family.site}.block[1]:keep=0.5"]


# One site alone is covered by the small ones: what the published size adds is depth and the number of tokens.
@pytest.mark.parametrize(
    "case", [(n, i) for n in COMPILED for i in range(2 if FAMILIES[n].small else 3)], ids=lambda c: f"{c[0]}-{c[1]}"
)
def test_equals_eager_at_published_size(case: tuple[str, int]) -> None:
    family = FAMILIES[case[0]]
    check(family, False, specs(family)[case[1]])


@pytest.mark.parametrize(
    "case", [(n, i) for n in COMPILED if FAMILIES[n].small for i in range(3)], ids=lambda c: f"{c[0]}-{c[1]}"
)
def test_equals_eager_when_small(case: tuple[str, int]) -> None:
    family = FAMILIES[case[0]]
    check(family, True, specs(family)[case[1]])


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_refused_with_a_reason(name: str, method: str) -> None:
    program = captured(name, True)[2]
    with pytest.raises(EdgewiseError) as caught:
        compress(program, f"{method}:keep=0.5")
    message = str(caught.value)
    assert FAMILIES[name].refused in message
    if program.analysis.anchors:
        assert "modeling_" in message and caught.value.node in message
