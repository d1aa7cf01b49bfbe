"""An encoder, a projector and a decoder in one graph: fewer tokens of the encoder make the decoder's sequence shorter, and
methods at several sites compose. Expected values come from the model's own parts, called one after the other on what was kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import spread
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import edgewise
from edgewise.errors import InputError, Refused
from edgewise.passes.program import Program, compress

BEFORE, AFTER, PATCHES = 5, 7, 64


class Tower(nn.Module):
    """Pixels to projected tokens, without the class token."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                      num_attention_heads=2, image_size=32, patch_size=4))
        self.project = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(self.tower(pixel_values).last_hidden_state[:, 1:])


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                                        num_key_value_heads=2, vocab_size=60, max_position_embeddings=256))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=60, n_positions=256))


class Model(nn.Module):
    """Text, the picture, and text again, through a decoder."""

    def __init__(self, decoder: nn.Module, pictures: int = 1) -> None:
        super().__init__()
        self.vision, self.llm, self.pictures = Tower(), decoder, pictures

    def tokens(self, before: Tensor, after: Tensor, *visual: Tensor) -> Tensor:
        embed = self.llm.get_input_embeddings()
        return torch.cat([embed(before), *visual, embed(after)], 1)

    def decode(self, embeds: Tensor, mask: Tensor | None) -> Tensor:
        return self.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1]

    def forward(self, pixel_values: Tensor, before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
        visual = [self.vision(picture) for picture in pixel_values.split(3, 1)]
        return self.decode(self.tokens(before, after, *visual), mask)


@cache
def build(decoder: Any = llama, pictures: int = 1) -> Model:
    torch.manual_seed(0)
    model = spread(Model(decoder(), pictures)).eval()
    if decoder is not llama:  # the same tower in front of each
        model.vision.load_state_dict(build().vision.state_dict())
    return model


def feeds(batch: int = 1, pictures: int = 1, masked: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    made = [torch.randn(batch, 3 * pictures, 32, 32), torch.randint(0, 60, (batch, BEFORE)), torch.randint(0, 60, (batch, AFTER))]
    if masked:
        mask = torch.ones(batch, BEFORE + pictures * PATCHES + AFTER, dtype=torch.int64)
        for row in range(batch):
            mask[row, : row % 3 + 1] = 0  # padding in front
            mask[row, -2 - row % 2 : -1] = 0  # and a hole in the text behind the picture
        made.append(mask)
    return tuple(made)


@cache
def captured(decoder: Any = llama, pictures: int = 1, batch: int = 1, masked: bool = False) -> Program:
    return edgewise.capture(build(decoder, pictures), feeds(batch, pictures, masked))


@cache
def tower(batch: int) -> Program:
    return edgewise.capture(build().vision, feeds(batch)[:1])


def visual_tokens(model: Model, pixels: Tensor, *specs: str) -> Tensor:
    """The tower alone, compressed: what the tests of methods and families check against eager models."""
    program = compress(tower(len(pixels)), *specs).module()
    assert torch.equal(model.vision.project[2].weight, build().vision.project[2].weight)
    with torch.no_grad():
        return program(pixels)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max())), float((ours - theirs).abs().max())


def counts(program: Program) -> list[tuple[str, int, int]]:
    return [(s.name, s.tokens_in, s.tokens_out) for s in program.sites if s.methods]


TOWER = ["tome@encoder.block[*]:keep=0.5"]
BOTH = [*TOWER, "visionzip@encoder.out:keep=12,context=4"]


@pytest.mark.parametrize("decoder", [llama, gpt2], ids=["rotary", "learned positions"])
@pytest.mark.parametrize("specs", [TOWER, BOTH, ["pool@encoder.out:stride=2"], ["divprune@projector.out:keep=10"]],
                         ids=["merge", "compose", "pool", "projector"])
def test_the_decoder_numbers_what_is_left(decoder: Any, specs: list[str]) -> None:
    model, (pixels, before, after) = build(decoder), feeds(batch=2)
    program = compress(captured(decoder, batch=2), *specs)
    visual = visual_tokens(model, pixels, *specs)
    assert visual.shape[1] < PATCHES
    decoder_sites = [s for s in program.sites if s.name.startswith("decoder")]
    assert {s.tokens_in for s in decoder_sites} == {BEFORE + visual.shape[1] + AFTER}
    with torch.no_grad():
        expected = model.decode(model.tokens(before, after, visual), None)
        close(program.module()(pixels, before, after), expected)


