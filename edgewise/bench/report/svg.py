"""Small plots as inline SVG, narrow enough for a phone. Whatever text comes in is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 360
_COLOURS = (
    "#2f6fde", "#d9622b", "#1a7f4b", "#8a3fb5", "#b3261e", "#0f8b8d", "#a87900", "#5b6675",
    "#e377c2", "#7fb84c", "#6b4423", "#22a7f0", "#f2a900", "#3d3d8f",
)  # fmt: skip
COLOURS = 8
"""Series that lines and bars of one plot can have and be told apart."""
_WIDE = 30
"""How many times the least cost the most is, from which on a plot counts in powers of ten."""
_LONGEST = 46


def colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def short(text: str, most: int = _LONGEST) -> str:
    """A name cut in its middle, as its end tells names apart too."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in a range, at most so many and two at least where the range has any width."""
    if not math.isfinite(high - low) or high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most:
        step *= 2.5 if round(step / 10 ** math.floor(math.log10(step))) == 2 else 2
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, first + most + 1) if i * step <= high + 1e-12 * abs(high)]


@dataclass(frozen=True)
class Axis:
    """A range of numbers on a range of places."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        width = self.high - self.low
        share = (value - self.low) / width if width > 0 and math.isfinite(width) else 0.5
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))


def padded(values: Sequence[float], start: float, end: float, *, zero: bool = False, least: float = 0.0) -> Axis:
    """An axis that holds all values, with a little room; it is `least` wide, so that rounding errors do not fill it."""
    low, high = min(values), max(values)
    room = max(0.05 * (high - low) or abs(high) * 0.05 or 1.0, (least - (high - low)) / 2)
    return Axis(0.0 if zero and low >= 0 else low - room, high + room, start, end)


def distributions(series: Mapping[str, Sequence[float]], unit: str) -> str:
    """A histogram for each series, one below the other on one axis. It ends at the 99th percentile; what lies beyond is told."""
    ends = [_rank(sorted(values), 0.99) for values in series.values()]
    axis = padded([min(min(values) for values in series.values()), *ends], 8, WIDTH - 8)
    row, parts = 74, []
    for index, (name, values) in enumerate(series.items()):
        top, base = index * row, index * row + 62
        bins = [0] * 48
        for value in values:
            if value <= axis.high:
                place = (axis.at(value) - axis.start) / (axis.end - axis.start)
                bins[min(len(bins) - 1, int(place * len(bins)))] += 1
        width, most = (axis.end - axis.start) / len(bins), max(bins) or 1
        beyond = sum(value > axis.high for value in values)
        median = _rank(sorted(values), 0.5)
        told = f"median {number(median)} {unit}, {len(values)} samples" + (f", {beyond} beyond" if beyond else "")
        parts += [_text(8, top + 12, short(name)), _text(8, top + 25, told, kind="soft")]
        for place, count in enumerate(bins):
            if count:
                height = max(1.0, 30 * count / most)
                parts.append(
                    f'<rect x="{axis.start + place * width:.1f}" y="{base - height:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}" fill="{colour(index)}"/>'
                )
        at = axis.at(median)
        parts.append(f'<path d="M{at:.1f} {base - 32}V{base}" class="median"/>')
        parts.append(f'<path d="M{axis.start} {base}H{axis.end}" class="line"/>')
    bottom = len(series) * row
    for value in ticks(axis.low, axis.high):
        parts.append(_text(axis.at(value), bottom + 4, number(value), "middle", "soft"))
    parts.append(_text(WIDTH - 8, bottom + 20, unit, "end", "soft"))
    return _svg(bottom + 26, "latency distributions", parts)


def over_time(series: Mapping[str, Sequence[float]], unit: str, most: int = 240) -> str:
    """The samples in the order in which they were taken; of many, the median of each group of neighbours."""
    drawn = {name: _thinned(values, most) for name, values in series.items()}
    top = max(_rank(sorted(values), 0.99) for values in drawn.values())
    low = min(min(values) for values in drawn.values())
    up = padded([low, top], 150, 12)
    parts = []
    for value in ticks(up.low, up.high, 4):
        parts.append(f'<path d="M46 {up.at(value):.1f}H{WIDTH - 6}" class="line"/>')
        parts.append(_text(42, up.at(value) + 4, number(value), "end", "soft"))
    for index, values in enumerate(drawn.values()):
        across = Axis(0, max(1, len(values) - 1), 48, WIDTH - 8)
        points = " ".join(f"{across.at(i):.1f},{up.at(value):.1f}" for i, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour(index)}" stroke-width="1.2"/>')
    parts.append(_text(46, 168, f"first sample … last ({unit})", kind="soft"))
    return _svg(174, "samples in the order in which they were taken", parts) + legend(list(series))


@dataclass(frozen=True)
class Point:
    """One artifact in the Pareto plot; `size` in bytes, or None where it is not known. `kind`: what it shares with others."""

    name: str
    cost: float
    quality: float
    size: int | None = None
    kind: str = ""


def pareto(points: Sequence[Point], across: str, up: str) -> str:
    """Less cost to the left, better quality on top, the area of a mark as the size; a line joins those that no other beats.

    Of more points than there are colours, those of a kind have the same one, and the legend names those on the line. Costs that
    are far apart are in powers of ten.
    """
    costs = [point.cost for point in points]
    wide = min(costs) > 0 and math.isfinite(max(costs)) and max(costs) / min(costs) > _WIDE
    scale: Callable[[float], float] = math.log10 if wide else float
    x = padded([scale(cost) for cost in costs], 52, WIDTH - 16, zero=not wide)
    y = padded([point.quality for point in points], 190, 28, least=0.02)
    largest = max((point.size or 0 for point in points), default=0)
    parts = []
    for value in ticks(x.low, x.high):
        if wide and not value.is_integer():
            continue
        parts.append(f'<path d="M{x.at(value):.1f} 22V194" class="line"/>')
        parts.append(_text(x.at(value), 208, number(float(f"1e{value:.0f}") if wide else value), "middle", "soft"))
    for value in ticks(y.low, y.high, 4):
        parts.append(f'<path d="M48 {y.at(value):.1f}H{WIDTH - 8}" class="line"/>')
        parts.append(_text(45, y.at(value) + 4, f"{value:.4g}", "end", "soft"))
    best = front(points)
    many = len(points) > COLOURS
    keys = list(dict.fromkeys(point.kind if many else point.name for point in points))
    line = " ".join(f"{x.at(scale(point.cost)):.1f},{y.at(point.quality):.1f}" for point in best)
    parts.append(f'<polyline points="{line}" class="front"/>')
    for index, point in enumerate(points):
        index = keys.index(point.kind) if many else index
        radius = 4 + 9 * math.sqrt(point.size / largest) if point.size and largest else 4
        size = "" if point.size is None else f", {point.size / 1e6:.2f} MB"
        title = f"{point.name}: {number(point.cost)}, {point.quality:.4g}{size}"
        parts.append(
            f'<circle cx="{x.at(scale(point.cost)):.1f}" cy="{y.at(point.quality):.1f}" r="{radius:.1f}" fill="{colour(index)}" '
            f'fill-opacity=".75"><title>{escape(title)}</title></circle>'
        )
    parts.append(_text(WIDTH - 8, 226, across, "end", "soft"))
    parts.append(_text(4, 10, up, kind="soft"))
    plot = _svg(232, "accuracy, latency and size", parts) + legend(keys if many else [point.name for point in points])
    if many:
        told = [f"{short(point.name, 80)}: {number(point.cost)}, {point.quality:.4g}" for point in best]
        plot += "<ul class='notes soft'>" + "".join(f"<li>{escape(line)}</li>" for line in told) + "</ul>"
    return plot


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none is as cheap and as good, and better in one."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, int]], str]], label: str) -> str:
    """A bar for each row, of parts one after the other, all on one scale; beside it a text."""
    most = max((sum(count for _, count in parts) for _, parts, _ in rows), default=0) or 1
    made, kinds = [], list(dict.fromkeys(kind for _, parts, _ in rows for kind, _ in parts))
    for index, (name, parts, told) in enumerate(rows):
        y, x = index * 36, 8.0
        made += [_text(8, y + 12, short(name, 34)), _text(WIDTH - 8, y + 12, told, "end", "soft")]
        for kind, count in parts:
            width = (WIDTH - 16) * (count / most)
            made.append(
                f'<rect x="{x:.1f}" y="{y + 17}" width="{width:.1f}" height="11" fill="{colour(kinds.index(kind))}">'
                f"<title>{escape(kind)}: {count}</title></rect>"
            )
            x += width
    return _svg(len(rows) * 36 + 2, label, made) + (legend(kinds) if len(kinds) > 1 else "")


def tokens(rows: Sequence[tuple[str, int, int]], label: str) -> str:
    """What comes into each site, and the part of it that goes out."""
    most = max((max(before, after) for _, before, after in rows), default=0) or 1
    made = []
    for index, (name, before, after) in enumerate(rows):
        y = index * 36
        made += [_text(8, y + 12, short(name, 34)), _text(WIDTH - 8, y + 12, f"{before} → {after}", "end", "soft")]
        for count, kind in ((before, "gone"), (after, "bar")):
            made.append(
                f'<rect x="8" y="{y + 17}" width="{(WIDTH - 16) * (count / most):.1f}" height="11" class="{kind}"/>'
            )
    return _svg(len(rows) * 36 + 2, label, made)


def legend(names: Sequence[str]) -> str:
    """What the colours mean."""
    items = "".join(
        f'<li><i style="background:{colour(index)}"></i>{escape(name)}</li>' for index, name in enumerate(names)
    )
    return f"<ul class=legend>{items}</ul>"


def _rank(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _thinned(values: Sequence[float], most: int) -> list[float]:
    if len(values) <= most:
        return list(values)
    edges = [len(values) * i // most for i in range(most + 1)]
    return [_rank(sorted(values[a:b]), 0.5) for a, b in pairwise(edges)]
