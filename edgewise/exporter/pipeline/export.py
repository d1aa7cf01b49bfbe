"""Export of a vision-language model: every component as an export of its own, then the pipeline that joins them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewise.bundle.manifest import Manifest
from edgewise.bundle.pipeline import CacheLayer, Pipeline, Stage
from edgewise.errors import InputError, Refused
from edgewise.exporter.job import Job
from edgewise.exporter.pipeline.decoder import check_windows
from edgewise.exporter.pipeline.language import describe_text, eos_ids
from edgewise.exporter.pipeline.parts import Build, cache_layers, flops_of, run, source_of
from edgewise.exporter.pipeline.seam import Prompt, Seam, caches, decode_position, learn, random_prompt
from edgewise.exporter.pipeline.vision_language import Decode, Prefill, VisionEncoder
from edgewise.exporter.sources import Source
from edgewise.ops import METHODS
from edgewise.passes.plan import parse_spec
from edgewise.passes.program import Program

ORDER = ("vision_encoder", "prefill", "decode")
PROMPT_TOKENS, NEW_TOKENS = 128, 128
"""The prompt's bucket and the room for new tokens, where none is asked for."""


def is_pipeline(source: Source) -> bool:
    """Whether a model is generated from, and takes images: it can give their features, and it has a decoder."""
    module: Any = source.module
    return (
        module is not None
        and all(callable(getattr(module, name, None)) for name in ("get_image_features", "get_decoder", "can_generate", "generate"))
        and bool(module.can_generate())
        and placeholder_of(module) is not None
    )


def placeholder_of(model: nn.Module) -> int | None:
    """The id of the token that stands for an image's tokens."""
    config: Any = model.config
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else int(found)


def build_pipeline(job: Job, folder: Path) -> Manifest:
    """Build all of a bundle but its manifest file."""
    return _Build(job, folder).run()


