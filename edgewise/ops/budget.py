"""Counts: what `keep`, `r` and a schedule ask for, as numbers fixed when the graph is built."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from edgewise.ops.match import max_merges
from edgewise.ops.methods import Method, max_keep


def kept_count(keep: float | int, free: int) -> int:
    """Tokens that `keep` asks for out of `free` unprotected ones: a fraction if a float up to 1.0, else a count.

    A fraction is rounded down, but at least one token stays. Raises ValueError outside the legal range.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or math.isnan(keep):
        raise ValueError(f"keep={keep!r} is not a number")
    if (isinstance(keep, float) and not keep.is_integer()) or (keep == 1.0 and isinstance(keep, float)):
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep:g} is out of range: a fraction lies above 0 and up to 1.0; "
                             f"a count is a whole number from 1 to {free}")
        # The small addend keeps 0.29 * 100 at 29, which in binary floating point is 28.999...
        return max(1, math.floor(keep * free + 1e-9))
    count = int(keep)
    if not 1 <= count <= free:
        raise ValueError(f"keep={count} is out of range: a count lies between 1 and {free} here "
                         "(protected tokens are not counted), a fraction above 0 and up to 1.0")
    return count


def count_to_keep(method: Method, keep: float | int | None, r: int | None, count: int, protected: int,
                  grid: tuple[int, ...] | None, frames: int | None, parameters: dict[str, Any]) -> int:
    """Tokens that stay besides the `protected`, when `method` runs once on `count` tokens.

    `keep` or `r` may be given, or neither where other parameters say the count (a stride, a ratio). `parameters` holds the
    method's others, defaults included, and is completed with what gives that count. Raises ValueError that names the legal
    range.
    """
    free = count - protected
    if keep is not None and r is not None:
        raise ValueError("give keep or r, not both")
    if r is not None and not 0 <= r < free:
        raise ValueError(f"r={r} is out of range: 0 to {free - 1}")
    wanted = free - r if r is not None else None if keep is None else kept_count(keep, free)
    if wanted is None and method.count is not None:
        return method.count(free, grid, frames, parameters)
    if method.legal_counts is not None:
        legal = method.legal_counts(free, grid, frames, parameters)
        options = _options(legal)
        if wanted is None:
            wanted = next((n for n, given in legal.items() if all(parameters[k] == v for k, v in given.items())), None)
            if wanted is None:
                named = {k: parameters[k] for given in legal.values() for k in given} or parameters
                raise ValueError(f"{', '.join(f'{k}={v}' for k, v in named.items())} does not fit the grid {grid}: it can keep "
                                 f"{options}")
        elif wanted not in legal:
            raise ValueError(f"{method.name} cannot keep {wanted} of {free} tokens"
                             + (f" on the grid {grid}" if "grid" in method.needs else "") + f": it can keep {options}")
        parameters.update(legal[wanted])
        return wanted
    if wanted is None:
        raise ValueError("give keep=... (tokens that stay: a fraction such as 0.5, or a count)"
                         + (" or r=... (tokens that go)" if method.merges else ""))
    least, most = max_keep(method, count, protected)
    if not least <= wanted <= most:
        raise ValueError(f"{method.name} cannot keep {wanted} of {free} unprotected tokens here: {least} to {most}")
    return wanted


def merge_schedule(r: int | Sequence[int], blocks: int, schedule: str = "constant") -> list[int]:
    """Tokens to merge at each block, as ToMe's published schedules have it.

    `decreasing` falls linearly from 2r to 0, `increasing` rises from 0 to 2r, a list is taken as it is and padded
    with zeros. Counts are not yet clipped to what a block can merge.
    """
    if not isinstance(r, int):
        if len(r) > blocks:
            raise ValueError(f"r lists {len(r)} blocks, and the model has {blocks}")
        if any(n < 0 for n in r):
            raise ValueError(f"r={list(r)} holds a negative number")
        return [*r, *([0] * (blocks - len(r)))]
    if r < 1:
        raise ValueError(f"r={r} is out of range: at least 1")
    if schedule == "constant" or blocks == 1:
        return [r] * blocks
    first, last = (2 * r, 0) if schedule == "decreasing" else (0, 2 * r)
    return [int(first + (last - first) / (blocks - 1) * i) for i in range(blocks)]


def spread_removal(total: int, tokens: int, protected: int, blocks: int, schedule: str = "constant") -> list[int]:
    """Spread `total` merges over `blocks`, in the shape of `schedule`, so that exactly `total` are done at the end.

    Where a block cannot merge its share (at most half of the unprotected tokens go at once), the excess goes to the
    later blocks, then to the earlier ones. Raises ValueError if even the most merges at every block do not suffice.
    """
    weights = {"constant": [1.0] * blocks,
               "decreasing": [float(blocks - 1 - i) for i in range(blocks)],
               "increasing": [float(i) for i in range(blocks)]}[schedule]
    if not any(weights):
        weights = [1.0] * blocks
    scale, done, share = total / sum(weights), 0.0, []
    for weight in weights:
        before, done = round(done), done + weight * scale
        share.append(round(done) - before)
    if total > _most(tokens, protected, blocks):
        raise ValueError(f"{total} merges do not fit into {blocks} blocks of {tokens} tokens: each merges at most "
                         "half of the unprotected tokens")
    counts, left, owed, missing = [], tokens, total, 0
    for block, wanted in enumerate(share):
        merged = min(wanted + missing, max_merges(left, protected), owed)
        missing += wanted - merged
        # What the later blocks could not do any more has to be done here; one merge more here costs them at most one.
        while merged + _most(left - merged, protected, blocks - block - 1) < owed:
            merged, missing = merged + 1, missing - 1
        counts.append(merged)
        left, owed = left - merged, owed - merged
    return counts


def _most(tokens: int, protected: int, blocks: int) -> int:
    """The most tokens that `blocks` matchings one after the other can merge away."""
    left = tokens
    for _ in range(blocks):
        left -= max_merges(left, protected)
    return tokens - left


def _options(legal: Mapping[int, Mapping[str, Any]]) -> str:
    """Legal counts in words: all of them with the parameters that give them, or their range where they are many."""
    if len(legal) > 16:
        counts = sorted(legal)
        step = min(b - a for a, b in pairwise(counts))
        whole = counts == list(range(counts[0], counts[-1] + 1, step))
        return (f"{counts[0]} to {counts[-1]}" + (f" in steps of {step}" if step > 1 else "") if whole else
                f"{', '.join(map(str, counts[:8]))}, ... {counts[-1]}")
    return ", ".join(str(n) + (f" ({', '.join(f'{k}={v}' for k, v in given.items())})" if given else "")
                     for n, given in legal.items()) or "nothing less"
