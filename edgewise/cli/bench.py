"""`edgewise bench`: measure the artifacts of a bundle on this machine, or several bundles against one another."""

from __future__ import annotations

import json as encoder
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli import options
from edgewise.cli.files import check_file, write_text
from edgewise.cli.screen import Result, Screen
from edgewise.errors import InputError

if TYPE_CHECKING:
    from edgewise.bench import Comparison, Record
    from edgewise.bundle import Bundle


def bench(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="The folder that `edgewise export` wrote.")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure several bundles in turn, and give their ratios to the first.")
    ] = False,
    target: options.Targets = None,
    function: options.Function = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="ADDRESS", help="Measure there: ssh://user@host[:port][/folder], or adb[:serial][/folder]."
        ),
    ] = None,
    ssh_config: Annotated[
        Path | None,
        typer.Option("--ssh-config", metavar="FILE", help="For ssh, in the place of your own configuration."),
    ] = None,
    remote_python: Annotated[
        str, typer.Option("--remote-python", metavar="PROGRAM", help="Python 3.10 or newer on the device.")
    ] = "python3",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Least runs of each artifact.")] = 30,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Least time of the runs of each.")] = 2.0,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs that are not counted.")] = 3,
    threads: options.Threads = None,
    units: Annotated[
        str | None,
        typer.Option("--units", metavar="UNITS", help="Of Core ML on a Mac: all, cpu, cpu-gpu or cpu-ane. Default: all."),
    ] = None,
    cold: Annotated[
        bool,
        typer.Option(" /--no-cold", help="Leave out the process of its own that tells cold load and peak memory."),
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RECORD.json", help="Write the whole record here.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Measure latency, memory, power and accuracy of the artifacts of BUNDLE on this machine, interleaved."""
    from edgewise import bench as library
    from edgewise.bundle import Bundle

    if len(bundles) > 1 and not compare:
        raise InputError(f"{len(bundles)} bundles are given: add --compare to measure them in turn")
    if ssh_config is not None and on is None:
        raise InputError("--ssh-config is for --on ssh:HOST: give that too")
    check_file(out)
    screen = Screen(json, quiet)
    with screen.progress() as step:
        opened = [Bundle.open(bundle) for bundle in bundles]
        how: dict[str, Any] = {
            **{"samples": samples, "seconds": seconds, "warmup": warmup, "threads": threads, "cold": cold, "function": function},
            "units": units,
            "progress": lambda line: step(0, 0, line),
        }
        measure: Callable[..., library.Record | library.Comparison]
        if on is not None:
            measure = _elsewhere(on, opened, compare, ssh_config, remote_python)
        elif compare:
            measure = partial(library.compare, opened)
        else:
            measure = partial(library.bench, opened[0])
        found: library.Record | library.Comparison = measure(target or None, **how)
    records = found.records if isinstance(found, library.Comparison) else (found,)
    screen.show(library.table(found))
    document = found.model_dump(mode="json")
    if out is not None:
        write_text(out, encoder.dumps(document, indent=1, allow_nan=False) + "\n")
        screen.say(f"wrote {out}")
    invalid = any(one.validity == "invalid" for record in records for one in record.measurements)
    return Result(document, 1 if invalid else 0)


def _elsewhere(
    on: str, bundles: list[Bundle], compare: bool, ssh_config: Path | None, python: str
) -> Callable[..., Record | Comparison]:
    from edgewise.bench.remote import bench_on, compare_on, parse_address, reach

    device = reach(parse_address(on), config=ssh_config, python=python)
    return partial(compare_on, device, bundles) if compare else partial(bench_on, device, bundles[0])