class _Build(Build):
    order = ORDER

    def run(self) -> Manifest:
        model = self.job.source.module
        assert model is not None
        image = placeholder_of(model)
        assert image is not None
        recipe = self.job.recipe
        bucket, room = recipe.prompt_tokens or PROMPT_TOKENS, recipe.new_tokens or NEW_TOKENS
        vision_specs, decoder_specs = self._divided()
        pixels, settled = self._image(model)
        self.job.step("run the whole model")
        seam, rung = learn(model, pixels, settled, image, bucket, recipe.seed)
        anew = next((s for s in decoder_specs if parse_spec(s).method.positions == "dense"), None)
        if anew is not None and not seam.dense:
            raise Refused(
                "it numbers the tokens that are left anew, and this model gives each image token a place in height and width: use "
                "fastv, sparsevlm or dart",
                method=anew,
            )
        places = torch.from_numpy(seam.offsets) if vision_specs and not seam.dense else None
        encoder = Source("", "", module=VisionEncoder(model, settled, places), args=(pixels,), samples=self._images(pixels))
        encoder.tokens = "visual"
        program = self._encoder(encoder, vision_specs)
        encoded = [run(program, {"pixel_values": one}) for one in self._some(encoder, pixels)]
        count, whole = encoded[0]["visual"].shape[1], seam
        check_windows(model.get_decoder().config, seam.offsets.shape[1] + bucket + room)  # type: ignore[operator]
        if seam.dense:
            seam = replace(seam, offsets=torch.arange(count)[None].numpy(), advance=count)
        seams = [replace(seam, offsets=one["visual_position"][0].numpy()) if "visual_position" in one else seam for one in encoded]
        prompts = [random_prompt(model, image, bucket, n, recipe.seed + n) for n in (bucket, max(1, bucket // 2), 1)]
        turns = [i % len(encoded) for i in range(len(prompts))]
        prefill_samples = [
            {"visual": encoded[i]["visual"], **prompt.feeds(seams[i], bucket)} for i, prompt in zip(turns, prompts, strict=True)
        ]
        prefill = source_of(Prefill(model, seam.rule), prefill_samples)
        prefill.order = ("visual_position", "position")
        spans = [f"{s}{',' if ':' in s else ':'}span=0:{count}" for s in decoder_specs]
        program = self.component("prefill", prefill, spans)
        steps = [self._decode_inputs(program, *pair, seam, room) for pair in zip(prefill_samples, prompts, strict=True)]
        self.component("decode", source_of(Decode(model, bucket, room), steps[1:]))
        layers = cache_layers(self.parts[2], bucket, room)
        text = describe_text(self.job.source, image, self.folder)
        pipeline = Pipeline(
            kind="vision-language",
            order=ORDER,
            prompt_tokens=bucket,
            new_tokens=room,
            media_tokens=count,
            media_positions=() if seam.dense or places is not None else tuple(tuple(map(int, row)) for row in seam.offsets),
            media_advance=seam.advance,
            placeholder_id=image,
            eos_ids=eos_ids(model),
            caches=layers,
            stages=self._stages(model, whole, layers, prompts[0], steps[0], bucket, room),
            **text,
        )
        return self.joined(rung, pipeline, model)

    def _stages(
        self,
        model: nn.Module,
        whole: Seam,
        layers: tuple[CacheLayer, ...],
        prompt: Prompt,
        step: dict[str, Any],
        bucket: int,
        room: int,
    ) -> tuple[Stage, ...]:
        """What compression makes of each component; `whole` is the seam with all tokens, `step` the inputs of decode."""
        (encoder,), (prefill,), (decode,) = (part.components for part in self.parts)
        every = whole.offsets.shape[1]
        before = [encoder.flops_before, prefill.flops_before, decode.flops_before]
        if every != layers[0].media:
            width = next(info.shape[-1] for info in prefill.inputs if info.name == "visual")
            visual = torch.zeros(1, every, width)
            before[1] = flops_of(Prefill(model, whole.rule), {"visual": visual, **prompt.feeds(whole, bucket)})
        slots, size = every + bucket + room, sum(layer.bytes // layer.slots for layer in layers)
        if any(layer.media != every for layer in layers):
            past = {k: [t.new_zeros(*t.shape[:2], slots, t.shape[3]) for t in step[k]] for k in ("past_key", "past_value")}
            before[2] = flops_of(Decode(model, bucket, room), {**step, **past})
        left, cached = min(layer.media for layer in layers), sum(layer.bytes for layer in layers)
        return tuple(
            Stage(
                role=one.role,
                tokens_before=every,
                tokens=layers[0].media if one is encoder else left,
                flops_before=count,
                flops=one.flops_after,
                cache_bytes_before=0 if one is encoder else slots * size,
                cache_bytes=0 if one is encoder else cached,
            )
            for one, count in zip((encoder, prefill, decode), before, strict=True)
        )

    def _encoder(self, encoder: Source, specs: list[str]) -> Program:
        """Export the encoder. Where its projector stands in the way, say what is behind it."""
        try:
            return self.component("vision_encoder", encoder, specs)
        except Refused as error:
            if not specs or all((parse_spec(spec).site or "").startswith("projector.out") for spec in specs):
                raise
            pooled = encoder.module.places is None  # type: ignore[union-attr]
            free = sorted(
                name for name, one in METHODS.items() if "projector" in one.sites and not one.needs and (one.represented or pooled)
            )
            raise Refused(
                f"{error.reason}. Behind the projector any model can be compressed (divprune@projector.out:keep=...; also "
                f"{', '.join(n for n in free if n != 'divprune')}), and in its decoder (fastv, sparsevlm, dart, pyramiddrop)",
                method=error.method, node=error.node, source=error.source,
            ) from error

    def _divided(self) -> tuple[list[str], list[str]]:
        """The compression specs of the encoder and of the decoder."""
        vision, decoder = [], []
        for text in self.job.recipe.compress:
            spec = parse_spec(text)
            inside = spec.site.startswith("decoder.") if spec.site else spec.method.sites == ("decoder",)
            if not inside:
                vision.append(text)
                continue
            if "span" in spec.parameters:
                raise InputError(f"{text!r}: leave span out, as the pipeline knows which tokens are the image's")
            if not spec.method.pads_tail:
                known = sorted(name for name, method in METHODS.items() if method.pads_tail)
                raise Refused(
                    f"a prompt's bucket is padded, which this method does not understand: use {' or '.join(known)}",
                    method=spec.method.name,
                )
            decoder.append(text)
        return vision, decoder

    def _image(self, model: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        """The example image, and what else the model must be told of its shape."""
        given = self.job.source.kwargs
        if "pixel_values" not in given:
            raise InputError(
                f"{type(model).__name__} takes images as pixel_values: give an example (example={{'pixel_values': tensor}}), or "
                "--input-shapes pixel_values=AxBxC"
            )
        others = {k: v for k, v in given.items() if k not in ("pixel_values", "input_ids", "attention_mask")}
        return given["pixel_values"], others

    def _images(self, pixels: Tensor) -> dict[str, Any]:
        samples = self.job.source.samples.get("pixel_values")
        return {} if samples is None or samples.shape[1:] != pixels.shape[1:] else {"pixel_values": samples}

    def _some(self, encoder: Source, pixels: Tensor) -> list[Tensor]:
        """A few images whose tokens the decoder is verified with."""
        real = encoder.samples.get("pixel_values")
        if real is None:
            generator = torch.Generator().manual_seed(self.job.recipe.seed)
            return [pixels, torch.randn(pixels.shape, generator=generator)]
        return [torch.from_numpy(real[i : i + 1].copy()) for i in range(min(2, len(real)))]

    def _decode_inputs(self, program: Program, feeds: dict[str, Tensor], prompt: Prompt, seam: Seam, room: int) -> dict[str, Any]:
        """Inputs of decode behind a prompt: the caches that prefill makes, and a few new tokens in them."""
        key, value = caches(run(program, feeds), room)
        step = min(2, room - 1)
        for cache in (*key, *value):
            end = cache.shape[2] - room
            cache[:, :, end : end + step] = cache[:, :, end - 1 : end]
        return {
            "input_ids": torch.tensor([[(*prompt.after, *prompt.before)[0]]]),
            "position": decode_position(seam, prompt.next_position(seam) + step),
            "length": torch.tensor([len(prompt.before) + len(prompt.after)]),
            "step": torch.tensor([step]),
            "past_key": key,
            "past_value": value,
        }
