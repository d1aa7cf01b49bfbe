"""`edgewise compare`: compression methods side by side, at equal numbers of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, number, row, table
from edgewise.errors import InputError

if TYPE_CHECKING:
    from edgewise.exporter.compare import Comparison


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP}.")],
    calib: Annotated[
        str | None, typer.Option("--calib", metavar="DATA", help=f"Required. {options.DATA_HELP}.")
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="K,K,...", help="Shares or counts of the unprotected tokens that stay.")
    ] = "0.5,0.25,0.1",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="SPEC", help="METHOD[@SITE][:key=value,...] without a count. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Most samples of the data.")] = 64,
    target: Annotated[
        str | None, typer.Option("--target", help="Where latency is measured. Default: the first that can run.")
    ] = None,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Measure no latency.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Write compare.json, .html and .png here.")
    ] = None,
    input_shapes: options.InputShapes = None,
    batch: options.Batch = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Compare the compression methods that apply to MODEL on data: accuracy, FLOPs and latency at equal token counts."""
    screen = Screen(json, quiet)
    if calib is None:
        raise InputError("no data: give --calib demo:NAME or --calib FILE.npz (see edgewise compare --help)")
    from edgewise.exporter import compare_report
    from edgewise.exporter.compare import choose_target, parse_keeps, parse_methods
    from edgewise.exporter.compare import compare as run
    from edgewise.exporter.data import check_named
    from edgewise.exporter.sources import load_source, parse_shapes

    # All that can be wrong is said before the model is loaded.
    keeps = parse_keeps(keep)
    parse_methods(method or [])
    chosen = choose_target(target) if target is not None or not no_latency else None
    if out is not None:
        compare_report.check(out)
    check_named(calib)
    with screen.progress() as step:
        step(0, 0, "load the model")
        source = load_source(
            model,
            input_shapes=parse_shapes(input_shapes or []),
            batch=batch or 1,
            seed=seed or 0,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
        found = run(
            source,
            calib,
            keeps,
            method or (),
            samples=samples,
            target=None if no_latency else chosen,
            progress=step,
        )
        if out is not None:
            step(0, 0, f"write {out}")
            compare_report.write(found, out)
    _show(screen, found)
    if out is not None:
        screen.say(f"wrote {out}: compare.json, compare.html, compare.png")
    return Result({**found.document, "folder": None if out is None else str(out)})


def _show(screen: Screen, found: Comparison) -> None:
    from edgewise.exporter.compare_report import cells, columns, site_text

    names = columns(found)
    made = table(f"{found.model} on {found.samples} samples of {found.data}", "method", "site", *names, right=tuple(names))
    for one in found.rows:
        row(made, one.method, site_text(one), *cells(one, found))
    screen.show(made)
    left = table("left out", "method", "keep", "reason", right=("keep",))
    for other in found.left_out:
        row(left, other.method, "any" if other.keep is None else number(other.keep, "g"), other.reason)
    if found.left_out:
        screen.show(left)
    for note in found.notes:
        screen.show(f"note: {note}")
