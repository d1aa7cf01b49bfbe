"""A comparison as files: JSON, a self-contained page with a Pareto plot, and the plot as an image."""

from __future__ import annotations

import json
from html import escape
from importlib.util import find_spec
from math import ceil
from pathlib import Path

from edgewise.document import readable
from edgewise.errors import InputError, MissingExtra
from edgewise.exporter.compare import Comparison, Row

_COLOURS = ("#2f6fde", "#d9622b", "#1a7f4b", "#8a3fb5", "#b3261e", "#0f8b8d", "#a87900", "#5b6675", "#d03f8c", "#5a7d1c")
_MARKS = ("o", "s", "^", "D")
_STYLE = """body{margin:0 auto;max-width:70rem;padding:1.5rem 1rem 4rem;font:16px/1.5 system-ui,sans-serif;color:#1c2430;
background:#fff}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{color:#5b6675;margin:.2rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}th,td{text-align:left;
padding:.3rem .8rem .3rem 0;border-bottom:1px solid #d9dee5}.n{text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#1c2430}"""

Point = tuple[str, float, float]


def check(folder: Path) -> None:
    """Raise MissingExtra without matplotlib, InputError if `folder` cannot be one."""
    if find_spec("matplotlib") is None:
        raise MissingExtra('matplotlib is not installed; install it with: pip install "edgewise[report]"')
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder")


def write(found: Comparison, folder: Path) -> None:
    """Write `compare.json`, `compare.html` and `compare.png`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / "compare.json").write_text(readable(text), "utf-8")
        (folder / "compare.html").write_text(readable(page(found)), "utf-8")
        _image(found, folder / "compare.png")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def columns(found: Comparison) -> list[str]:
    """Headings of the numbers in the table."""
    timed = ["latency", "of minimums", "over FLOPs"] if found.target else []
    quality = ["accuracy"] if found.labelled else ["cosine", "rel. error"]
    return ["tokens", "FLOPs", *quality, "agreement", *timed]


def cells(row: Row, found: Comparison) -> list[str | None]:
    """The numbers of one row; None is unknown. A count that is not the one wanted says so."""
    tokens = str(row.tokens) if row.tokens == row.wanted else f"{row.tokens} (not {row.wanted})"
    quality = [_form(row.accuracy, ".1%")] if found.labelled else [_form(row.cosine, ".4f"), _form(row.relative, ".3f")]
    made = [tokens, _form(row.flops_ratio, ".1%"), *quality, _form(row.agreement, ".1%")]
    if found.target:
        latency = row.latency
        made += [_form(latency.ratio if latency else None, ".1%"),
                 _form(latency.ratio_of_minimums if latency else None, ".1%"),
                 _form(row.over_flops, "+.1%")]
    return made


def site_text(row: Row) -> str | None:
    """The sites of a row in few words."""
    if len(row.sites) < 2:
        return row.sites[0] if row.sites else None
    return f"{row.sites[0]} and {len(row.sites) - 1} more"


def _form(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _points(found: Comparison) -> tuple[str, str, list[Point]]:
    """The axes' names, and a point for each row: less cost to the left, better quality on top."""
    points = []
    for row in found.rows:
        quality = row.accuracy if found.labelled else row.cosine
        cost = row.latency.ratio if row.latency else None if found.target else row.flops_ratio
        if row.method == "uncompressed":
            cost = 1.0
        if quality is not None and cost is not None:
            points.append((row.method, cost, quality))
    return (
        f"latency on {found.target}, of the uncompressed" if found.target else "FLOPs, of the uncompressed",
        "accuracy" if found.labelled else "cosine with the uncompressed output",
        points,
    )


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats: none is as cheap and as good, and better in one."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not best or point[2] > best[-1][2]:
            best.append(point)
    return best


