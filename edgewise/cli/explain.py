"""`edgewise explain`: pictures of what compression keeps and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, row, table
from edgewise.errors import InputError


def explain(
    what: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help=f"A bundle's folder, or: {options.MODEL_HELP}.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the pictures. Required.")
    ] = None,
    compress: options.Compress = None,
    image: Annotated[Path | None, typer.Option("--image", metavar="FILE", help="An image.")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", metavar="FILE", help="A recording.")] = None,
    video: Annotated[
        Path | None, typer.Option("--video", metavar="FILE", help="A video, or a folder of frames as images.")
    ] = None,
    sample: Annotated[int | None, typer.Option("--sample", metavar="N", help="A sample of a demo's own split.")] = None,
    input_shapes: options.InputShapes = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Draw which tokens of one input are kept, and which are merged into what, site by site."""
    screen = Screen(json, quiet)
    if out is None:
        raise InputError("no place for the pictures: give -o FOLDER (see edgewise explain --help)")
    files = {"image": image, "audio": audio, "video": video}
    given = [kind for kind, path in files.items() if path is not None]
    if len(given) + (sample is not None) != 1:
        raise InputError("give one input: --image FILE, --audio FILE, --video FILE, or --sample N of a demo")
    from edgewise.exporter.explain import Asked
    from edgewise.exporter.explain import explain as make
    from edgewise.exporter.sources import parse_shapes

    loading = {
        "input_shapes": parse_shapes(input_shapes or []),
        "seed": seed or 0,
        "trust_remote_code": trust_remote_code,
        "weights_only": weights_only,
    }
    kind = given[0] if given else None
    asked = Asked(kind, files[kind] if kind else None, sample, loading)  # type: ignore[arg-type]
    with screen.progress() as step:
        document = make(what, out, asked, compress or (), step).document
    made = table("sites", "site", "method", "in", "out", "picture", right=("in", "out"))
    for site in document["sites"]:
        row(made, site["site"], site["method"], site["tokens_in"], site["tokens_out"], site["file"])
    screen.show(
        made, *(f"note: {note}" for note in document["notes"]), f"wrote {out}; see {out / document['overview']}"
    )
    return Result({"folder": str(out), **document})
