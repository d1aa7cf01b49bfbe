"""Export of a vision-language model: every component as an export of its own, then the pipeline that joins them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.bundle.manifest import Manifest
from edgewise.bundle.pipeline import CacheLayer, Pipeline
from edgewise.errors import InputError, Refused
from edgewise.exporter.capture import quiet
from edgewise.exporter.export import Job, build_component, finish
from edgewise.exporter.pipeline.language import describe_text, eos_ids
from edgewise.exporter.pipeline.seam import Prompt, Seam, caches, decode_position, learn, random_prompt
from edgewise.exporter.pipeline.vision_language import Decode, Prefill, VisionEncoder
from edgewise.exporter.sources import Source
from edgewise.passes.plan import parse_spec
from edgewise.passes.program import Program
from edgewise.verify.ladder import Rung

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


@dataclass
class _Build:
    job: Job
    folder: Path

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
        if vision_specs and not seam.dense:
            raise Refused(
                "this model gives each image token a place in height and width, and compression in front of the decoder does not "
                "carry those yet; compress inside of the decoder",
                method=vision_specs[0],
            )
        encoder = Source("", "", module=VisionEncoder(model, settled), args=(pixels,), samples=self._images(pixels))
        built = [self._component("vision_encoder", encoder, vision_specs)]
        visuals = [self._run(built[0][1], {"pixel_values": one})["visual"] for one in self._some(encoder, pixels)]
        count = visuals[0].shape[1]
        if count != seam.offsets.shape[1]:
            seam = replace(seam, offsets=torch.arange(count)[None].numpy(), advance=count)
        prompts = [random_prompt(model, image, bucket, n, recipe.seed + n) for n in (bucket, max(1, bucket // 2), 1)]
        prefill_samples = [
            {"visual": visuals[i % len(visuals)], **prompt.feeds(seam, bucket)} for i, prompt in enumerate(prompts)
        ]
        prefill = _source(Prefill(model, seam.rule), prefill_samples)
        built.append(self._component("prefill", prefill, [f"{s}{',' if ':' in s else ':'}span=0:{count}" for s in decoder_specs]))
        steps = [self._decode_inputs(built[1][1], *pair, seam, room) for pair in zip(prefill_samples, prompts, strict=True)]
        built.append(self._component("decode", _source(Decode(model, bucket, room), steps[1:]), ()))
        layers = _layers(built[2][0], bucket, room)
        text = describe_text(self.job.source, image, self.folder)
        pipeline = Pipeline(
            kind="vision-language",
            order=ORDER,
            prompt_tokens=bucket,
            new_tokens=room,
            media_tokens=count,
            media_positions=() if seam.dense else tuple(tuple(map(int, row)) for row in seam.offsets),
            media_advance=seam.advance,
            placeholder_id=image,
            eos_ids=eos_ids(model),
            caches=layers,
            **text,
        )
        manifest = self._joined([m for m, _ in built], rung, pipeline, model)
        finish(manifest, [program for _, program in built], self.job, self.folder)
        return manifest

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
            if not spec.method.pads or spec.method.positions != "kept":
                raise Refused(
                    "a prompt's bucket is padded and its tokens keep their positions, which this method does not "
                    "understand: use fastv",
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

    def _component(self, role: str, source: Source, specs: Sequence[str]) -> tuple[Manifest, Program]:
        """Export one component, as if it were all of a bundle."""
        whole = self.job
        source.role, source.name, source.class_name = role, whole.source.name, whole.source.class_name
        part = Job(
            whole.recipe.model_copy(update={"compress": tuple(specs)}), source, whole.chosen, None, whole.cache, whole.weights
        )
        turn = ORDER.index(role)
        if whole.progress is not None:
            tell = whole.progress
            part.progress = lambda done, total, text: tell(turn * total + done, len(ORDER) * total, f"{role}: {text}")
        return build_component(part, self.folder)

    def _run(self, program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), quiet():
            made = program.module()(*inputs.values()) if len(inputs) == 1 else program.module()(**inputs)
        return dict(made)

    def _decode_inputs(self, program: Program, feeds: dict[str, Tensor], prompt: Prompt, seam: Seam, room: int) -> dict[str, Any]:
        """Inputs of decode behind a prompt: the caches that prefill makes, and a few new tokens in them."""
        key, value = caches(self._run(program, feeds), room)
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

    def _joined(self, parts: Sequence[Manifest], seam: Rung, pipeline: Pipeline, model: nn.Module) -> Manifest:
        """One manifest of all components."""
        first = parts[0]
        digests = "".join(part.model.weights_digest for part in parts)
        rungs = [seam]
        for role, part in zip(ORDER, parts, strict=True):
            artifacts = {a.label for a in part.targets}
            for one in part.verification:
                own = one.name.split(",")[0] in artifacts
                rungs.append(one if own else one.model_copy(update={"name": f"{role}: {one.name}"}))
        return first.model_copy(
            update={
                "model": first.model.model_copy(
                    update={
                        "parameters": sum(p.numel() for p in model.parameters()),
                        "weights_digest": hashlib.sha256(digests.encode()).hexdigest(),
                    }
                ),
                "compress": self.job.recipe.compress,
                "components": tuple(c for part in parts for c in part.components),
                "pipeline": pipeline,
                "preprocessing": self.job.source.preprocessing,
                "targets": tuple(a for part in parts for a in part.targets),
                "verification": tuple(rungs),
                "notes": tuple(dict.fromkeys((*self.job.source.notes, *(n for part in parts for n in part.notes)))),
                "golden": {role: path for part in parts for role, path in part.golden.items()},
            }
        )


def _source(module: nn.Module, samples: Sequence[Mapping[str, Any]]) -> Source:
    """A component with its example, which is the first sample, and all samples under the names that capture gives them."""
    flat: dict[str, list[Any]] = {}
    for sample in samples:
        for name, value in sample.items():
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                flat.setdefault(f"{name}_{i}" if isinstance(value, list) else name, []).append(one.numpy())
    return Source("", "", module=module, kwargs=dict(samples[0]), samples={k: np.concatenate(v) for k, v in flat.items()})


def _layers(decode: Manifest, bucket: int, room: int) -> tuple[CacheLayer, ...]:
    """The caches, as the decode graph takes them."""
    shapes = {info.name: info for info in decode.components[0].inputs}
    layers: list[CacheLayer] = []
    while f"past_key_{len(layers)}" in shapes:
        pair = [shapes[f"past_{kind}_{len(layers)}"] for kind in ("key", "value")]
        size = sum(torch.Size(info.shape).numel() * torch.empty(0, dtype=getattr(torch, info.dtype)).itemsize for info in pair)
        slots = pair[0].shape[2]
        layers.append(CacheLayer(media=slots - room - bucket, tokens=slots - room, slots=slots, bytes=size))
    return tuple(layers)
