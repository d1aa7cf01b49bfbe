"""`edgewise report`: benchmark records as one self-contained page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgewise.cli import options
from edgewise.cli.files import write_text
from edgewise.cli.screen import Result, Screen
from edgewise.errors import InputError

if TYPE_CHECKING:
    from edgewise.bench import Comparison, Record


def report(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="What `edgewise bench -o` wrote; and `build --record`, for accuracy.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PAGE.html", help="Where the page goes.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Make one page of benchmark RECORDs: distributions, accuracy against latency and size, tokens, placement, verification."""
    from edgewise.bench.report import page

    screen = Screen(json, quiet)
    measured: list[Record | Comparison] = []
    scores: dict[tuple[str, str], float] = {}
    for path in records:
        found = _read(path)
        if isinstance(found, dict):
            scores |= found
        else:
            measured.append(found)
    if not measured:
        raise InputError("these are records of builds, which hold no times: give what `edgewise bench -o` wrote, too")
    text = page(measured, scores)
    write_text(out, text)
    screen.say(f"wrote {out}")
    return Result({"report": str(out), "bytes": len(text.encode("utf-8"))})


def _read(path: Path) -> Record | Comparison | dict[tuple[str, str], float]:
    """What was measured; or, of a build, the accuracy of every artifact where it is known, by the artifact's
    name and digest."""
    from edgewise.bench.record import MAX_BYTES, read
    from edgewise.bundle.reader import read_bytes
    from edgewise.document import parse

    mend = "Give files that `edgewise bench -o` or `edgewise build --record` wrote."
    document = parse(read_bytes(path, MAX_BYTES), str(path), "record", limit=MAX_BYTES, mend=mend)
    if document.get("format") != "edgewise-build":
        return read(path)
    from edgewise.builder.gates import read_record

    figures = read_record(path).figures
    known = [(one, one.accuracy) for one in figures if one.accuracy is not None and math.isfinite(one.accuracy)]
    return {(one.artifact, one.digest): accuracy for one, accuracy in known}
