"""A build: plan what is there already, make the rest, and say what came of each entry."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgewise import targets
from edgewise.builder.key import Keys
from edgewise.builder.processes import Tell, build_all
from edgewise.builder.store import Store, is_current
from edgewise.builder.task import Outcome, Task
from edgewise.bundle.temporary import sweep
from edgewise.errors import unknown
from edgewise.exporter.matrix import Entry
from edgewise.exporter.precisions import parse_precisions
from edgewise.exporter.variant_specs import parse_variants

Engine = Callable[[Sequence[Task], int, Tell], Iterator[Outcome]]
"""Builds tasks with a number of jobs, and gives each outcome when it is there."""


@dataclass(frozen=True)
class Planned:
    """An entry, its key, and where its bundle is: at its place, in the cache, or nowhere yet."""

    entry: Entry
    key: str
    state: Literal["current", "cached", "new"]


def select(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The entries whose names match one of the patterns, in which `*` stands for anything; all, where there are none. The bundle
    that a gate compares with is one of them. Raises InputError if a pattern matches nothing."""
    names = [entry.name for entry in entries]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise unknown("entry of the recipe", pattern, names)
    chosen = {name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    chosen |= {e.gates.baseline for e in entries if e.name in chosen and e.gates.baseline is not None}
    return [entry for entry in entries if entry.name in chosen]


def plan(
    entries: Sequence[Entry], out: Path, *, keys: Keys, cache: bool = True, progress: Callable[[int, int, str], None] | None = None
) -> list[Planned]:
    """Find out what is there already, without capturing anything.

    Raises InputError where a target, a precision or a model is not there, before anything is built.
    """
    for entry in entries:
        _check(entry)
    store, made = Store(), []
    for i, entry in enumerate(entries):
        if progress is not None:
            progress(i, len(entries), f"look for {entry.name}")
        key = keys.of(entry.recipe)
        known = store.knows(key) if cache else None
        state: Literal["current", "cached", "new"] = "new"
        if known is not None:
            state = "current" if is_current(known, out / entry.name) else "cached"
        made.append(Planned(entry, key, state))
    return made


def _check(entry: Entry) -> None:
    parse_variants(entry.recipe.compress, entry.recipe.compress_variants)
    for name in entry.recipe.targets:
        target = targets.get(name)
        if entry.recipe.compress_variants:
            target = target.for_functions()
        if entry.recipe.image_input:
            target = target.for_images({})
        if entry.recipe.devices and target.ahead_of_time:
            target = target.for_devices(entry.recipe.devices)
        for precision in parse_precisions(entry.recipe.precision).all:
            target.check_precision(precision)
        target.check()


def build(
    planned: Sequence[Planned],
    out: Path,
    *,
    engine: Engine = build_all,
    jobs: int | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
    weights_only: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Outcome]:
    """Make every bundle that is not there, in `out / name`, and give an outcome for each entry, in order.

    One that fails keeps no other from being built.
    """
    total, found = len(planned), dict[str, Outcome]()

    def tell(name: str, text: str) -> None:
        if progress is not None:
            progress(min(len(found), total - 1), total, f"{name}: {text}")

    with contextlib.suppress(FileNotFoundError):
        # A writer that was killed when its bundle was already there: nobody writes it again, and removes what is left beside it.
        sweep(out)
    store, new = Store(), []
    for one in planned:
        name = one.entry.name
        if one.state == "cached" and store.fetch(one.key, out / name) is not None:
            found[name] = Outcome(name=name, status="cached")
            tell(name, "copied from the cache")
        elif one.state == "current":
            found[name] = Outcome(name=name, status="current")
        else:
            new.append(one)
    tasks = [
        Task(
            name=one.entry.name,
            recipe=one.entry.recipe,
            out=os.path.abspath(out / one.entry.name),
            key=one.key,
            folder=os.getcwd(),
            cache=cache,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
        for one in new
    ]
    if tasks:
        for outcome in engine(tasks, min(jobs or os.cpu_count() or 1, len(tasks)), tell):
            found[outcome.name] = outcome
            tell(outcome.name, outcome.status)
    return [found[one.entry.name] for one in planned]

