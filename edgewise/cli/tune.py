"""`edgewise tune`: how many tokens each site keeps, for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, number, row, table
from edgewise.errors import InputError

if TYPE_CHECKING:
    from edgewise.exporter.tune import Tuned


NOISE = 1e-9
"""Divergence that rounding in fp32 alone may make: there is nothing to compare."""


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP}.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The recipe, a .yaml file. Required.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option("--calib", metavar="DATA", help=f"Required. {options.DATA_HELP}.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="KIND=SHARE",
            help="Required. Share of the uncompressed model's: tokens=0.5 (mean over the sites), flops=0.6 or latency=0.6.",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="What the recipe builds for, and where a latency is measured.")
    ] = "openvino",
    compress: Annotated[
        str, typer.Option("--compress", metavar="SPEC", help="METHOD[@SITE][:key=value,...] without a count.")
    ] = "tome",
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Most samples to tune with.")] = 64,
    held_out: Annotated[
        int, typer.Option("--held-out", metavar="N", min=1, help="Most other samples that the table is of.")
    ] = 256,
    trials: Annotated[
        int, typer.Option("--trials", metavar="N", min=1, help="Most whole schedules to try, besides two trials of each site.")
    ] = 48,
    input_shapes: options.InputShapes = None,
    batch: options.Batch = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Choose how many tokens each site of MODEL keeps, for a budget, and write the recipe that builds it."""
    screen = Screen(json, quiet)
    for given, flag in ((out, "-o FILE.yaml"), (calib, "--calib DATA"), (budget, "--budget tokens=0.5")):
        if given is None:
            raise InputError(f"give {flag} (see edgewise tune --help)")
    assert out is not None and calib is not None and budget is not None
    from edgewise.exporter.compare import choose_target
    from edgewise.exporter.data import check_named
    from edgewise.exporter.recipe import Recipe
    from edgewise.exporter.sources import load_source, parse_shapes
    from edgewise.exporter.tune import check_place, parse_budget, state_file
    from edgewise.exporter.tune import tune as run
    from edgewise.passes.plan import parse_spec

    # All that can be wrong is said before the model is loaded.
    wanted = parse_budget(budget)
    parse_spec(compress)
    check_place(out)
    check_named(calib)
    chosen, shapes = choose_target(target), parse_shapes(input_shapes or [])
    recipe = Recipe(model=model, targets=(chosen.name,), input_shapes=shapes, batch=batch or 1, seed=seed or 0)
    with screen.progress() as step:
        step(0, 0, "load the model")
        source = load_source(
            model,
            input_shapes=shapes,
            batch=batch or 1,
            seed=seed or 0,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
        tuned = run(
            source,
            calib,
            out,
            target=chosen,
            budget=wanted,
            method=compress,
            samples=samples,
            held_out=held_out,
            trials=trials,
            recipe=recipe,
            progress=step,
        )
    _show(screen, tuned)
    screen.say(f"{state_file(out)} remembers the {tuned.trials} trials")
    screen.show(f"wrote {out}; next: edgewise export --recipe {out} -o BUNDLE")
    return Result({"recipe": str(out), "model": model, **tuned.document})


def _show(screen: Screen, tuned: Tuned) -> None:
    timed = tuned.budget.kind == "latency"
    numbers = ["tokens", "FLOPs", *(["latency"] if timed else []), "divergence", "of constant", "accuracy"]
    title = f"{tuned.budget.kind}={tuned.budget.share:g}, on {tuned.held_out} samples that were not tuned with"
    made = table(title, "schedule", f"tokens behind each site, of {tuned.free}", *numbers, right=tuple(numbers))
    constant = next((one.divergence for one in tuned.rows if one.name == "constant"), None)
    for one in tuned.rows:
        row(
            made,
            one.name,
            " ".join(map(str, one.counts)),
            f"{one.tokens:.3f}",
            f"{one.flops:.3f}",
            *([number(one.latency, ".3f")] if timed else []),
            f"{one.divergence:.4g}",
            f"{one.divergence / constant:.0%}" if constant is not None and constant > NOISE else None,
            None if one.accuracy is None else f"{one.accuracy:.2%}",
        )
    screen.show(made)
    for note in tuned.notes:
        screen.show(f"note: {note}")
