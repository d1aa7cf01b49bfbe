"""`edgewise diff`: what two bundles differ in."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, row, table


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A bundle.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if they differ.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Say what bundles A and B differ in, from bytes up to meaning."""
    from edgewise.builder.diff import diff as compare
    from edgewise.bundle import Bundle

    screen = Screen(json, quiet)
    found = compare(Bundle.open(a), Bundle.open(b))
    if found.identical:
        screen.show(f"{a} and {b} are identical")
    for section, group in itertools.groupby(found.differences, lambda one: one.section):
        made = table(section, "what", "A", "B")
        for one in group:
            row(made, one.name, one.a, one.b)
        screen.show(made)
    for unknown in found.unknown:
        screen.say(f"not compared: {unknown}")
    return Result(found.model_dump(mode="json"), 1 if exit_code and not found.identical else 0)
