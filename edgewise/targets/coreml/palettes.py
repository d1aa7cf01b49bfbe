"""The palette of a weight: few values, near which all others lie.

k-means in one dimension over the values that there are. Clusters of sorted values are intervals, so that sums from the left give
everything of a cluster at once. Lloyd's algorithm stops where no value changes its cluster; then the two neighbours that cost least
together are joined, the cluster that gains most is split, and so on while that helps. Nothing is drawn: the same weight gives the
same palette on every machine.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 30
"""Most rounds of Lloyd's algorithm at a time."""
_BINS = 1024


def palette(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `size` values `(size,)`, ascending and of the weight's type, and for every element, flat, the index of the nearest
    one in uint8. A weight of no more than `size` values keeps all of them."""
    values, places, counts = np.unique(weight.reshape(-1), return_inverse=True, return_counts=True)
    if len(values) <= size:
        table = np.concatenate([values, np.repeat(values[-1:], size - len(values))])
        return table, places.reshape(-1).astype(np.uint8)
    sums = _Sums(values.astype(np.float64), counts.astype(np.float64))
    table = _improved(sums, sums.settled(_start(sums, size))).astype(weight.dtype)
    return table, _nearest(sums.values, table.astype(np.float64))[places.reshape(-1)].astype(np.uint8)


def _start(sums: _Sums, size: int) -> np.ndarray:
    """Ascending values, whose density goes with the cube root of that of the weight (Panter and Dite, 1951)."""
    counts, edges = np.histogram(sums.values, _BINS, weights=sums.share)
    below = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    return np.interp((np.arange(size) + 0.5) / size * below[-1], below, edges)


class _Sums:
    """Ascending values, how often each is there, and the sums of both and of their products from the left."""

    def __init__(self, values: np.ndarray, share: np.ndarray) -> None:
        self.values, self.share = values, share
        self._below = np.concatenate([np.zeros((3, 1)), np.cumsum([share, share * values, share * values**2], axis=1)], axis=1)

    def ends(self, centres: np.ndarray) -> np.ndarray:
        """Where the cluster of each centre begins, and the last one ends."""
        return np.concatenate([[0], np.searchsorted(self.values, (centres[1:] + centres[:-1]) / 2), [len(self.values)]])

    def between(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each interval: how many there are, their mean (0 of none), and the sum of squares of the distances to it."""
        count, moment, square = self._below[:, last] - self._below[:, first]
        mean = np.where(count > 0, moment / np.where(count > 0, count, 1), 0.0)
        return count, mean, np.maximum(square - count * mean**2, 0)

    def settled(self, centres: np.ndarray) -> np.ndarray:
        """Centres after rounds of Lloyd's algorithm."""
        for _ in range(ROUNDS):
            ends = self.ends(centres)
            count, mean, _ = self.between(ends[:-1], ends[1:])
            moved = np.sort(np.where(count > 0, mean, centres))
            if np.array_equal(moved, centres):
                break
            centres = moved
        return centres


def _improved(sums: _Sums, centres: np.ndarray) -> np.ndarray:
    for _ in range(4 * len(centres)):
        ends = sums.ends(centres)
        count, mean, error = sums.between(ends[:-1], ends[1:])
        middle = np.searchsorted(sums.values, mean).clip(ends[:-1], ends[1:])
        _, low, low_error = sums.between(ends[:-1], middle)
        _, high, high_error = sums.between(middle, ends[1:])
        whole = (middle == ends[:-1]) | (middle == ends[1:])
        gain = np.where(whole, 0.0, error - low_error - high_error)
        split = int(gain.argmax())
        both = count[1:] + count[:-1]
        cost = count[1:] * count[:-1] / np.where(both > 0, both, 1) * np.diff(mean) ** 2
        cost[max(split - 1, 0) : split + 1] = np.inf
        join = int(cost.argmin())
        if not gain[split] > cost[join]:
            break
        joined = (count[join] * mean[join] + count[join + 1] * mean[join + 1]) / max(both[join], 1)
        kept = np.delete(mean, [split, join, join + 1])
        centres = sums.settled(np.sort(np.concatenate([kept, [low[split], high[split], joined]])))
    return centres


def _nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """For each value the index of the nearest one of an ascending table."""
    right = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    return np.where(values - table[right - 1] <= table[right] - values, right - 1, right)
