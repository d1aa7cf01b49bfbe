"""`edgewise build`: a recipe becomes bundles."""

from __future__ import annotations

import json as encoder
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from edgewise.cli import options
from edgewise.cli.files import append_text, write_text
from edgewise.cli.screen import Result, Screen, row, table
from edgewise.errors import InputError, unknown

if TYPE_CHECKING:
    from edgewise.builder.build import Planned
    from edgewise.builder.gates import BuildRecord
    from edgewise.builder.key import Keys
    from edgewise.builder.task import Outcome
    from edgewise.exporter.matrix import Entry


def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.yaml: one recipe or a matrix; or a bundle with one.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Bundles go to DIR/NAME.")] = Path("build"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, metavar="N", help="Processes. Default: one for each core.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="ENGINE", help="processes: on this machine; ray: on a Ray cluster.")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Of the Ray cluster: auto, HOST:PORT, ray://HOST:PORT.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="PATTERN", help="Only entries of this name; * is anything. Repeatable.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Build anew, and remember nothing.")] = False,
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Measure nothing, and hold to no limits.")] = False,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="RECORD.json", help="Compare with this record, not with the recipe's.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="RECORD.json", help="Write figures and gates here, for later builds.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write gates as JUnit XML.")] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE.md", help="Append Markdown, as for $GITHUB_STEP_SUMMARY.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Build every bundle of RECIPE that is not there yet, in parallel, and hold their figures to its gates."""
    from edgewise.builder import reports
    from edgewise.builder.build import build as make
    from edgewise.builder.build import plan, select
    from edgewise.builder.figures import measure
    from edgewise.builder.gates import BuildRecord, judge, read_record, regressions
    from edgewise.builder.key import Keys
    from edgewise.exporter.matrix import read_recipes

    screen = Screen(json, quiet)
    file = read_recipes(recipe)
    entries = select(file.entries, only or [])
    chosen = _engine(engine, address)
    limits = None if no_gates else file.regressions
    if baseline is not None and limits is None:
        raise InputError(f"--baseline needs limits: give {recipe} the key `regressions`, and leave --no-gates out")
    earlier = None if limits is None or dry_run else read_record(baseline or Path(limits.record))
    with screen.progress() as step:
        keys = Keys(trust_remote_code, weights_only)
        planned = plan(entries, out, keys=keys, cache=not no_cache)
        if dry_run:
            return _planned(screen, planned, out)
        outcomes = make(
            planned,
            out,
            **chosen,
            jobs=jobs,
            cache=not no_cache,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
            progress=step,
        )
        failed = {outcome.name for outcome in outcomes if outcome.status == "failed"}
        built = [entry for entry in entries if entry.name not in failed]
        _describe(built, out, keys, file.path)
        figures = [] if no_gates else measure(built, out, limits, lambda text: step(0, 0, text), cache=not no_cache)
    verdicts = [] if no_gates else judge(built, figures)
    if limits is not None and earlier is not None:
        verdicts += regressions(figures, earlier, limits)
    found = BuildRecord(outcomes=tuple(outcomes), figures=tuple(figures), verdicts=tuple(verdicts))
    _show(screen, found, out)
    document = found.model_dump(mode="json")
    if record is not None:
        write_text(record, encoder.dumps(document, indent=1, sort_keys=True) + "\n")
    if junit is not None:
        write_text(junit, reports.junit(found))
    if summary is not None:
        append_text(summary, reports.summary(found))
    return Result({"out": str(out), "entries": _documents(planned, outcomes, out), "record": document}, found.code)


def _describe(entries: Sequence[Entry], out: Path, keys: Keys, recipe: Path) -> None:
    """Write the bill of materials and the provenance of every bundle beside it, where they are not there already."""
    from edgewise.builder.provenance import provenance, source
    from edgewise.builder.sbom import sbom
    from edgewise.bundle.reader import read_manifest

    checkout = source(recipe.resolve().parent)
    for entry in entries:
        manifest, parts = read_manifest(out / entry.name), keys.parts(entry.recipe)
        versions = {name: version for name, version in parts["tools"].items() if name not in ("edgewise", "python")}
        statement = provenance(entry.name, manifest, parts, versions, checkout)
        for kind, document in (("cdx", sbom(entry.name, manifest, versions)), ("provenance", statement)):
            path, text = out / f"{entry.name}.{kind}.json", encoder.dumps(document, indent=1, sort_keys=True) + "\n"
            if not path.is_file() or path.read_text("utf-8") != text:
                write_text(path, text)


def _engine(name: str, address: str | None) -> dict[str, Any]:
    """The engine that was asked for, where it is not the one of this machine."""
    if name not in ("processes", "ray"):
        raise unknown("engine", name, ("processes", "ray"))
    if name == "ray":
        from edgewise.builder import cluster

        return {"engine": cluster.engine(address)}
    if address is not None:
        raise InputError("--address goes with --engine ray")
    return {}


def _documents(planned: list[Planned], outcomes: list[Outcome], out: Path) -> list[dict[str, Any]]:
    return [
        {
            "name": one.entry.name,
            "bundle": str(out / one.entry.name),
            "key": one.key,
            "recipe": one.entry.recipe.model_dump(mode="json"),
            **outcome.model_dump(mode="json", exclude={"name"}),
        }
        for one, outcome in zip(planned, outcomes, strict=True)
    ]


_STATES = {"current": "up to date", "cached": "copy from the cache", "new": "build"}


def _planned(screen: Screen, planned: list[Planned], out: Path) -> Result:
    made = table(f"{len(planned)} bundles in {out}", "name", "model", "compress", "precision", "targets", "would")
    for one in planned:
        asked = one.entry.recipe
        specs, names = " ".join(asked.compress) or None, " ".join(asked.targets)
        row(made, one.entry.name, asked.model, specs, asked.precision, names, _STATES[one.state])
    screen.show(made)
    entries = [
        {"name": p.entry.name, "key": p.key, "state": p.state, "recipe": p.entry.recipe.model_dump(mode="json")} for p in planned
    ]
    return Result({"out": str(out), "dry_run": True, "entries": entries})


_RESULTS = {True: ("passed", "green"), False: ("MISSED", "red"), None: ("not compared", "dim")}


def _show(screen: Screen, record: BuildRecord, out: Path) -> None:
    from edgewise.builder.reports import number

    made = table(f"{len(record.outcomes)} bundles in {out}", "name", "result", "")
    for outcome in record.outcomes:
        row(made, outcome.name, outcome.status, outcome.message)
    screen.show(made)
    if record.verdicts:
        made = table("gates", "bundle", "artifact", "gate", "value", "result", "", right=("value",))
        for one in record.verdicts:
            row(made, one.bundle, one.artifact, one.wanted, number(one.value), Text(*_RESULTS[one.passed]), one.note)
        screen.show(made)
