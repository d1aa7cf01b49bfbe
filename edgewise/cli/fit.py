"""`edgewise fit`: the weights of a query method, from calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, number, row, table
from edgewise.errors import InputError


def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP}.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The .safetensors file of the weights. Required.")
    ] = None,
    compress: options.Compress = None,
    calib: Annotated[
        str | None,
        typer.Option("--calib", metavar="DATA", help=f"Required. {options.DATA_HELP}."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Most samples of the data.")] = 256,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of 16 samples.")] = 400,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", help="Stop the steps after so long. Default: no limit.")
    ] = None,
    input_shapes: options.InputShapes = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="First dimension of the inputs: as much as memory holds. Default: 16.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the order of the samples. Default: 0.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Fit the weights of a learned method (token-learner, a resampler, conv1d) to MODEL, on unlabelled data."""
    screen = Screen(json, quiet)
    if out is None:
        raise InputError("no place for the weights: give -o FILE.safetensors (see edgewise fit --help)")
    if calib is None:
        raise InputError("no calibration data: give --calib demo:NAME or --calib FILE.npz (see edgewise fit --help)")
    from edgewise.exporter import fit as fitting
    from edgewise.exporter.capture import capture, from_exported
    from edgewise.exporter.compare import Data
    from edgewise.exporter.data import check_named, collected
    from edgewise.exporter.sources import load_source, parse_shapes

    # All that can be wrong is said before the model is loaded.
    fitting.check_place(out)
    wanted, specs = fitting.find_spec(compress or [])
    check_named(calib)
    with screen.progress() as step:
        step(0, 0, "load the model")
        source = load_source(
            model,
            input_shapes=parse_shapes(input_shapes or []),
            batch=batch or fitting.STEP_SAMPLES,
            seed=seed or 0,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
        step(0, 0, "capture")
        program = (
            from_exported(source.exported)
            if source.exported is not None
            else capture(source.module, source.args, source.kwargs)  # type: ignore[arg-type]
        )
        chosen, arrays = collected(calib, program, source, samples)
        fitted = fitting.fit(
            program,
            compress or [],
            Data(calib, arrays),
            samples=samples,
            steps=steps,
            seconds=seconds,
            seed=seed or 0,
            progress=step,
        )
    fitted.save(out)
    record = fitted.record
    made = table(f"{record.method} at {record.site}", "samples", "loss before", "loss after", right=("samples",))
    row(made, record.held_out, number(record.before, ".4g"), number(record.after, ".4g"))
    texts = [fitted.spec_with(out) if spec is wanted else spec.text for spec in specs]
    flags = " ".join(f"--compress '{text}'" for text in texts)
    screen.show(
        made,
        *(f"note: {note}" for note in chosen.notes),
        f"fitted on {record.samples} other samples in {record.steps} steps; wrote {out}; "
        f"next: edgewise export {model} {flags} -o BUNDLE",
    )
    return Result({"file": str(out), "compress": texts, **record.document})
