"""`edgewise report`: benchmark records as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options
from edgewise.cli.files import write_text
from edgewise.cli.screen import Result, Screen


def report(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="Files that `edgewise bench -o` wrote, one or several.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PAGE.html", help="Where the page goes.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Make one page of benchmark RECORDs: distributions, accuracy against latency and size, tokens, placement, verification."""
    from edgewise.bench.record import read
    from edgewise.bench.report import page

    screen = Screen(json, quiet)
    text = page([read(record) for record in records])
    write_text(out, text)
    screen.say(f"wrote {out}")
    return Result({"report": str(out), "bytes": len(text.encode("utf-8"))})
