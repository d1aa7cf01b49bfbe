"""`edgewise inspect`: what is in a model, or in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli import options, tables
from edgewise.cli.screen import Result, Screen, flops, row, table
from edgewise.errors import InputError

if TYPE_CHECKING:
    from edgewise.bundle import Bundle
    from edgewise.exporter.sources import Source
    from edgewise.passes.analysis import Stream
    from edgewise.passes.program import Program
    from edgewise.passes.query_modules import QueryModule
    from edgewise.verify.ladder import Rung


def inspect(
    what: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help=f"A bundle's folder, or: {options.MODEL_HELP}.")],
    compress: options.Compress = None,
    function: options.Function = None,
    input_shapes: options.InputShapes = None,
    batch: options.Batch = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Show the streams of tokens of a model, the sites where they may be compressed, and what each part costs.

    With --compress also the counts after. Of a bundle, what its manifest says.
    """
    from edgewise.bundle.manifest import MANIFEST_NAME

    screen = Screen(json, quiet)
    if (Path(what) / MANIFEST_NAME).exists():
        if compress:
            raise InputError(f"{what} is a bundle, and --compress is for models: inspect the model instead")
        return _bundle(Path(what), function, screen)
    if function is not None:
        raise InputError(f"{what} is a model, and functions are of a bundle's artifacts: --function is for those")
    from edgewise.exporter.sources import load_source, parse_shapes

    shapes = parse_shapes(input_shapes or [])
    with screen.progress() as step:
        step(0, 3, "load the model")
        source = load_source(
            what,
            input_shapes=shapes,
            batch=batch or 1,
            seed=seed or 0,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
        step(1, 3, "capture")
        program = _captured(source)
        step(2, 3, "analyse")
        program = _compressed(program, compress or [])
        document = _describe(source, program)
    _show(screen, source, program, document)
    return Result(document)


def _captured(source: Source) -> Program:
    from edgewise.exporter.capture import capture, from_exported

    if source.exported is not None:
        return from_exported(source.exported)
    assert source.module is not None
    return capture(source.module, source.args, source.kwargs)


def _compressed(program: Program, specs: list[str]) -> Program:
    from edgewise.passes.program import compress

    return compress(program, *specs)


def _describe(source: Source, program: Program) -> dict[str, Any]:
    from edgewise.passes.flops import flops_by_part, total_flops

    analysis = program.analysis
    parts, total = flops_by_part(program.base, analysis), total_flops(program.base)
    return {
        "model": source.name,
        "class": source.class_name,
        "role": program.role,
        "compress": [spec.text for spec in program.specs],
        "parameters": sum(tensor.numel() for tensor in source.module.parameters()) if source.module else None,
        "inputs": [
            {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in program.inputs.items()
        ],
        "outputs": list(program.output_names),
        "streams": [_stream(stream) for stream in analysis.streams],
        "sites": [
            {
                "name": site.name,
                "tokens_in": site.tokens_in,
                "tokens_out": site.tokens_out,
                "methods": list(site.methods),
                "side_values": list(site.side_values),
                "refused": site.refused,
            }
            for site in program.sites
        ],
        "attentions_without_site": [
            {"index": index, "node": analysis.anchors[index].softmax.name, "reason": reason}
            for index, reason in sorted(analysis.unplaced.items())
        ],
        "query_modules": [_module(module) for module in analysis.modules],
        "attentions": len(analysis.anchors),
        "flops": {"before": total, "after": total_flops(program.exported)},
        "flops_by_part": parts,
        "notes": [*source.notes, *program.notes],
    }


def _module(module: QueryModule) -> dict[str, Any]:
    from edgewise.passes.graph import describe

    return {
        "kind": module.kind,
        "reads": module.source,
        "keys": module.keys,
        "windows": module.windows,
        "queries": module.queries,
        "tokens_out": module.tokens_out,
        "attentions": len(module.anchors),
        "cross_attentions": len(module.cross),
        "node": describe(module.cross[0].out),
    }


def _stream(stream: Stream) -> dict[str, Any]:
    return {
        "name": stream.name,
        "role": stream.role,
        "tokens": stream.tokens,
        "constant_tokens": stream.prefix,
        "protected_tokens": stream.protected,
        "grid": list(stream.grid) if stream.grid else None,
        "blocks": len(stream.blocks),
        "output_is_read": stream.out_is_read,
    }


def _show(screen: Screen, source: Source, program: Program, document: dict[str, Any]) -> None:
    inputs = ", ".join(f"{one['name']} {'x'.join(map(str, one['shape']))}" for one in document["inputs"])
    screen.show(f"{source.name}: {source.class_name}, role {program.role}, takes {inputs}")
    numbers = ("tokens", "protected", "blocks")
    streams = table("streams of tokens", "stream", "role", *numbers, "grid", "output read", right=numbers)
    for one in document["streams"]:
        grid = "x".join(map(str, one["grid"])) if one["grid"] else None
        read = "yes" if one["output_is_read"] else "protected tokens only"
        row(streams, one["name"], one["role"], one["tokens"], one["protected_tokens"], one["blocks"], grid, read)
    screen.show(streams)
    counts = ("tokens", "in", "out") if program.specs else ("tokens",)
    sites = table("sites", "site", *counts[-2:], "method", "side values", "refused", right=counts)
    for site in document["sites"]:
        tokens = (site["tokens_in"], site["tokens_out"]) if program.specs else (site["tokens_in"],)
        methods, sides = "+".join(site["methods"]) or None, ", ".join(site["side_values"]) or None
        row(sites, site["name"], *tokens, methods, sides, site["refused"])
    screen.show(sites)
    if document["query_modules"]:
        made = table("query modules", "kind", "reads", "windows", "tokens in each", "queries", "tokens out", "attentions",
                     right=("windows", "tokens in each", "queries", "tokens out"))
        for one in document["query_modules"]:
            attentions = f"{one['attentions']}, {one['cross_attentions']} cross"
            row(made, one["kind"], one["reads"], one["windows"], one["keys"], one["queries"], one["tokens_out"], attentions)
        screen.show(made)
    unplaced = document["attentions_without_site"]
    if unplaced:
        made = table("attentions that belong to no site", "index", "node", "reason", right=("index",))
        for one in unplaced:
            row(made, one["index"], one["node"], one["reason"])
        screen.show(made)
    before, after = document["flops"]["before"], document["flops"]["after"]
    parts = table("cost by part, uncompressed", "part", "cost", "share", right=("cost", "share"))
    for part, count in document["flops_by_part"].items():
        row(parts, part, flops(count), f"{count / before:.1%}" if before else None)
    screen.show(parts)
    if program.specs and before:
        screen.show(f"{flops(before)} before, {flops(after)} after compression ({after / before - 1:+.1%})")
    else:
        screen.show(f"{flops(before)} in all")
    for note in document["notes"]:
        screen.show(f"note: {note}")


def _bundle(folder: Path, function: str | None, screen: Screen) -> Result:
    from edgewise.bundle import Bundle

    bundle = Bundle.open(folder)
    if function is not None:
        bundle = _only(bundle, function)
    manifest = bundle.manifest
    model = manifest.model
    screen.show(
        f"{folder}: {model.source} ({model.class_name}, {model.parameters:,} parameters), "
        f"made by edgewise {manifest.edgewise_version}",
        f"compression: {', '.join(manifest.compress) or 'none'}",
        tables.tensors(manifest),
    )
    for component in manifest.components:
        if component.sites:
            screen.show(tables.sites(component))
        screen.show(tables.cost(component))
    screen.show(*tables.caches(manifest))
    screen.show(tables.artifacts(bundle), tables.ladder(manifest.verification), *tables.notes(manifest))
    commands = _commands(bundle)
    for label, command in commands.items():
        screen.show(f"{label}, with the runtime's own tools:\n  {command}")
    return Result({"bundle": str(folder), "manifest": manifest.model_dump(mode="json"), "commands": commands})


def _only(bundle: Bundle, function: str) -> Bundle:
    """The bundle as if it held nothing but one function."""
    from edgewise.targets import choose

    known = {one.label: one.function for one in bundle.manifest.targets}

    def function_of(rung: Rung) -> str | None:
        """A rung of no artifact has the name of its function in front, but for the first one."""
        name, colon, _ = rung.name.partition(": ")
        return known.get(rung.name.split(",")[0]) or (name if colon else bundle.manifest.targets[0].function)

    artifacts = choose(bundle, function=function)
    roles = {one.role for one in artifacts}
    components = tuple(one for one in bundle.manifest.components if one.role in roles)
    rungs = tuple(one for one in bundle.manifest.verification if one.kind == "capture" or function_of(one) == function)
    kept = {"components": components, "targets": tuple(artifacts), "verification": rungs, "compress": components[0].compress}
    return type(bundle)(bundle.path, bundle.manifest.model_copy(update=kept))


def _commands(bundle: Bundle) -> dict[str, str]:
    """What to type to build and time the artifacts with the tools of their runtimes, by label, where there are such."""
    from edgewise import targets

    commands = {}
    for artifact in bundle.manifest.targets:
        if artifact.target in targets.names():  # a newer edgewise may know more
            command = targets.get(artifact.target).command([bundle.path / name for name in artifact.files])
            if command is not None:
                commands[artifact.label] = command
    return commands
