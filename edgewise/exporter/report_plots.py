"""The plots of a bundle's report, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10

from edgewise.bundle.manifest import Floating
from edgewise.exporter.report_figures import INTENDED, combined
from edgewise.passes.program import Site
from edgewise.verify.ladder import Rung

WIDTH, ROW = 760, 22
LEAST = 1e-9
"""Of a relative error: what is exact, or less, has no bar."""


def tokens(sites: Sequence[Site]) -> str:
    """What each site gets, and passes on."""
    left = 170
    scale = (WIDTH - left - 110) / max(s.tokens_in for s in sites)
    lines = []
    for i, site in enumerate(sites):
        text = f"{site.tokens_in} → {site.tokens_out}"
        by = f" by {', '.join(site.methods)}" if site.methods else ""
        bars = _bar(left, i, site.tokens_in * scale, "gone") + _bar(left, i, site.tokens_out * scale, "bar")
        lines.append(_row(i, left, site.name, bars, left + site.tokens_in * scale, text, f"{site.name}: {text}{by}"))
    return _svg(lines, len(sites), "tokens at every site")


def ladder(rungs: Sequence[Rung]) -> str:
    """The relative error of each rung, on a logarithmic scale, with the threshold where there is one."""
    known = [(rung, errors) for rung in rungs if (errors := combined(rung)) is not None and errors.relative is not None]
    left = 300
    top = max([1.0, *(errors.relative or 0.0 for _, errors in known)])
    decades = log10(top) - log10(LEAST)
    scale = (WIDTH - left - 110) / decades

    def at(value: float) -> float:
        return max(0.0, (log10(value) - log10(LEAST)) * scale) if value > 0 else 0.0

    lines = []
    for i, (rung, errors) in enumerate(known):
        value = errors.relative or 0.0
        bars = _bar(left, i, at(value), "intended" if rung.kind in INTENDED else "bar")
        if rung.threshold is not None:
            x = left + at(rung.threshold)
            bars += f'<line x1="{x:.1f}" y1="{i * ROW + 1}" x2="{x:.1f}" y2="{i * ROW + 20}" stroke="var(--bad)" stroke-width="2"/>'
        behind = left + max(at(value), at(rung.threshold or 0.0))
        text = "exact" if value == 0 else f"{value:.1e}"
        lines.append(_row(i, left, rung.name, bars, behind, text, f"{rung.name} against {rung.against} ({rung.kind}): {text}"))
    for power in range(floor(log10(LEAST)), floor(log10(top)) + 1, 3):
        x, y = left + at(10.0**power), len(known) * ROW
        lines.append(f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle">1e{power}</text>')
    return _svg(lines, len(known) + 1, "relative error of every rung")


def sensitivity(layers: Sequence[Floating], kept: Sequence[str]) -> str:
    """Signal to noise of the outputs where each layer alone is quantised; those in `kept` stayed in floating point."""
    left = 340
    most = max([1.0, *(one.sqnr_db for one in layers if one.sqnr_db is not None)])
    scale = (WIDTH - left - 110) / most
    lines = []
    for i, one in enumerate(layers):
        value = most if one.sqnr_db is None else max(0.0, one.sqnr_db)
        text = "exact" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB"
        state = "kept in floating point" if one.layer in kept else "quantised"
        bars = _bar(left, i, value * scale, "intended" if one.layer in kept else "bar")
        name = one.layer if len(one.layer) <= 48 else f"…{one.layer[-47:]}"
        lines.append(_row(i, left, name, bars, left + value * scale, text, f"{one.layer}: {text}, {state}"))
    return _svg(lines, len(layers), "sensitivity of every layer")


def _bar(left: float, row: int, width: float, colour: str) -> str:
    return f'<rect x="{left}" y="{row * ROW + 3}" width="{width:.1f}" height="15" rx="2" fill="var(--{colour})"/>'


def _row(row: int, left: float, name: str, bars: str, behind: float, text: str, title: str) -> str:
    y = row * ROW + 15
    return (
        f'<g><title>{escape(title)}</title><text x="{left - 8}" y="{y}" text-anchor="end">{escape(name)}</text>{bars}'
        f'<text x="{behind + 6:.1f}" y="{y}">{escape(text)}</text></g>'
    )


def _svg(lines: Sequence[str], rows: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {rows * ROW + 4}" role="img" aria-label="{label}">' + "".join(lines) + "</svg>"
