"""`edgewise lint`: what would fail or be slow on a target, before anything is lowered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen
from edgewise.errors import unknown

SLOW, NOTE = "slow: ", "note: "
"""What a line begins with that names a cost, or what is good to know, and not a failure (see `Target.lint`)."""


def lint(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP}.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", help="Repeatable. Default: all. See `edgewise targets`.")
    ] = None,
    compress: options.Compress = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="P", help="That of the artifact: what a target can do may hang on it.")
    ] = "fp32",
    input_shapes: options.InputShapes = None,
    batch: options.Batch = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Say what of MODEL would fail on a target, or be slow, and where it comes from. Exit code 1 if anything would fail."""
    from edgewise import targets
    from edgewise.exporter.capture import capture, from_exported
    from edgewise.exporter.sources import load_source, parse_shapes
    from edgewise.passes.legalise import Legalise
    from edgewise.passes.program import compress as insert

    screen = Screen(json, quiet)
    chosen = [targets.get(name) for name in dict.fromkeys(target or targets.names())]
    if target is None:  # those that have it
        chosen = [one for one in chosen if precision in one.precisions]
        if not chosen:
            known = {one for name in targets.names() for one in targets.get(name).precisions}
            raise unknown("precision", precision, sorted(known))
    for one in chosen:
        one.check_precision(precision)
    found: dict[str, list[str]] = {}
    with screen.progress() as step:
        step(0, 2 + len(chosen), "load the model")
        source = load_source(
            model,
            input_shapes=parse_shapes(input_shapes or []),
            batch=batch or 1,
            seed=seed or 0,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
        step(1, 2 + len(chosen), "capture and compress")
        if source.exported is not None:
            program = from_exported(source.exported)
        else:
            assert source.module is not None
            program = capture(source.module, source.args, source.kwargs)
        compressed = insert(program, *(compress or []))
        for number, one in enumerate(chosen):
            step(2 + number, 2 + len(chosen), f"lint for {one.name}")
            found[one.name] = one.lint(Legalise(one.realisations)(compressed.exported).program, precision)
    for name, lines in found.items():
        for line in lines:
            screen.show(f"{name}: {line}")
        if not lines:
            screen.show(f"{name}: nothing is known to fail or to be slow")
    document: dict[str, Any] = {
        "model": source.name,
        "compress": list(compress or []),
        "precision": precision,
        "targets": {
            name: {
                "fails": [line for line in lines if not line.startswith((SLOW, NOTE))],
                "slow": [line.removeprefix(SLOW) for line in lines if line.startswith(SLOW)],
                "notes": [line.removeprefix(NOTE) for line in lines if line.startswith(NOTE)],
            }
            for name, lines in found.items()
        },
    }
    return Result(document, 1 if any(one["fails"] for one in document["targets"].values()) else 0)
