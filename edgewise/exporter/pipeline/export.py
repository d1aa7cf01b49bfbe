"""Export of a model that answers about media: every component as an export of its own, then the pipeline that joins them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cached_property
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
from edgewise.exporter.pipeline.media import AUDIO, IMAGE, VIDEO, Media
from edgewise.exporter.pipeline.parts import Build, cache_layers, flops_of, run, source_of
from edgewise.exporter.pipeline.seam import Prompt, Seam, caches, decode_position, learn, random_prompt
from edgewise.exporter.pipeline.vision_language import Decode, features_of
from edgewise.exporter.sources import Source
from edgewise.ops import METHODS
from edgewise.passes.plan import parse_spec
from edgewise.passes.program import Program
from edgewise.runtime.places import items_axis

PROMPT_TOKENS, NEW_TOKENS = 128, 128
"""The prompt's bucket and the room for new tokens, where none is asked for."""


def is_pipeline(source: Source) -> bool:
    """Whether a model is generated from, and takes images, videos or recordings."""
    return media_of(source) is not None


def media_of(source: Source) -> Media | None:
    """What media a model answers about, by its placeholder and its example; None if it generates no text, or not from these."""
    module: Any = source.module
    needed = ("get_decoder", "can_generate", "generate")
    if module is None or not all(callable(getattr(module, name, None)) for name in needed):
        return None
    if not module.can_generate() or getattr(module.config, "is_encoder_decoder", False):
        return None
    known = [IMAGE] if features_of(module, "image") else []
    known += [VIDEO] if features_of(module, "video") else []
    known += [AUDIO] if AUDIO.argument in inspect.signature(module.forward).parameters else []
    known = [media for media in known if media.placeholder(module) is not None]
    return next((media for media in known if media.argument in source.kwargs), known[0] if known else None)


def build_pipeline(job: Job, folder: Path) -> Manifest:
    """Build all of a bundle but its manifest file."""
    return _Build(job, folder).build()


