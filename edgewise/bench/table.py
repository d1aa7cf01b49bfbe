"""A benchmark record as a table for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgewise.bench.record import Comparison, Interval, Measurement, Record

_STYLES = {"valid": "green", "semivalid": "yellow", "invalid": "red"}


def table(record: Record | Comparison) -> RenderableType:
    """The table of a record, or all tables of a comparison."""
    return _record(record) if isinstance(record, Record) else _comparison(record)


def _record(record: Record) -> RenderableType:
    """A table with one row for each artifact, and below it why a row can be trusted less, and what was
    skipped.

    An unknown number is a dash.
    """
    title = Text(f"{record.model}  {' '.join(record.compress)}".rstrip())
    rows = Table(title=title, title_justify="left")
    numbers = ("tokens", "cold load", "mean", "p50", "p90", "p99", "CV", "speed-up", "peak memory", "max error")
    for heading in ("artifact", *numbers, "validity"):
        # Folded, and not cut: on a narrow terminal every name can still be read.
        rows.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for one in record.measurements:
        rows.add_row(*_cells(one))
    notes = [f"{one.artifact}: {reason}" for one in record.measurements for reason in one.reasons]
    notes += sorted({f"{key} is not known: {why}" for one in record.measurements for key, why in one.unknown.items()
                     if key not in ("stages", "quality")})  # fmt: skip
    notes += [f"{label}: skipped, {reason}" for label, reason in record.skipped.items()]
    return Group(rows, *(Text(note) for note in notes))


def _comparison(comparison: Comparison) -> RenderableType:
    """The table of every record, and one of the ratios: below 1, the artifact is faster than its baseline."""
    named = [f"[{number}] {path}" for number, path in enumerate(comparison.bundles)]
    rows = Table(title=Text("median time / that of the baseline"), title_justify="left")
    for heading in ("artifact", "baseline", "ratio", "interval"):
        rows.add_column(heading, justify="right" if heading in ("ratio", "interval") else "left", overflow="fold")
    for one in comparison.ratios:
        rows.add_row(
            Text(f"[{one.bundle}] {one.artifact}"),
            Text(f"[{one.baseline_bundle}] {one.baseline}"),
            f"{one.ratio:.3f}",
            f"{one.interval.low:.3f} to {one.interval.high:.3f} ({one.interval.confidence:.0%})",
        )
    tables: list[RenderableType] = []
    for name, record in zip(named, comparison.records, strict=True):
        tables += [Text(name), _record(record)]
    return Group(*tables, rows, *(Text(line) for line in comparison.unmatched))


def _speedup(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" + (f" ({interval.low:.2f} to {interval.high:.2f})" if interval else "")


def _cells(one: Measurement) -> list[RenderableType]:
    latency = one.latency
    errors = list(one.accuracy.outputs.values()) if one.accuracy else []
    known = [error.max_abs for error in errors if error.max_abs is not None]
    worst = "not finite" if any(not error.finite for error in errors) else f"{max(known):.1e}" if known else "-"
    tokens = f"{one.sites[0].tokens_in} > {one.sites[-1].tokens_out}" if one.sites else "-"
    return [
        Text(one.artifact),
        tokens,
        _ms(one.cold_load_ms),
        *(
            _ms(value)
            for value in ((latency.mean_ms, latency.p50_ms, latency.p90_ms, latency.p99_ms) if latency else (None,) * 4)
        ),
        "-" if latency is None or latency.cv is None else f"{latency.cv:.1%}",
        _speedup(one.speedup, one.speedup_interval),
        "-" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**20:.0f} MiB",
        worst,
        Text(one.validity, style=_STYLES[one.validity]),
    ]


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
