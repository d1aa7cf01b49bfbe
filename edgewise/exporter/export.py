"""An export: what is asked for is checked, and a bundle is built and written, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from edgewise import targets as target_registry
from edgewise.bundle.manifest import Manifest
from edgewise.bundle.reader import Bundle
from edgewise.bundle.writer import write_bundle
from edgewise.calibration.control import parse_drop
from edgewise.calibration.samples import DEFAULT_SAMPLES
from edgewise.errors import InputError
from edgewise.exporter.cache import Cache
from edgewise.exporter.component import build_component, finish
from edgewise.exporter.job import Job, Progress
from edgewise.exporter.precisions import parse_precisions
from edgewise.exporter.quantise import Wish
from edgewise.exporter.quantise import check as check_wish
from edgewise.exporter.recipe import Recipe
from edgewise.exporter.sources import Source, load_source
from edgewise.exporter.variant_specs import parse_variants
from edgewise.exporter.variants import build_variants
from edgewise.passes.plan import parse_spec
from edgewise.targets import Target


def export(
    model: str | nn.Module | ExportedProgram,
    out: str | os.PathLike[str],
    *,
    example: Any = None,
    targets: Sequence[str] = ("openvino",),
    compress: str | Sequence[str] | None = None,
    compress_variants: str | Sequence[str] = (),
    precision: str = "fp32",
    image_input: bool = False,
    calibration: Any = None,
    calibration_samples: int = DEFAULT_SAMPLES,
    skip_quant: Sequence[str] = (),
    max_drop: str | float | None = None,
    devices: Sequence[str] = (),
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int = 1,
    images: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    weights_only: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model to a bundle: compressed, lowered to every target, verified, written whole or not at all.

    Args:
        model: what MODEL may be on the command line, an `nn.Module`, or an `ExportedProgram`.
        out: the bundle's folder. A bundle that is there is replaced; anything else is left alone, and an error.
        example: example inputs of an `nn.Module`: a tuple of positional or a dict of keyword arguments.
        targets: names of targets. compress: one or more specs, such as `"tome:keep=0.5"`.
        compress_variants: other compressions, each as `"[NAME=]SPEC [+ SPEC]"` or `"none"`, which become further functions of the
            same artifacts and share their weights; see `edgewise.exporter.variants`.
        precision: one that every target has: `fp32`, `fp16` (weights stored in half precision), `w8a8`, `w8a16`, `w4a16`; or by
            the roles of components, `"w8a16,vision_encoder=w8a8"`.
        image_input: the artifacts take an image, pixels from 0 to 255, and do to it what the processor does after it resized.
        calibration: data for precisions that need some, see `edgewise.calibration.open_source`. Default: a demo's own.
        calibration_samples: the most samples that statistics are gathered of.
        skip_quant: patterns (`*.fc2`) of the names of layers that stay in floating point.
        max_drop: accuracy control, `"1%"` or 0.01: layers stay in floating point, the most sensitive first, until the accuracy on
            labelled samples of `calibration` that the statistics did not see is at most so many points below that of the
            artifact before it was quantised.
        devices: what to build for ahead of time, as far as the targets can: `sm86` for `tensorrt`.
        input_shapes, batch, trust_remote_code, weights_only: see `load_source`.
        images: of a generative model: how many images every prompt has. The example is of as many.
        prompt_tokens, new_tokens: of a generative model: the longest prompt besides the image, and the most tokens generated.
        seed: of example inputs, where no real ones are at hand. cache: reuse lowered artifacts.

    Raises InputError (bad input), Refused (no provably right graph) or CheckFailed (a rung above its threshold).
    """
    specs = (compress,) if isinstance(compress, str) else tuple(compress or ())
    for spec in specs:
        parse_spec(spec)  # what is misspelt is said before the model is loaded
    others = (compress_variants,) if isinstance(compress_variants, str) else tuple(compress_variants)
    parse_variants(specs, others)
    precisions = parse_precisions(precision)
    chosen = _targets(targets, precisions.all, devices)
    if others:
        chosen = [target.for_functions() for target in chosen]
    if image_input:
        chosen = [target.for_images({}) for target in chosen]
    if batch < 1:
        raise InputError(f"batch={batch}: the first dimension of the inputs is 1 or more")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed={seed} is out of range: 0 to {(1 << 63) - 1}")
    for name, count in (("images", images), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if count is not None and count < 1:
            raise InputError(f"{name}={count}: give 1 or more")
    drop = None if max_drop is None else parse_drop(max_drop)
    wish = check_wish(Wish(calibration, calibration_samples, tuple(skip_quant), drop), precisions.all, chosen, model)
    if isinstance(model, str) and example is not None:
        raise InputError("example inputs go with a module; for a named model give input_shapes")
    if progress is not None:
        progress(0, 5 + len(chosen), "load the model")
    if isinstance(model, str):
        source = load_source(
            model,
            input_shapes=input_shapes,
            batch=max(batch, images),
            seed=seed,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
    else:
        source = _given(model, example)
    recipe = Recipe(
        model=source.name,
        compress=specs,
        compress_variants=others,
        image_input=image_input,
        targets=tuple(t.name for t in chosen),
        precision=precision,
        devices=tuple(devices),
        input_shapes={k: tuple(v) for k, v in (input_shapes or {}).items()},
        batch=batch,
        images=images,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        calibration=str(wish.data) if isinstance(wish.data, (str, os.PathLike)) else None,
        calibration_samples=wish.samples,
        skip_quant=wish.skip,
        max_drop=drop,
    )
    job = Job(recipe, source, chosen, progress, Cache() if cache else None, wish=wish, done=1)
    # The place is checked by the writer before any work is done.
    return write_bundle(out, lambda folder: _whole(job, folder))


def _targets(names: Sequence[str], precisions: Sequence[str], devices: Sequence[str]) -> list[Target]:
    if not names:
        raise InputError(f"no target: give one or more of {', '.join(target_registry.names())}")
    found = [target_registry.get(name) for name in dict.fromkeys(names)]
    if devices and not any(target.ahead_of_time for target in found):
        found[0].for_devices(devices)  # says what it cannot do
    chosen = []
    for target in found:
        if devices and target.ahead_of_time:
            target = target.for_devices(devices)
        for precision in precisions:
            target.check_precision(precision)
            target.check(precision=precision)
        chosen.append(target)
    return chosen


def _given(model: nn.Module | ExportedProgram, example: Any) -> Source:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    args, kwargs = (
        ((), dict(example))
        if isinstance(example, Mapping)
        else ((), {})
        if example is None
        else (tuple(example) if isinstance(example, (tuple, list)) else (example,), {})
    )
    if isinstance(model, ExportedProgram):
        return Source(name, type(model).__name__, exported=model, args=args, kwargs=kwargs)
    if example is None:
        raise InputError("example inputs are needed to capture a module: example=(x,) or example={'name': x}")
    return Source(name, type(model).__name__, module=model, args=args, kwargs=kwargs)


def _whole(job: Job, folder: Path) -> Manifest:
    """Build all of a bundle but its manifest file."""
    # They bring transformers, which takes seconds to import.
    from edgewise.exporter.pipeline import export as vision_language
    from edgewise.exporter.pipeline import speech_export as speech

    for kind in (vision_language, speech):
        if kind.is_pipeline(job.source):
            if job.recipe.batch > 1:
                hint = " (several images in a prompt: --images)" if kind is vision_language else ""
                raise InputError(
                    f"{job.source.class_name} answers one prompt at a time: leave --batch {job.recipe.batch} out{hint}"
                )
            if job.recipe.images > 1 and kind is not vision_language:
                raise InputError(f"{job.source.class_name} takes no images: leave --images out")
            if job.recipe.compress_variants:
                raise InputError(
                    f"{job.source.class_name} becomes several components, whose caches are of one compression: leave the variants "
                    "out, and export a bundle for each"
                )
            if job.recipe.image_input:
                name = job.source.class_name
                raise InputError(f"{name} becomes several components, whose inputs are arrays: leave --image-input out")
            return kind.build_pipeline(job, folder)
    if job.recipe.prompt_tokens or job.recipe.new_tokens or job.recipe.images > 1:
        raise InputError(
            f"{job.source.class_name} generates no text: --images, --prompt-tokens and --new-tokens have no meaning for it"
        )
    if job.recipe.compress_variants:
        return build_variants(job, folder)
    manifest, program = build_component(job, folder)
    finish(manifest, [program], job, folder)
    return manifest