class _Build(Build):
    @cached_property
    def media(self) -> Media:
        media = media_of(self.job.source)
        assert media is not None
        return media

    @property
    def kind(self) -> str:
        return self.media.kind

    @property
    def order(self) -> tuple[str, ...]:
        return self.media.order

    def run(self) -> Manifest:
        model, media = self.job.source.module, self.media
        assert model is not None
        token = media.placeholder(model)
        assert token is not None
        recipe = self.job.recipe
        bucket, room, items = recipe.prompt_tokens or PROMPT_TOKENS, recipe.new_tokens or NEW_TOKENS, recipe.images
        if items > 1 and media is not IMAGE:
            raise InputError(f"{type(model).__name__} is exported for one {media.noun} in a prompt: leave --images out")
        encoder_specs, decoder_specs = self._divided()
        example, settled = self._example(model)
        self.job.source.preprocessing = {**media.constants(model, example), **self.job.source.preprocessing}
        self.job.step("run the whole model")
        seam, rung = learn(media, model, example, settled, bucket, recipe.seed, items)
        anew = next((s for s in decoder_specs if parse_spec(s).method.positions == "dense"), None)
        if anew is not None and not seam.dense:
            raise Refused(
                "it numbers the tokens that are left anew, and this model gives each image token a place in height and width: use "
                "fastv, sparsevlm or dart",
                method=anew,
            )
        places = torch.from_numpy(seam.offsets) if encoder_specs and not seam.dense else None
        module = media.encoder(model, settled, places, items)
        encoder = Source("", "", module=module, args=(example,), samples=self._samples(example), tokens=media.tokens)
        encoder.grid = seam.grid
        program = self._encoder(encoder, encoder_specs)
        encoded = [run(program, {media.argument: one}) for one in self._some(encoder, example)]
        count, whole = encoded[0][media.tokens].shape[1], seam
        check_windows(model.get_decoder().config, items * seam.count + bucket + room)  # type: ignore[operator]
        if seam.dense:
            seam = replace(seam, offsets=torch.arange(count)[None].numpy(), advance=count)
        prompts = [random_prompt(model, token, items, bucket, n, recipe.seed + n) for n in (bucket, max(1, bucket // 2), 1)]
        turns = [i % len(encoded) for i in range(len(prompts))]
        prefill_samples = [
            {
                media.tokens: encoded[i][media.tokens].flatten(0, 1)[None],
                **prompt.feeds(seam, bucket, media.position, encoded[i].get(media.position)),
            }
            for i, prompt in zip(turns, prompts, strict=True)
        ]
        prefill = source_of(media.prefill(model, seam.rule, items), prefill_samples)
        prefill.order = (media.position, "position")
        spans = [f"{s}{',' if ':' in s else ':'}span=0:{items * count}" for s in decoder_specs]
        program = self.component("prefill", prefill, spans)
        steps = [self._decode_inputs(program, *pair, seam, room) for pair in zip(prefill_samples, prompts, strict=True)]
        self.component("decode", source_of(Decode(model, bucket, room), steps[1:]), room=room)
        layers = cache_layers(self.parts[2], bucket, room)
        text = describe_text(self.job.source, token, self.folder, media.chat, items)
        text["settings"] = {
            "processor_tokens": whole.count,
            **text.get("settings", {}),
            **media.settings(model, example, settled, self.job.source.preprocessing),
        }
        pipeline = Pipeline(
            kind=media.kind,
            order=media.order,
            prompt_tokens=bucket,
            new_tokens=room,
            media_tokens=count,
            media_items=items,
            media_positions=() if seam.dense or places is not None else tuple(tuple(map(int, row)) for row in seam.offsets),
            media_advance=seam.advance,
            placeholder_id=token,
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
        media, items = self.media, self.job.recipe.images
        (encoder,), (prefill,), (decode,) = (part.components for part in self.parts)
        every = items * whole.count
        before = [encoder.flops_before, prefill.flops_before, decode.flops_before]
        if every != layers[0].media:
            width = next(info.shape[-1] for info in prefill.inputs if info.name == media.tokens)
            feeds = {media.tokens: torch.zeros(1, every, width), **prompt.feeds(whole, bucket, media.position)}
            before[1] = flops_of(media.prefill(model, whole.rule, items), feeds)
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
            return self.component(self.media.role, encoder, specs)
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
        encoder, decoder = [], []
        for text in self.job.recipe.compress:
            spec = parse_spec(text)
            inside = spec.site.startswith("decoder.") if spec.site else spec.method.sites == ("decoder",)
            if not inside:
                encoder.append(text)
                continue
            if "span" in spec.parameters:
                raise InputError(f"{text!r}: leave span out, as the pipeline knows which tokens are those of the {self.media.noun}")
            if not spec.method.pads_tail:
                known = sorted(name for name, method in METHODS.items() if method.pads_tail)
                raise Refused(
                    f"a prompt's bucket is padded, which this method does not understand: use {' or '.join(known)}",
                    method=spec.method.name,
                )
            decoder.append(text)
        return encoder, decoder

    def _example(self, model: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        """The example of an image or a recording, and what else the model must be told of its shape."""
        given, name = self.job.source.kwargs, self.media.argument
        if name not in given:
            raise InputError(
                f"{type(model).__name__} takes a {self.media.noun} as {name}: give an example (example={{'{name}': tensor}}), or "
                f"--input-shapes {name}=AxBxC"
            )
        others = {k: v for k, v in given.items() if k not in (name, "input_ids", "attention_mask")}
        shape, items = given[name].shape, self.job.recipe.images
        if shape[items_axis(shape, items)] % items:
            raise InputError(
                f"{name} of the example has shape {list(shape)}, which are not {items} images (--images): give so many"
            )
        prompts = given.get("input_ids")
        if self.media is AUDIO and shape[0] > 1 and (prompts is None or len(prompts) > 1):
            raise InputError(
                f"{name} of the example has shape {list(shape)}: give one recording (several windows of one go with the input_ids "
                "of one prompt)"
            )
        return given[name], self.media.settled(model, given[name], others)

    def _samples(self, example: Tensor) -> dict[str, Any]:
        name = self.media.argument
        samples = self.job.source.samples.get(name)
        return {} if samples is None or samples.shape[1:] != example.shape[1:] else {name: samples}

    def _some(self, encoder: Source, example: Tensor) -> list[Tensor]:
        """A few images or recordings whose tokens the decoder is verified with."""
        real = encoder.samples.get(self.media.argument)
        if real is None:
            generator = torch.Generator().manual_seed(self.job.recipe.seed)
            return [example, torch.randn(example.shape, generator=generator)]
        size = len(example)
        return [torch.from_numpy(real[i : i + size].copy()) for i in range(0, min(2 * size, len(real) - size + 1), size)]

    def _decode_inputs(self, program: Program, feeds: dict[str, Tensor], prompt: Prompt, seam: Seam, room: int) -> dict[str, Any]:
        """Inputs of decode behind a prompt: the caches that prefill makes, and a few new tokens in them."""
        key, value = caches(run(program, feeds), room)
        step = min(2, room - 1)
        for cache in (*key, *value):
            end = cache.shape[2] - room
            cache[:, :, end : end + step] = cache[:, :, end - 1 : end]
        return {
            "input_ids": torch.tensor([[prompt.texts[-1][0]]]),
            "position": decode_position(seam, prompt.next_position(seam) + step),
            "length": torch.tensor([prompt.length]),
            "step": torch.tensor([step]),
            "past_key": key,
            "past_value": value,
        }
