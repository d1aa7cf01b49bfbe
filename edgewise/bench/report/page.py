"""The page of one or several records: what was measured, on what, how far it can be trusted, and what was gained.

It needs nothing from elsewhere and runs nothing: no scripts, and a policy that lets the browser load nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from math import inf

from edgewise.bench.record import Comparison, Interval, Latency, Record
from edgewise.bench.report import svg
from edgewise.bench.report.tradeoff import Named, Scores, tradeoff
from edgewise.verify.ladder import Rung
from edgewise.verify.metrics import worst

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#d9dee5;--back:#fff;--card:#f5f7fa;--bar:#2f6fde;
--gone:#c9d6ee;--good:#1a7f4b;--warn:#8a5a00;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e8ecf1;--soft:#9aa6b5;--line:#333d4a;--back:#141a21;--card:#1d252f;
--bar:#6ba1ff;--gone:#2d3e5c;--good:#5fce95;--warn:#f0b95a;--bad:#ff8a80}}*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.2rem 1rem 4rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}h3{font-size:1rem;margin:0 0 .4rem;overflow-wrap:anywhere}p{margin:.3rem 0}
.plots+h3{margin-top:1.2rem}
.soft,p.sub{color:var(--soft)}p.sub{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.8rem;margin-top:1rem}
.card{background:var(--card);border-radius:.6rem;padding:.8rem 1rem;min-width:0}.card b{font-size:1.35rem;display:block}
.card span{color:var(--soft);font-size:.88rem;display:block}
.plots{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.plots>div{background:var(--card);border-radius:.6rem;padding:.8rem;min-width:0;max-width:34rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.good{color:var(--good)}
.card .valid{color:var(--good)}.card .semivalid{color:var(--warn)}.card .invalid,.bad{color:var(--bad)}
svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);font:11px system-ui,sans-serif}
svg text.soft{fill:var(--soft)}.line{stroke:var(--line)}.median{stroke:var(--ink);stroke-width:1.5}
.front{fill:none;stroke:var(--soft);stroke-dasharray:4 3}rect.bar{fill:var(--bar)}rect.gone{fill:var(--gone)}
ul.legend{list-style:none;padding:0;margin:.4rem 0 0;font-size:.82rem;overflow-wrap:anywhere}
ul.legend i{display:inline-block;width:.7rem;height:.7rem;border-radius:.15rem;margin-right:.4rem}
ul.notes{padding-left:1.1rem;overflow-wrap:anywhere}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(documents: Sequence[Record | Comparison], scores: Scores | None = None) -> str:
    """The page of these records and comparisons, as HTML. `scores`: accuracy on labelled data."""
    records = [record for document in documents for record in _records(document)]
    titles = _titles(records)
    names = _names(records, titles)
    named = [list(zip(group, record.measurements, strict=True)) for record, group in zip(records, names, strict=True)]
    measured = [one for group in named for one in group]
    models = list(dict.fromkeys(record.model for record in records))
    body = [f"<h1>{escape(', '.join(models))}</h1>", _sub(records), *_cards(named, records)]
    body += [
        *tradeoff(named, records, scores or {}),
        *_latency(named, records),
        *_ratios(documents, names, titles),
        *_tokens(names, records),
        *_stages(measured),
        *_placement(measured),
    ]
    body += [*_figures(measured), *_ladder(records, titles), *_host(records), *_trust(measured, records)]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name=viewport content="width=device-width,initial-scale=1"><link rel=icon href="data:,">'
        f"<title>{escape(', '.join(models))} · edgewise bench</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _records(document: Record | Comparison) -> Sequence[Record]:
    return [document] if isinstance(document, Record) else document.records


def _titles(records: Sequence[Record]) -> list[str]:
    """What tells records apart: the compression, of several models the model, and its number where an artifact would still have
    the name of another's."""
    several = len({record.model for record in records}) > 1
    plain = [
        ", ".join([*([record.model] if several else []), " ".join(record.compress) or "uncompressed"]) for record in records
    ]
    counts = Counter((title, one.artifact) for title, record in zip(plain, records, strict=True) for one in record.measurements)
    return [
        f"#{number} {title}" if any(counts[title, one.artifact] > 1 for one in record.measurements) else title
        for number, (title, record) in enumerate(zip(plain, records, strict=True))
    ]


def _names(records: Sequence[Record], titles: Sequence[str]) -> list[list[str]]:
    """A name for every measurement: the artifact's, and with several records their title."""
    if len(records) == 1:
        return [[one.artifact for one in records[0].measurements]]
    return [[f"{title}: {one.artifact}" for one in record.measurements] for title, record in zip(titles, records, strict=True)]


def _sub(records: Sequence[Record]) -> str:
    hosts = list(
        dict.fromkeys(record.host.device or record.host.cpu or "a machine of unknown make" for record in records)
    )
    times = [record.measured_at for record in records if record.measured_at]
    told = [", ".join(hosts), *(sorted(set(times))[:1]), f"edgewise {records[0].edgewise_version}"]
    return f"<p class=sub>{escape(' · '.join(told))}</p>"


