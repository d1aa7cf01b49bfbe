"""Schedules: how many tokens each site keeps, so that a cost is met and as little as possible is lost.

Both are modelled alike, from what one site alone does: `loss[i, n]` and `cost[i, n]` are the loss and the change of the cost where
site i leaves n tokens and no other site removes any. To go from n to m tokens at site i then adds what i alone adds between them,
so that a schedule is a path through counts that never rise, and the best one is found exactly, by dynamic programming with a price
on the cost (Lagrange; Everett, Operations Research 1963). What the model leaves out, how sites act on one another, is for
`exchanged`: a schedule near another one at the same cost, to be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MOST_LEVELS = 160
"""Counts of tokens that the dynamic program tells apart; in between, slack is used up one token at a time."""
LEAST_POWER, MOST_POWER = 1.5, 4.0
"""Of the number of halvings of the tokens, as a loss grows with it. Above 1, so that two small losses are preferred to a large."""
Counts = tuple[int, ...]
Predict = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Sites:
    """Where tokens may go: `count` sites one after the other, with `free` unprotected tokens before the first. At least `least`
    stay at any, and with `halves` at least half of those that come."""

    count: int
    free: int
    halves: bool
    least: int = 1

    def floor(self, before: int) -> int:
        """The fewest tokens that one site can leave of `before`."""
        return min(before, max(self.least, (before + 1) // 2 if self.halves else 1))

    def clipped(self, removed: Sequence[int]) -> Counts:
        """Counts behind each site, where each removes so many, or as many as it can."""
        counts, left = [], self.free
        for number in removed:
            left -= min(max(0, number), left - self.floor(left))
            counts.append(left)
        return tuple(counts)

    def removed(self, counts: Sequence[int]) -> list[int]:
        """What each site removes."""
        return [before - after for before, after in pairwise((self.free, *counts))]

    @property
    def fewest(self) -> Counts:
        """Every site removes all that it can."""
        return self.clipped([self.free] * self.count)


def shares(sites: Sites) -> np.ndarray:
    """The cost of mean tokens: behind the sites, as a share of all; exact."""
    behind = (sites.count - np.arange(sites.count)) / sites.count
    return -behind[:, None] * (1 - np.arange(sites.free + 1) / sites.free)


def power_curve(free: int, points: Sequence[tuple[int, float]]) -> np.ndarray:
    """Losses by count, through two measured `(count, loss)`, or one: a power of how often the tokens are halved."""
    halvings = np.log2(free / np.maximum(np.arange(free + 1), 0.5))
    (some, small), (more, large) = (sorted(points, reverse=True) * 2)[:2] if len(points) > 1 else (points[0], points[0])
    a, b = halvings[some], halvings[more]
    power = 2.0
    if b > a and small > 0 and large > 0:
        power = min(MOST_POWER, max(LEAST_POWER, float(np.log(large / small) / np.log(b / a))))
    return np.asarray(large * (halvings / b) ** power)


def quadratic_curve(free: int, points: Sequence[tuple[int, float]]) -> np.ndarray:
    """Changes of a cost by count: the parabola through two measured `(count, change)` and none at `free`; a line through one."""
    known = [(free, 0.0), *points]
    x, y = np.array(known, float).T
    return np.polyval(np.polyfit(x / free, y, min(len(known) - 1, 2)), np.arange(free + 1) / free)


def along(table: np.ndarray, sites: Sites, counts: Sequence[int], each: float = 0.0) -> float:
    """The sum along a schedule, from tables of single sites; `each`: what a site that removes anything adds besides."""
    path = pairwise((sites.free, *counts))
    return float(sum(table[i, b] - table[i, a] + each * (b < a) for i, (a, b) in enumerate(path)))


def best_schedule(sites: Sites, loss: np.ndarray, cost: np.ndarray, budget: float, each: float = 0.0) -> Counts | None:
    """The counts of least loss whose cost `(1 + along(cost))` is at most `budget`; None if there are none."""

    def fits(counts: Sequence[int]) -> bool:
        return 1 + along(cost, sites, counts, each) <= budget + 1e-9

    step = -(-sites.free // MOST_LEVELS)
    levels = np.unique([sites.least, *range(sites.free, sites.least - 1, -step), *sites.fewest])
    floors = np.array([sites.floor(int(n)) for n in levels])
    allowed = (levels[None, :] <= levels[:, None]) & (levels[None, :] >= floors[:, None])

    def priced(price: float) -> Counts:
        total = (loss + price * cost)[:, levels]
        after, choice = np.zeros(len(levels)), []
        for row in total[::-1]:
            value = row[None, :] - row[:, None] + price * each * (levels[None, :] < levels[:, None]) + after[None, :]
            value[~allowed] = np.inf
            choice.append(value.argmin(1))
            after = value.min(1)
        at, counts = len(levels) - 1, []
        for chosen in choice[::-1]:
            at = int(chosen[at])
            counts.append(int(levels[at]))
        return tuple(counts)

    if not fits(sites.fewest) and not fits(priced(1e12)):
        return None
    low, high = 0.0, 1e-6
    while not fits(priced(high)) and high < 1e12:
        low, high = high, high * 8
    found = priced(high) if fits(priced(high)) else sites.fewest
    for _ in range(40):
        middle = (low + high) / 2
        trial = priced(middle)
        if fits(trial):
            high, found = middle, trial
        else:
            low = middle
    return _filled(sites, loss, found, fits)


def _filled(sites: Sites, loss: np.ndarray, counts: Counts, fits: Callable[[Sequence[int]], bool]) -> Counts:
    """The same with what is left of the budget used up, one token at a time, where it saves most."""
    while True:
        options = []
        for i in range(sites.count):
            more = (*counts[:i], counts[i] + 1, *counts[i + 1 :])
            path = list(pairwise((sites.free, *more)))
            if all(sites.floor(a) <= b <= a for a, b in path) and fits(more):
                options.append((along(loss, sites, more), more))
        if not options or min(options)[0] >= along(loss, sites, counts):
            return counts
        counts = min(options)[1]


def exchanged(
    sites: Sites, counts: Sequence[int], predict: Predict, budget: float, generator: np.random.Generator
) -> Counts | None:
    """A schedule of the same cost in which a random site removes less, and another as much more as the budget needs; None if
    that is none."""
    removed = sites.removed(counts)
    giving = [i for i, number in enumerate(removed) if number]
    if sites.count < 2 or not giving:
        return None
    giver = int(generator.choice(giving))
    taker = int(generator.choice([i for i in range(sites.count) if i != giver]))
    given = max(1, round(removed[giver] * float(generator.choice([0.15, 0.3, 0.6, 1.0]))))

    def made(more: int) -> Counts:
        changed = list(removed)
        changed[giver] -= given
        changed[taker] += more
        return sites.clipped(changed)

    low, high = 0, sites.free
    if predict(made(high)) > budget:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if predict(made(middle)) <= budget else (middle, high)
    found = made(low) if predict(made(low)) <= budget else made(high)
    return None if found == tuple(counts) else found