def page(found: Comparison) -> str:
    """The page, which needs nothing from elsewhere."""
    head = "".join(f"<th{' class=n' if i > 1 else ''}>{escape(name)}" for i, name in
                   enumerate(["method", "site", *columns(found)]))
    rows = "".join(
        f"<tr><td>{escape(row.method)}<td>{escape(site_text(row) or '-')}"
        + "".join(f"<td class=n>{escape(cell or '-')}" for cell in cells(row, found))
        for row in found.rows
    )
    left = "".join(
        f"<tr><td>{escape(one.method)}<td>{'any' if one.keep is None else f'{one.keep:g}'}<td>{escape(one.reason)}"
        for one in found.left_out
    )
    timed = (" Latency: compressed by uncompressed, interleaved, one thread. Over FLOPs: the latency ratio less the FLOPs "
             "ratio.") if found.target else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(found.model)}</title><style>{_STYLE}</style><h1>{escape(found.model)}</h1>"
        f"<p>{found.samples} samples of {escape(found.data)}; {found.tokens} tokens, {found.protected} of them protected."
        f"{timed}</p><h2>Cost and quality</h2>{_svg(found)}<p>The line joins the points that no other beats.</p>"
        f"<h2>Methods</h2><div class=scroll><table><tr>{head}{rows}</table></div>"
        f"<h2>Left out</h2><div class=scroll><table><tr><th>method<th>keep<th>reason{left}</table></div></html>\n"
    )


def _svg(found: Comparison) -> str:
    across, up, points = _points(found)
    if not points:
        return "<p>There is nothing to draw.</p>"
    names = list(dict.fromkeys(name for name, _, _ in points))
    height = max(420, 40 + 18 * len(names))
    low, high = min(q for _, _, q in points), max(q for _, _, q in points)
    low, high = low - 0.05 * (high - low or 0.1), high + 0.05 * (high - low or 0.1)
    right = ceil(max(1.0, *(cost for _, cost, _ in points))) * 1.03

    def at(cost: float, quality: float) -> tuple[float, float]:
        return 70 + 640 * cost / right, height - 50 - (height - 70) * (quality - low) / (high - low)

    made = [f"<svg viewBox='0 0 900 {height}' role=img aria-label='Pareto plot'>"]
    step = 0.2 * round(right / 1.03)
    for i in range(6):
        x, y = at(step * i, low + (high - low) * i / 5)
        made.append(f"<path d='M{x:.1f} 20V{height - 50}M70 {y:.1f}H710' stroke='#e3e7ec'/>"
                    f"<text x={x:.1f} y={height - 33} text-anchor=middle>{step * i:.0%}</text>"
                    f"<text x=64 y={y + 4:.1f} text-anchor=end>{low + (high - low) * i / 5:.3f}</text>")
    made.append(f"<text x=390 y={height - 10} text-anchor=middle>{escape(across)}</text>"
                f"<text transform='translate(16 {height / 2}) rotate(-90)' text-anchor=middle>{escape(up)}</text>")
    line = "L".join("{:.1f} {:.1f}".format(*at(cost, quality)) for _, cost, quality in front(points))
    made.append(f"<path d='M{line}' fill=none stroke='#5b6675' stroke-dasharray='4 3'/>")
    for name, cost, quality in points:
        x, y = at(cost, quality)
        made.append(f"{_mark(names.index(name), x, y, f'{name}: {cost:.1%}, {quality:.3f}')}")
    for i, name in enumerate(names):
        made.append(f"{_mark(i, 735, 30 + 18 * i, name)}<text x=748 y={34 + 18 * i}>{escape(name)}</text>")
    return "".join(made) + "</svg>"


def _mark(index: int, x: float, y: float, title: str) -> str:
    colour = _COLOURS[index % len(_COLOURS)]
    inside = f"fill='{colour}' fill-opacity='.8'><title>{escape(title)}</title>"
    kind = _MARKS[index // len(_COLOURS) % len(_MARKS)]
    if kind == "o":
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' {inside}</circle>"
    shape = {"s": "m-5-5h10v10h-10z", "^": "m0-6l6 11h-12z", "D": "m0-6l6 6l-6 6l-6-6z"}[kind]
    return f"<path d='M{x:.1f} {y:.1f}{shape}' {inside}</path>"


def _image(found: Comparison, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, up, points = _points(found)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(name for name, _, _ in points)):
        costs = [cost for other, cost, _ in points if other == name]
        qualities = [quality for other, _, quality in points if other == name]
        mark, colour = _MARKS[i // len(_COLOURS) % len(_MARKS)], _COLOURS[i % len(_COLOURS)]
        axes.scatter(costs, qualities, label=name, color=colour, marker=mark, alpha=0.8, s=36)
    best = front(points)
    if best:
        axes.plot([p[1] for p in best], [p[2] for p in best], "--", color="#5b6675", linewidth=1, zorder=0)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.set(xlabel=across, ylabel=up, title=f"{found.model}, {found.samples} samples of {found.data}")
    axes.set_xlim(left=0)
    axes.grid(color="#e3e7ec")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