def _cards(named: Sequence[Sequence[Named]], records: Sequence[Record]) -> Iterable[str]:
    """A card for each measurement; of more than there are colours, for the fastest of each model, role and target."""
    known = [(record.model, *pair) for record, group in zip(records, named, strict=True) for pair in group]
    shown = [(name, one) for _, name, one in known]
    if len(known) > svg.COLOURS:
        groups: dict[tuple[str, str, str], list[Named]] = {}
        for model, name, one in known:
            groups.setdefault((model, one.role, one.target), []).append((name, one))
        shown = [min(group, key=lambda pair: pair[1].latency.p50_ms if pair[1].latency else inf) for group in groups.values()]
        yield f"<h2>The fastest on each target</h2><p class=sub>Of {len(known)} artifacts, which are all further down.</p>"
    yield "<div class=cards>"
    for name, one in shown:
        lines = [
            _speed(one.speedup, one.speedup_interval),
            None if one.artifact_bytes is None else f"{one.artifact_bytes / 1e6:.2f} MB on disk",
            None if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**20:.0f} MiB of memory at most",
            None if one.cold_load_ms is None else f"cold load {svg.number(one.cold_load_ms)} ms",
            None if one.power_watts is None else f"{one.power_watts:.2f} W",
            None if one.stand_in is None else f"timed with {one.stand_in}",
        ]
        median = "-" if one.latency is None else f"{svg.number(one.latency.p50_ms)} ms"
        told = "".join(f"<span>{escape(line)}</span>" for line in lines if line)
        yield f"<div class=card><h3>{_broken(name)}</h3><b>{median}</b>{told}<span class={one.validity}>{one.validity}</span></div>"
    yield "</div>"


def _broken(name: str) -> str:
    """A name that may be folded behind its slashes, and behind the method of a site."""
    return escape(name).replace("/", "/<wbr>").replace("@", "@<wbr>")


def _speed(value: float | None, interval: Interval | None) -> str | None:
    if value is None:
        return None
    told = f"{value:.2f}× as fast as the first"
    return told if interval is None else f"{told} ({interval.low:.2f} to {interval.high:.2f})"


def _ratios(
    documents: Sequence[Record | Comparison], names: Sequence[Sequence[str]], titles: Sequence[str]
) -> Iterable[str]:
    """`names`: of the measurements of every record of the documents, in their order; `titles`: of these records."""
    number = 0
    for document in documents:
        end = number + len(_records(document))
        own, called = names[number:end], titles[number:end]
        number = end
        if isinstance(document, Comparison):
            known = {
                (place, one.artifact): name
                for place, (record, group) in enumerate(zip(document.records, own, strict=True))
                for one, name in zip(record.measurements, group, strict=True)
            }
            rows = [
                [known.get((one.bundle, one.artifact), one.artifact), known.get((one.baseline_bundle, one.baseline), one.baseline),
                 f"{one.ratio:.3f}", f"{one.interval.low:.3f} to {one.interval.high:.3f}", f"{one.interval.confidence:.0%}"]
                for one in document.ratios
            ]  # fmt: skip
            yield "<h2>Ratios of the median times</h2>"
            yield _table(["artifact", "baseline", "ratio", "interval", "confidence"], rows, numbers={2, 3, 4})
            bundles = "".join(
                f"<li>bundle {place}, {escape(title)}: {escape(name)}</li>"
                for place, (title, name) in enumerate(zip(called, document.bundles, strict=True))
            )
            yield f"<ul class='notes soft'>{bundles}</ul>"
            if document.unmatched:
                yield _notes(document.unmatched)


def _latency(named: Sequence[Sequence[Named]], records: Sequence[Record]) -> Iterable[str]:
    """All in one plot; more than there are colours in one for each model, role and target."""
    everything = [(record.model, *pair) for record, group in zip(records, named, strict=True) for pair in group]
    known = [(model, name, one, one.latency.samples_ms) for model, name, one in everything if one.latency is not None]
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for model, name, one, samples in known:
        title = f"{model} {one.role} on {one.target}" if len(known) > svg.COLOURS else ""
        groups.setdefault(title, {})[name] = samples
    if groups:
        yield "<h2>Latency</h2>"
    for title, series in groups.items():
        head = f"<h3>{_broken(title)}</h3>" if title else ""
        yield f"{head}<div class=plots><div><h3>Distribution</h3>{svg.distributions(series, 'ms')}</div>"
        yield f"<div><h3>In the order of measuring</h3>{svg.over_time(series, 'ms')}</div></div>"


def _tokens(names: Sequence[Sequence[str]], records: Sequence[Record]) -> Iterable[str]:
    plots = []
    for record in records:
        roles = {one.role: one.sites for one in record.measurements if one.sites}
        for role, sites in roles.items():
            title = f"{role}, {' '.join(record.compress)}"
            plot = svg.tokens([(site.name, site.tokens_in, site.tokens_out) for site in sites], title)
            plots.append(f"<div><h3>{escape(title)}</h3>{plot}</div>")
    if plots:
        yield f"<h2>Tokens by layer</h2><div class=plots>{''.join(dict.fromkeys(plots))}</div>"


