"""What accuracy costs: of artifacts that compute the same thing, accuracy against median latency and against size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from edgewise.bench.record import Measurement, Record
from edgewise.bench.report import svg
from edgewise.verify.ladder import Rung
from edgewise.verify.metrics import worst

Named = tuple[str, Measurement]
Scores = Mapping[tuple[str, str], float]
"""By the name and the digest of an artifact: the functions of one file share its digest."""


def tradeoff(named: Sequence[Sequence[Named]], records: Sequence[Record], scores: Scores) -> Iterable[str]:
    """The section. `named`: of every record its measurements with their names; `scores`: accuracy on labelled data.

    Only artifacts of the same model and role are held against one another. Those that a stand-in timed have no latency here.
    """
    groups: dict[tuple[str, str], list[Named]] = {}
    for record, measured in zip(records, named, strict=True):
        for name, one in measured:
            groups.setdefault((record.model, one.role), []).append((name, one))
    plots: list[str] = []
    stand_ins = False
    for (model, role), measured in groups.items():
        title = f"{model} {role}" if len(groups) > 1 else ""
        for what, quality in _measures(scores):
            if any(quality(one) is not None for _, one in measured):
                plots += _plots(title, what, quality, measured)
                stand_ins |= any(one.stand_in is not None and quality(one) is not None for _, one in measured)
    if plots:
        yield f"<h2>Accuracy, latency and size</h2><div class=plots>{''.join(plots)}</div>"
        note = "The area of a mark is the size on disk; the line joins what no other beats."
        if stand_ins:
            note += " What another runtime timed in the place of the target's has no latency here."
        yield f"<p class=sub>{note}</p>"


def _measures(scores: Scores) -> list[tuple[str, Callable[[Measurement], float | None]]]:
    return [
        ("accuracy on labelled data", lambda one: scores.get((one.artifact, one.artifact_digest))),
        ("cosine with the uncompressed model", lambda one: cosine(one.quality)),
    ]


def _plots(
    title: str, what: str, quality: Callable[[Measurement], float | None], measured: Sequence[Named]
) -> Iterable[str]:
    by_time: list[svg.Point] = []
    by_size: list[svg.Point] = []
    for name, one in measured:
        value = quality(one)
        if value is None:
            continue
        kind = f"{one.target} {one.precision}"
        if one.latency is not None and one.stand_in is None:
            by_time.append(svg.Point(name, one.latency.p50_ms, value, one.artifact_bytes, kind))
        if one.artifact_bytes is not None:
            by_size.append(svg.Point(name, one.artifact_bytes / 1e6, value, one.artifact_bytes, kind))
    for points, across in ((by_time, "median latency, ms"), (by_size, "size, MB")):
        if points:
            head = f"<h3>{escape(title)}</h3>" if title else ""
            yield f"<div>{head}{svg.pareto(points, across, what)}</div>"


def cosine(rung: Rung | None) -> float | None:
    """The worst cosine of the outputs of a rung."""
    return None if rung is None or not rung.outputs else worst(rung.outputs.values()).cosine
