"""`edgewise bench`: measure the artifacts of a bundle on this machine."""

from __future__ import annotations

import json as encoder
import os
from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen
from edgewise.errors import InputError


def bench(
    bundle: options.BundleFolder,
    target: options.Targets = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Least runs of each artifact.")] = 30,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Least time of the runs of each.")] = 2.0,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs that are not counted.")] = 3,
    threads: options.Threads = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RECORD.json", help="Write the whole record here.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Measure latency, memory and accuracy of the artifacts of BUNDLE on this machine, interleaved."""
    from edgewise.bench import bench as measure
    from edgewise.bench import table
    from edgewise.bundle import Bundle

    screen = Screen(json, quiet)
    with screen.progress() as step:
        record = measure(
            Bundle.open(bundle),
            target or None,
            samples=samples,
            seconds=seconds,
            warmup=warmup,
            threads=threads,
            progress=lambda line: step(0, 0, line),
        )
    screen.show(table(record))
    document = record.model_dump(mode="json")
    if out is not None:
        _write(out, encoder.dumps(document, indent=1, allow_nan=False) + "\n")
        screen.say(f"wrote {out}")
    invalid = any(one.validity == "invalid" for one in record.measurements)
    return Result(document, 1 if invalid else 0)


def _write(out: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