def _stages(measured: Sequence[Named]) -> Iterable[str]:
    rows = [
        [name, stage, *_latency_cells(found)] for name, one in measured for stage, found in (one.stages or {}).items()
    ]
    if rows:
        yield "<h2>Stages</h2>"
        yield _table(["artifact", "stage", *_LATENCY], rows, numbers=set(range(2, 2 + len(_LATENCY))))


def _placement(measured: Sequence[Named]) -> Iterable[str]:
    rows = [
        (name, list(one.placement.items()), ", ".join(f"{count} on {unit}" for unit, count in one.placement.items()))
        for name, one in measured
        if one.placement
    ]
    if rows:
        yield f"<h2>Placement of graph nodes</h2><div class=plots><div>{svg.bars(rows, 'placement')}</div></div>"


_LATENCY = ["n", "mean ms", "p50", "p90", "p95", "p99", "min", "max", "CV"]


def _latency_cells(found: Latency | None) -> list[str]:
    if found is None:
        return ["-"] * len(_LATENCY)
    values = (found.mean_ms, found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.min_ms, found.max_ms)
    return [str(found.n), *(svg.number(value) for value in values), "-" if found.cv is None else f"{found.cv:.1%}"]


def _figures(measured: Sequence[Named]) -> Iterable[str]:
    rows = [
        [
            name,
            *_latency_cells(one.latency),
            "-" if one.artifact_bytes is None else f"{one.artifact_bytes / 1e6:.2f}",
            "-" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**20:.0f}",
            _known(one.cold_load_ms),
            _known(one.warm_load_ms),
            _known(one.power_watts),
            _known(one.temperature_celsius),
            one.validity,
        ]
        for name, one in measured
    ]
    head = ["artifact", *_LATENCY, "MB on disk", "MiB at most", "cold load ms", "warm load ms", "W", "°C", "validity"]
    yield "<h2>All figures</h2>"
    yield _table(head, rows, numbers=set(range(1, len(head) - 1)))


def _known(value: float | None) -> str:
    return "-" if value is None else svg.number(value)


def _ladder(records: Sequence[Record], titles: Sequence[str]) -> Iterable[str]:
    for title, record in zip(titles, records, strict=True):
        rungs = [*record.verification, *(one.accuracy for one in record.measurements if one.accuracy)]
        if rungs:
            yield f"<h2>Verification ladder{escape(f': {title}') if len(records) > 1 else ''}</h2>"
            rows = [_rung(rung) for rung in rungs]
            yield _table(
                ["step", "against", "error", "relative", "SQNR dB", "cosine", "allowed", ""], rows, {3, 4, 5, 6}, {7}
            )


def _rung(rung: Rung) -> list[str]:
    errors = worst(rung.outputs.values()) if rung.outputs else None
    verdict = {True: "<span class=good>passed</span>", False: "<span class=bad>failed</span>", None: ""}[rung.passed]
    figures = ["", "", ""]
    if errors is not None:
        values = ((errors.relative, ".2e"), (errors.sqnr_db, ".1f"), (errors.cosine, ".6f"))
        figures = ["" if value is None else format(value, form) for value, form in values]
    return [
        rung.name,
        rung.against,
        rung.kind,
        *figures,
        "" if rung.threshold is None else f"{rung.threshold:.0e}",
        verdict,
    ]


def _host(records: Sequence[Record]) -> Iterable[str]:
    yield "<h2>Machine and protocol</h2>"
    for host, protocol in dict.fromkeys((record.host, record.protocol) for record in records):
        values = {**host.model_dump(), **protocol.model_dump()}
        if host.memory_bytes is not None:
            values["memory_bytes"] = f"{host.memory_bytes / 2**30:.1f} GiB"
        rows = [
            [key.removesuffix("_bytes").replace("_", " "), str(value)]
            for key, value in values.items()
            if value not in (None, ())
        ]
        yield _table(["what", "value"], rows)


def _trust(measured: Sequence[Named], records: Sequence[Record]) -> Iterable[str]:
    notes = [f"{name}: {reason}" for name, one in measured for reason in one.reasons]
    notes += [
        f"{key.replace('_', ' ')} is not known: {why}"
        for _, one in measured
        for key, why in one.unknown.items()
        if key != "stages"
    ]
    notes += [f"{label}: skipped, {reason}" for record in records for label, reason in record.skipped.items()]
    if notes:
        yield "<h2>How far to trust this</h2>"
        yield _notes(list(dict.fromkeys(notes)))


def _notes(lines: Sequence[str]) -> str:
    return "<ul class=notes>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int] | None = None, raw: set[int] | None = None
) -> str:
    right, as_is = numbers or set(), raw or set()

    def cell(tag: str, column: int, text: str) -> str:
        inner = text if column in as_is and tag == "td" else escape(text)
        return f"<{tag}{' class=n' if column in right else ''}>{inner}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, text) for i, text in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows]
    return "<div class=scroll><table>" + "\n".join(lines) + "</table></div>"
