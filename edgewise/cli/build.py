"""`edgewise build`: a recipe becomes bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli import options
from edgewise.cli.screen import Result, Screen, row, table

if TYPE_CHECKING:
    from edgewise.builder.build import Planned
    from edgewise.builder.task import Outcome


def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.yaml: one recipe or a matrix; or a bundle with one.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Bundles go to DIR/NAME.")] = Path("build"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, metavar="N", help="Processes. Default: one for each core.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="PATTERN", help="Only entries of this name; * is anything. Repeatable.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    weights_only: options.WeightsOnly = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Build anew, and remember nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Build every bundle of RECIPE that is not there yet, in parallel."""
    from edgewise.builder.build import build as make
    from edgewise.builder.build import plan, select
    from edgewise.builder.key import Keys
    from edgewise.exporter.matrix import read_recipes

    screen = Screen(json, quiet)
    file = read_recipes(recipe)
    entries = select(file.entries, only or [])
    with screen.progress() as step:
        planned = plan(entries, out, keys=Keys(trust_remote_code, weights_only), cache=not no_cache)
        if dry_run:
            return _planned(screen, planned, out)
        outcomes = make(
            planned,
            out,
            jobs=jobs,
            cache=not no_cache,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
            progress=step,
        )
    _show(screen, planned, outcomes, out)
    code = max((outcome.code for outcome in outcomes), default=0)
    return Result({"out": str(out), "entries": _documents(planned, outcomes, out)}, code)


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


def _show(screen: Screen, planned: list[Planned], outcomes: list[Outcome], out: Path) -> None:
    made = table(f"{len(outcomes)} bundles in {out}", "name", "result", "")
    for outcome in outcomes:
        row(made, outcome.name, outcome.status, outcome.message)
    screen.show(made)
