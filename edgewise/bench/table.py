"""A benchmark record as a table for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgewise.bench.record import Measurement, Record

_STYLES = {"valid": "green", "semivalid": "yellow", "invalid": "red"}


def table(record: Record) -> RenderableType:
    """Make a table with one row for each artifact, and below it why a row can be trusted less, and what was
    skipped.

    An unknown number is a dash.
    """
    title = Text(f"{record.model}  {' '.join(record.compress)}".rstrip())
    rows = Table(title=title, title_justify="left")
    numbers = ("tokens", "load", "mean", "p50", "p90", "p99", "CV", "speed-up", "peak memory", "max error")
    for heading in ("artifact", *numbers, "validity"):
        # Folded, and not cut: on a narrow terminal every name can still be read.
        rows.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for one in record.measurements:
        rows.add_row(*_cells(one))
    notes = [f"{one.artifact}: {reason}" for one in record.measurements for reason in one.reasons]
    notes += [f"{label}: skipped, {reason}" for label, reason in record.skipped.items()]
    return Group(rows, *(Text(note) for note in notes))


def _cells(one: Measurement) -> list[RenderableType]:
    latency = one.latency
    errors = list(one.accuracy.outputs.values()) if one.accuracy else []
    known = [error.max_abs for error in errors if error.max_abs is not None]
    worst = (
        "not finite" if any(not error.finite for error in errors) else f"{max(known):.1e}" if known else "-"
    )
    tokens = f"{one.sites[0].tokens_in} > {one.sites[-1].tokens_out}" if one.sites else "-"
    return [
        Text(one.artifact),
        tokens,
        _ms(one.cold_load_ms),
        *(
            _ms(value)
            for value in (
                (latency.mean_ms, latency.p50_ms, latency.p90_ms, latency.p99_ms) if latency else (None,) * 4
            )
        ),
        "-" if latency is None or latency.cv is None else f"{latency.cv:.1%}",
        "-" if one.speedup is None else f"{one.speedup:.2f}x",
        "-" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**20:.0f} MiB",
        worst,
        Text(one.validity, style=_STYLES[one.validity]),
    ]


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
