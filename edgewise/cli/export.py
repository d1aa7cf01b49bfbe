"""`edgewise export`: a model becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options, tables
from edgewise.cli.screen import Result, Screen
from edgewise.errors import InputError


def export(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="BUNDLE", help="Folder of the new bundle. Required.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="What to lower to. Repeatable. Default: openvino. See `edgewise targets`."),
    ] = None,
    compress: options.Compress = None,
    compress_variant: Annotated[
        list[str] | None,
        typer.Option(
            "--compress-variant",
            metavar="[NAME=]SPEC",
            help="Another compression as a further function of the same artifact, whose weights it shares: SPEC [+ SPEC], or none. "
            "Repeatable.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="P",
            help="fp32, fp16, or another of `edgewise targets`; by component: w8a16,vision_encoder=w8a8. Default: fp32.",
        ),
    ] = None,
    image_input: Annotated[
        bool | None,
        typer.Option("--image-input", help="Let the artifact take an image, with its processor's constants folded in: coreml."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="DEVICE", help="Build for this device ahead of time: sm86, sm89, sm120, ... Repeatable."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option("--calib", metavar="SRC", help=f"Calibration data, for precisions that need some. {options.DATA_HELP}"),
    ] = None,
    calib_samples: Annotated[
        int | None, typer.Option("--calib-samples", metavar="N", min=1, help="Most samples of the statistics. Default: 128.")
    ] = None,
    skip_quant: Annotated[
        list[str] | None,
        typer.Option("--skip-quant", metavar="PATTERN", help="Leave layers of this name in floating point: '*.fc2'. Repeatable."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            "--max-drop",
            metavar="D",
            help="Leave layers in floating point, the most sensitive first, until quantisation costs at most this accuracy: 1%.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="A recipe.yaml, or a bundle with one: defaults for all flags."),
    ] = None,
    input_shapes: options.InputShapes = None,
    batch: options.Batch = None,
    images: Annotated[
        int | None, typer.Option("--images", metavar="K", help="Of a generative model: images in every prompt. Default: 1.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", metavar="N", help="Of a generative model: the longest prompt, image aside. Default: 128."),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", metavar="N", help="Of a generative model: the most it generates. Default: 128.")
    ] = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Lower anew, and remember nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Export MODEL to a bundle: compressed, lowered to every target, verified, written whole or not at all."""
    screen = Screen(json, quiet)
    if out is None:
        raise InputError("no place for the bundle: give -o BUNDLE (see edgewise export --help)")
    from edgewise.exporter.export import export as make
    from edgewise.exporter.matrix import read_recipe
    from edgewise.exporter.recipe import Recipe
    from edgewise.exporter.sources import parse_shapes

    given = read_recipe(recipe) if recipe is not None else None
    if model is None and given is None:
        raise InputError(f"no model: give MODEL ({options.MODEL_HELP}) or --recipe FILE")
    defaults = given or Recipe(model=str(model), targets=("openvino",))
    with screen.progress() as step:
        bundle = make(
            defaults.model if model is None else model,
            out,
            targets=target or defaults.targets,
            compress=compress or defaults.compress,
            compress_variants=compress_variant or defaults.compress_variants,
            precision=defaults.precision if precision is None else precision,
            image_input=defaults.image_input if image_input is None else image_input,
            calibration=calib or defaults.calibration,
            calibration_samples=calib_samples or defaults.calibration_samples,
            skip_quant=skip_quant or defaults.skip_quant,
            max_drop=defaults.max_drop if max_drop is None else max_drop,
            devices=device or defaults.devices,
            input_shapes=parse_shapes(input_shapes) if input_shapes else defaults.input_shapes,
            batch=defaults.batch if batch is None else batch,
            images=defaults.images if images is None else images,
            prompt_tokens=defaults.prompt_tokens if prompt_tokens is None else prompt_tokens,
            new_tokens=defaults.new_tokens if new_tokens is None else new_tokens,
            seed=defaults.seed if seed is None else seed,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
            cache=not no_cache,
            progress=step,
        )
    manifest = bundle.manifest
    for component in manifest.components:
        if component.sites:
            screen.show(tables.sites(component))
        screen.show(tables.cost(component))
    screen.show(*tables.caches(manifest))
    screen.show(tables.ladder(manifest.verification), tables.artifacts(bundle))
    screen.show(*tables.quantised(bundle), *tables.notes(manifest))
    for artifact in manifest.targets:
        for warning in artifact.warnings:
            screen.say(f"warning: {artifact.label}: {warning}")
    screen.show(f"wrote {out}; next: edgewise bench {out}")
    return Result(
        {
            "bundle": str(out),
            "model": manifest.model.model_dump(mode="json"),
            "compress": list(manifest.compress),
            "components": [component.model_dump(mode="json") for component in manifest.components],
            "verification": [rung.model_dump(mode="json") for rung in manifest.verification],
            "notes": list(manifest.notes),
            "artifacts": [
                {**artifact.model_dump(mode="json"), "bytes": tables.artifact_sizes(bundle)[artifact.label]}
                for artifact in manifest.targets
            ],
        }
    )
