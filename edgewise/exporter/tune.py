"""Tune the schedule of a method: how many tokens each site keeps, so that a budget is met and the outputs move least.

Every site is measured alone, at two counts: what it loses on the data, and what it saves. From these an exact solver
(`calibration.schedule`) finds the schedule that should lose least, and tokens are exchanged between sites for the rest of the
trials, each of which runs a whole schedule. What is shown in the end is of data that none of this has seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.calibration.samples import Samples, calibration_and_held_out
from edgewise.calibration.schedule import (
    Counts,
    along,
    best_schedule,
    exchanged,
    power_curve,
    quadratic_curve,
    shares,
)
from edgewise.errors import InputError, unknown
from edgewise.exporter.capture import capture, from_exported
from edgewise.exporter.data import open_for, ports_of
from edgewise.exporter.digest import Weights
from edgewise.exporter.identity import code_digest
from edgewise.exporter.recipe import Recipe
from edgewise.exporter.schedules import SHAPES, Space
from edgewise.exporter.sources import Source
from edgewise.exporter.trials import Memory, Trials, write_whole
from edgewise.passes.program import Program
from edgewise.targets import Target

KINDS = ("tokens", "flops", "latency")
SLACK = {"tokens": 0.0, "flops": 0.0, "latency": 0.02}
"""By how much a schedule may miss the budget: a latency is measured again each time."""
NEAR = 0.01
"""A schedule that is below the budget by no more than this is not improved upon."""
SETTLINGS = 4
"""Times that the cost of a schedule is looked at, to find one of the right cost."""
FAILURES = 200
"""Exchanges in a row that gave nothing new, before there is taken to be nothing."""
Progress = Callable[[int, int, str], None]
TUNED, UNCOMPRESSED = "tuned", "uncompressed"


@dataclass(frozen=True)
class Budget:
    """A share of what the uncompressed model has: of its `tokens` (the mean over the sites of how many each passes on), its
    `flops`, or its measured `latency`."""

    kind: str
    share: float


@dataclass(frozen=True)
class Row:
    """One schedule, or none: tokens behind each site (unprotected), shares of the uncompressed costs, and the divergence and the
    accuracy (None: there is none) on unseen data. `latency` is None where the budget is none of time."""

    name: str
    counts: Counts
    specs: tuple[str, ...]
    tokens: float
    flops: float
    latency: float | None
    divergence: float
    accuracy: float | None


@dataclass(frozen=True)
class Tuned:
    """The recipe and what is known of it. `sensitivity`: the loss of each site alone, where it removes the larger number."""

    recipe: Recipe
    budget: Budget
    rows: tuple[Row, ...]
    sensitivity: tuple[tuple[str, float], ...]
    free: int
    samples: int
    held_out: int
    trials: int
    evaluated: int
    notes: tuple[str, ...]

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        rows = [{**vars(row), "counts": list(row.counts), "specs": list(row.specs)} for row in self.rows]
        return {
            "budget": {"kind": self.budget.kind, "share": self.budget.share},
            "compress": list(self.recipe.compress),
            "schedules": rows,
            "sensitivity": dict(self.sensitivity),
            "unprotected_tokens": self.free,
            "samples": self.samples,
            "held_out": self.held_out,
            "trials": self.trials,
            "evaluated_now": self.evaluated,
            "notes": list(self.notes),
        }


def parse_budget(text: str) -> Budget:
    """`tokens=0.5`, `flops=0.6` or `latency=0.6`. Raises `InputError`."""
    kind, equals, value = text.partition("=")
    kind = kind.strip()
    if not equals:
        raise InputError(f"--budget {text!r} is not KIND=SHARE, for example tokens=0.5, flops=0.6 or latency=0.6")
    if kind not in KINDS:
        raise unknown("budget", kind, KINDS)
    try:
        share = float(value)
    except ValueError:
        raise InputError(f"--budget {text}: {value!r} is not a number") from None
    if not 0 < share < 1:
        raise InputError(f"--budget {text}: {value} is out of range: a share of the uncompressed {kind}, above 0 and below 1")
    return Budget(kind, share)


def state_file(out: Path) -> Path:
    """Where the trials are remembered for a recipe."""
    return out.with_name(out.name + ".trials.json")


def check_place(out: Path) -> None:
    """Raise `InputError` if a recipe cannot be written there."""
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file for the recipe, such as {out / 'recipe.yaml'}")
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"{out}: a recipe is a .yaml file")
    if not out.parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}")


def tune(
    source: Source,
    data: Any,
    out: Path,
    *,
    target: Target,
    budget: Budget,
    method: str = "tome",
    samples: int = 64,
    held_out: int = 256,
    trials: int = 48,
    recipe: Recipe,
    progress: Progress | None = None,
) -> Tuned:
    """Tune the schedule of `method` (a spec without counts) and write `recipe` with it to `out`.

    `trials` whole schedules are tried besides what each site loses alone. Every number that is measured is remembered beside
    `out`, so that a run which is ended goes on where it was. Raises `InputError` (data, budget or method do not fit), or
    `Refused`.
    """
    tell = progress or (lambda done, total, text: None)
    if recipe.seed < 0:
        raise InputError(f"seed={recipe.seed} is negative")
    if trials < 1 or samples < 1 or held_out < 1:
        raise InputError(f"tuning takes one trial, one sample and one held-out sample or more: {trials}, {samples}, {held_out}")
    tell(0, 0, "capture")
    program = (
        from_exported(source.exported) if source.exported is not None
        else capture(source.module, source.args, source.kwargs)  # type: ignore[arg-type]
    )
    space = Space.of(program, method)
    if budget.kind == "tokens" and budget.share * space.sites.free < space.sites.least:
        raise InputError(f"a budget of {budget.share:g} of {space.sites.free} tokens is less than one token")
    seen, unseen = calibration_and_held_out(open_for(data, program, source), ports_of(program), samples, held_out)
    assert unseen is not None
    tell(0, 0, f"run the uncompressed model on {seen.count} samples")
    memory = Memory.open(state_file(out), _key(program, space, seen, unseen, target))
    with Trials(program, space, seen, memory, target) as tried:
        tuning = _Tuning(tried, budget, trials, recipe.seed, tell)
        chosen = {**tuning.run(), UNCOMPRESSED: (space.sites.free,) * space.sites.count}
        tell(0, 0, f"judge {len(chosen)} schedules on {unseen.count} samples that were not seen")
        judged = tried.judge(chosen, unseen)
        rows = tuple(tuning.row(name, counts, *judged[name]) for name, counts in chosen.items())
    made = recipe.model_copy(update={"compress": space.specs(chosen[TUNED])})
    write_whole(out, made.to_yaml())
    names = [place.name for place in space.places]
    return Tuned(made, budget, rows, tuple(zip(names, tuning.alone, strict=True)), space.sites.free, seen.count, unseen.count,
                 tuning.tried, tuning.trials.evaluated, (*source.notes, *program.notes, *seen.notes, *unseen.notes))


def _key(program: Program, space: Space, seen: Samples, unseen: Samples, target: Target) -> str:
    """What numbers are measured of; not the budget, so that one tuning helps the next."""
    known = [Weights().of_program(program.base), {k: list(v.shape) for k, v in program.inputs.items()}, space.spec.text,
             seen.digest, unseen.digest, target.name, target.versions(), code_digest()]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class _Tuning:
    """The search."""

    def __init__(self, trials: Trials, budget: Budget, count: int, seed: int, tell: Progress) -> None:
        self.trials, self.budget, self.count, self.tell_of = trials, budget, count, tell
        self.space = trials.space
        self.sites = self.space.sites
        self.generator = np.random.default_rng(seed)
        self.tried = 0
        self.total = 2 * self.sites.count + count
        self.cost = shares(self.sites)
        self.each = 0.0
        self.alone: list[float] = []

    def tell(self, text: str) -> None:
        self.tell_of(min(self.tried, self.total - 1), self.total, text)

    def run(self) -> dict[str, Counts]:
        """The tuned and the usual schedules, at the same cost."""
        sites = self.sites
        least = self.real(sites.fewest)
        if least > self.budget.share + SLACK[self.budget.kind]:
            raise InputError(f"a budget of {self.budget.share:g} of the {self.budget.kind} cannot be reached: "
                             f"{self.space.spec.method.name} at all of {sites.count} sites leaves {least:.3f}")
        loss = self._look()
        usual = {shape: self._settled(partial(self._usual, shape)) for shape in SHAPES}
        start = self._settled(partial(self._best, loss))
        starts = [counts for counts in (start, *usual.values()) if counts is not None]
        best = self._refined(starts or [sites.fewest])
        if self.budget.kind == "latency":
            best = self._settled(partial(self._scaled, best)) or best
        return {TUNED: best, **{shape: counts for shape, counts in usual.items() if counts is not None}}

    # -- costs

    offset = 0.0
    """By how much whole schedules cost more than their sites alone."""

    def predict(self, counts: Sequence[int]) -> float:
        """The cost that the sites alone let expect."""
        return 1 + along(self.cost, self.sites, counts, self.each) + self.offset

    def real(self, counts: Counts) -> float:
        """The cost, exactly or measured."""
        if self.budget.kind == "tokens":
            return self.tokens(counts)
        return self.trials.flops(counts) if self.budget.kind == "flops" else self.trials.latency(counts)

    def tokens(self, counts: Counts) -> float:
        return 1 + along(shares(self.sites), self.sites, counts)

    def row(self, name: str, counts: Counts, divergence: float, accuracy: float | None) -> Row:
        specs = self.space.specs(counts)
        flops = self.trials.flops(counts) if specs else 1.0
        latency = None if self.budget.kind != "latency" else self.trials.latency(counts) if specs else 1.0
        return Row(name, counts, specs, self.tokens(counts), flops, latency, divergence, accuracy)

    # -- steps

    def _look(self) -> np.ndarray:
        """Losses, and where they are not known exactly costs, of each site alone."""
        sites, free = self.sites, self.sites.free
        few, many = (free - round(free * share) for share in ((0.25, 0.5) if sites.halves else (0.35, 0.75)))
        many = max(many, sites.floor(free))
        few = min(max(few, many + 1), free - 1) if many < free - 1 else many
        curves, costs = [], []
        if self.budget.kind == "latency":
            self.tell("time one site that removes one token")
            middle = sites.count // 2
            one = self._only(middle, free - 1)
            self.each = max(0.0, self.trials.latency(one) - 1)
        for i, place in enumerate(self.space.places):
            points, paid = [], []
            for left in dict.fromkeys((few, many)):
                self.tell(f"{place.name} alone, {free - left} of {free} tokens removed")
                counts = self._only(i, left)
                points.append((left, self.trials.loss(counts)))
                if self.budget.kind != "tokens":
                    paid.append((left, self.trials.flops(counts) - 1))
                self.tried += 1
            if self.budget.kind == "latency":  # timed at one count, and shaped as the FLOPs are between
                scale = (self.trials.latency(counts) - 1 - self.each) / paid[-1][1] if paid[-1][1] else 0.0
                paid = [(left, change * scale) for left, change in paid]
            curves.append(power_curve(free, points))
            costs.append(quadratic_curve(free, paid) if paid else self.cost[i])
            self.alone.append(points[-1][1])
        self.cost = np.stack(costs)
        return np.stack(curves)

    def _only(self, site: int, left: int) -> Counts:
        return tuple(self.sites.free if i < site else left for i in range(self.sites.count))

    def _settled(self, make: Callable[[float], Counts | None]) -> Counts | None:
        """What `make` gives for a share at which it really costs no more than the budget, and little less."""
        share, slack = self.budget.share, SLACK[self.budget.kind]
        best: Counts | None = None
        spent = -1.0
        for _ in range(1 if self.budget.kind == "tokens" else SETTLINGS):
            counts = make(share)
            if counts is None:
                break
            if self.budget.kind == "latency":
                self.tell(f"time a schedule on {self.trials.target.name}")
            real = self.real(counts)
            if real <= self.budget.share + slack and real > spent:
                best, spent = counts, real
            if abs(real - self.budget.share) <= slack or 0 <= self.budget.share - real <= NEAR:
                break
            share += self.budget.share - real
        return best

    def _best(self, loss: np.ndarray, share: float) -> Counts | None:
        return best_schedule(self.sites, loss, self.cost, share - self.offset, self.each)

    def _usual(self, shape: str, share: float) -> Counts | None:
        """The schedule of this shape that removes the fewest tokens and meets the share."""
        low, high = 0, self.space.most
        if self.predict(self.space.shaped(shape, high)) > share:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.predict(self.space.shaped(shape, middle)) <= share else (middle, high)
        return self.space.shaped(shape, high)

    def _scaled(self, counts: Counts, share: float) -> Counts | None:
        """The same schedule with more removed at every site, or less, as the share needs."""
        removed, low, high = self.sites.removed(counts), 0.0, 8.0

        def made(factor: float) -> Counts:
            return self.sites.clipped([round(number * factor) for number in removed])

        if self.predict(made(high)) > share:
            return None
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.predict(made(middle)) <= share else (middle, high)
        return made(high)

    def _refined(self, starts: Sequence[Counts]) -> Counts:
        """The best of these and of what exchanges of tokens make of it."""
        best, least = starts[0], float("inf")
        tried = set()
        for counts in starts[:self.count]:
            self.tell("a whole schedule")
            tried.add(counts)
            self.tried += 1
            if (found := self.trials.loss(counts)) < least:
                best, least = counts, found
        left, failures = self.count - len(tried), 0
        while left > 0 and failures < FAILURES:
            made = exchanged(self.sites, best, self.predict, self.budget.share, self.generator)
            if made is None or made in tried:
                failures += 1
                continue
            tried.add(made)
            if self.budget.kind == "flops" and (real := self.trials.flops(made)) > self.budget.share:
                self.offset += real - self.predict(made)
                failures += 1
                continue
            self.tell(f"exchange tokens between sites: loss {least:.4g} so far")
            left, failures = left - 1, 0
            self.tried += 1
            if (found := self.trials.loss(made)) < least:
                best, least = made, found
        return best