@pytest.mark.parametrize("decoder", [llama, gpt2], ids=["rotary", "learned positions"])
def test_padding_stays_with_its_tokens(decoder: Any) -> None:
    specs = BOTH
    model, (pixels, before, after, mask) = build(decoder), feeds(batch=3, masked=True)
    program = compress(captured(decoder, batch=3, masked=True), *specs)
    visual = visual_tokens(model, pixels, *specs)
    shorter = torch.cat([mask[:, :BEFORE], mask.new_ones(3, visual.shape[1]), mask[:, -AFTER:]], 1)
    with torch.no_grad():
        expected = model.decode(model.tokens(before, after, visual), shorter)
        close(program.module()(pixels, before, after, mask), expected)


def test_encoder_projector_and_decoder_compose() -> None:
    model, (pixels, before, after) = build(), feeds()
    specs = [*BOTH, "fastv@decoder.block[2]:keep=6"]
    program = compress(captured(), *specs)
    assert counts(program)[-2:] == [("encoder.out", 33, 17), ("decoder.block[2]", BEFORE + 16 + AFTER, BEFORE + 6 + AFTER)]

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm = model.llm

        def forward(self, embeds: Tensor) -> Tensor:
            return self.llm(inputs_embeds=embeds, use_cache=False).logits[:, -1]

    with torch.no_grad():
        embeds = model.tokens(before, after, visual_tokens(model, pixels, *BOTH))
        spec = f"fastv@decoder.block[2]:keep=6,span={BEFORE}:{BEFORE + 16}"
        alone = compress(edgewise.capture(Decoder().eval(), (embeds,)), spec)
        close(program.module()(pixels, before, after), alone.module()(embeds))


def test_the_graph_says_where_the_picture_is() -> None:
    program = captured()
    told = compress(program, f"fastv@decoder.block[2]:keep=16,span={BEFORE}:{BEFORE + PATCHES}")
    found = compress(program, "fastv@decoder.block[2]:keep=16")
    assert counts(told) == counts(found) == [("decoder.block[2]", 76, 28)]
    with torch.no_grad():
        assert torch.equal(told.module()(*feeds()), found.module()(*feeds()))
    with pytest.raises(InputError, match=r"span=5:69 is out of range.*<= 44"):
        compress(program, *TOWER, "fastv@decoder.block[2]:keep=8,span=5:69")


def test_two_pictures() -> None:
    model, (pixels, before, after) = build(pictures=2), feeds(pictures=2)
    program = captured(pictures=2)
    towers = [s.name for s in program.analysis.streams if s.role == "vision_encoder"]
    assert len(towers) == 2
    specs = [f"visionzip@{towers[0]}.out:keep=12,context=4", f"topk@{towers[1]}.out:keep=20"]
    short = compress(program, *specs)
    assert {s.tokens_in for s in short.sites if s.name.startswith("decoder")} == {BEFORE + 16 + 20 + AFTER}
    left, right = pixels.chunk(2, 1)
    visual = [visual_tokens(model, picture, spec.replace(tower, "encoder"))
              for picture, spec, tower in zip((left, right), specs, towers, strict=True)]
    with torch.no_grad():
        close(short.module()(pixels, before, after), model.decode(model.tokens(before, after, *visual), None))
    with pytest.raises(InputError, match="span"):  # of two pictures, which one?
        compress(program, "fastv@decoder.block[2]:keep=16")


def test_what_reads_the_picture_by_position_is_named() -> None:
    class Reads(Model):
        def forward(self, pixel_values: Tensor, before: Tensor, after: Tensor) -> Tensor:  # type: ignore[override]
            embeds = self.tokens(before, after, self.vision(pixel_values))
            return self.llm(inputs_embeds=embeds, use_cache=False).logits[:, BEFORE + 40]

    torch.manual_seed(0)
    with pytest.raises(Refused, match="by their position"):
        compress(edgewise.capture(Reads(llama()).eval(), feeds()), *TOWER)


def test_tokens_that_change_places_are_refused() -> None:
    """The class token goes from the front to the end: as many tokens, each at another place."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = CLIPVisionModel(Tower().tower.config)
            self.table = nn.Parameter(torch.randn(1, PATCHES + 1, 32))
            self.extra = nn.Parameter(torch.randn(1, 1, 32))

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.vision(pixel_values).last_hidden_state
            return torch.cat([x[:, 1:], self.extra], 1) + self.table

    torch.manual_seed(0)
    with pytest.raises(Refused, match="other positions"):
        compress(edgewise.capture(Turned().eval(), (torch.randn(1, 3, 32, 32),)), "topk@encoder.block[1]:keep=0.5")


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_one_artifact(target: str, tmp_path: Any) -> None:
    bundle = edgewise.export(build(), tmp_path / "vlm", example=feeds(), targets=[target],
                             compress=[*BOTH, "fastv@decoder.block[2]:keep=6"], cache=False)
    rungs = [r for r in bundle.manifest.verification if r.kind == "lowering"]
    assert rungs and all(e.relative < 1e-4 for r in rungs for e in r.outputs.values())
