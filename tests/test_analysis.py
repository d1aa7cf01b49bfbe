"""Streams, sites, prefix, grid, side values and samples, as the analysis reports them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from handmade import Shape, make
from test_families import capture, captured
from torch import Tensor, nn

from edgewise.errors import EdgewiseError
from edgewise.passes import cleanup
from edgewise.passes.program import Program, compress


@lru_cache(maxsize=16)
def program_of(**shape: Any) -> Program:
    model, inputs = make(replace(Shape(), **shape))
    return capture(model, inputs)


@pytest.mark.parametrize(
    ("name", "tokens", "grid", "prefix"),
    [
        ("vit", 37, (6, 6), 1),
        ("deit_distilled", 38, (6, 6), 2),
        ("dinov2_registers", 41, (6, 6), 5),
        ("siglip", 36, (6, 6), 0),
        ("ast", 52, (5, 10), 2),
        ("whisper", 60, (60,), 0),
        ("videomae", 32, (2, 4, 4), 0),
        ("beit", 37, (6, 6), 1),
    ],
)
def test_origin_of_tokens(name: str, tokens: int, grid: tuple[int, ...], prefix: int) -> None:
    analysis = captured(name, True)[2].analysis
    (stream,) = analysis.streams
    assert (stream.tokens, stream.grid, stream.prefix, stream.protected) == (tokens, grid, prefix, prefix)
    assert [p.name for p in stream.places] == [*(f"encoder.block[{i}]" for i in range(3)), "encoder.out"]
    assert all(p.refused is None for p in stream.places)


def test_side_values_are_named() -> None:
    (stream,) = captured("beit", True)[2].analysis.streams
    assert len(stream.blocks[0].side_values) == 2 and stream.out is not None and stream.out.side_values == ()
    (stream,) = program_of(rotary=True, prefix=5).analysis.streams
    assert stream.protected == 5 and "b_hoge" in stream.blocks[0].side_values


def test_pooling_head_is_no_block() -> None:
    analysis = captured("siglip", True)[2].analysis
    assert len(analysis.streams[0].blocks) == 3 and list(analysis.unplaced) == [3]


def test_two_towers() -> None:
    analysis = captured("clip", True)[2].analysis
    assert {s.name: s.role for s in analysis.streams} == {"encoder": "vision_encoder", "text_encoder": "text_encoder"}
    text = next(s for s in analysis.streams if s.role == "text_encoder")
    assert "selects tokens by indices" in str(text.blocks[0].refused)
    with pytest.raises(EdgewiseError, match=r"modeling_clip.py"):
        compress(captured("clip", True)[2], "topk@text_encoder.block[1]:keep=4")


@pytest.mark.parametrize(("ends", "read"), [("tokens", True), ("mean", True), ("class", False)])
def test_whether_the_output_is_read(ends: str, read: bool) -> None:
    assert program_of(ends=ends).analysis.streams[0].out_is_read is read


def test_sites_of_post_norm_blocks_are_behind_the_norm() -> None:
    for norm in ("layer", "rms", "written"):
        stream = program_of(order="post", norm=norm).analysis.streams[0]
        assert all(len(p.node.users) == 2 and p.node is not p.anchor.joined for p in stream.blocks), norm
    stream = program_of(norm="written").analysis.streams[0]
    assert all(p.node is p.anchor.joined for p in stream.blocks)


def test_a_broken_encoder_says_where() -> None:
    broken = program_of(between="conv")
    first, second = broken.analysis.streams
    assert (first.name, second.name) == ("encoder", "encoder2")
    with pytest.raises(EdgewiseError, match=r"(?s)do not form one stream.*conv1d.*handmade.py.*neighbours"):
        compress(broken, "tome:keep=0.5")
    with pytest.raises(EdgewiseError, match=r"(?s)encoder.block\[0\].*conv1d.*handmade.py"):
        compress(broken, "topk@encoder.block[0]:keep=0.5")
    assert compress(broken, "topk@encoder2.block[0]:keep=10").sites[-1].tokens_out == 10


class Frames(nn.Module):
    """Frames of a clip as samples, whose tokens meet afterwards."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, make(Shape(tokens=8, prefix=1, depth=2))[0]
        self.late = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        if self.how == "mean":
            return y.mean(0)
        if self.how == "class":
            return y[:, 0].mean(0)
        if self.how == "temporal":
            z = y.transpose(0, 1)
            return z + self.late(z, z, z, need_weights=False)[0]
        return y.reshape(1, -1, 24)


@pytest.mark.parametrize(("how", "refused"), [("mean", True), ("temporal", True), ("class", False), ("flat", False)])
def test_samples_may_not_meet_token_by_token(how: str, refused: bool) -> None:
    program = capture(Frames(how).eval(), {"x": torch.randn(3, 8, 6)})
    if refused:
        with pytest.raises(EdgewiseError, match=r"(?s)test_analysis.py.*(sample|no long)"):
            compress(program, "topk@encoder.block[0]:keep=4")
    else:
        assert compress(program, "topk@encoder.block[0]:keep=4").sites[-1].tokens_out == 5


def test_all_refusals_of_families_name_their_line() -> None:
    for name, family in FAMILIES.items():
        if family.refused == "part of the tokens":
            assert (
                "modeling_" in " ".join(str(p) for p in captured(name, True)[2].analysis.unplaced.values())
                or captured(name, True)[2].analysis.unplaced
            )


def test_a_stream_of_four_dimensions_is_refused() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(12, 36) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.layers:
                q, k, v = f(x).chunk(3, -1)
                x = x + nn.functional.scaled_dot_product_attention(q, k, v)
            return x

    program = capture(Deep().eval(), {"x": torch.randn(2, 3, 9, 12)})
    for spec in ("tome:r=2", "topk:keep=4"):
        with pytest.raises(EdgewiseError, match="stream of 4 dimensions"):
            compress(program, spec)


def test_a_dead_mask_that_is_spread_over_many_samples_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the batch in it, it is too large to be folded; it masks nothing all the same."""
    monkeypatch.setattr(cleanup, "MAX_FOLDED_ELEMENTS", 2 * 37 * 37)
    model, inputs = build("vit", small=True)
    program = capture(model, {"pixel_values": inputs["pixel_values"].repeat(4, 1, 1, 1)})
    attention = torch.ops.aten.scaled_dot_product_attention.default
    found = [node for node in program.exported.graph.nodes if node.target is attention]
    assert len(found) == 3 and all(len(node.all_input_nodes) == 3 for node in found)
