"""The report of records: what is in it, that it loads and runs nothing, and that a real browser has nothing to complain of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.bench import Comparison, Record, bench, compare
from edgewise.bench.report import page, svg
from edgewise.bundle import Bundle

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def compared(digits: Path) -> Comparison:
    bundle = Bundle.open(digits)
    return compare([bundle, bundle], samples=12, seconds=0, warmup=1, threads=1, cold=False)


@pytest.fixture(scope="module")
def record(compared: Comparison) -> Record:
    return compared.records[0]


class Page(HTMLParser):
    """The elements of a page, with every open element closed in its turn."""

    VOID = ("meta", "link", "wbr", "rect", "path", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def is_inert(read: Page) -> None:
    """Nothing is loaded and nothing is run."""
    tags = {tag for tag, _ in read.elements}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "a",
        "base",
        "audio",
        "video",
        "foreignobject",
        "use",
    }
    for tag, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")], (
            attributes
        )
        assert "href" not in attributes or (tag, attributes["href"]) == ("link", "data:,")


def test_a_page_says_what_was_measured(record: Record) -> None:
    text = page([record])
    read = Page(text)
    is_inert(read)
    words = " ".join(read.words)
    for one in record.measurements:
        assert one.artifact in words and one.latency is not None
        assert svg.number(one.latency.p50_ms) in words
    for heading in (
        "Latency",
        "Accuracy, latency and size",
        "Tokens by layer",
        "Placement",
        "Verification ladder",
        "How far to trust",
    ):
        assert heading in words
    assert "197 → " in words and "compressed" in words
    assert not re.search(r"https?://|@import|url\(", text)


def test_a_page_of_several_records(compared: Comparison, record: Record) -> None:
    read = Page(page([compared, record]))
    is_inert(read)
    words = " ".join(read.words)
    assert "Ratios of the median times" in words
    # All three are of one model and one compression: nothing but their number tells them apart.
    title = f"{' '.join(record.compress) or 'uncompressed'}: {record.measurements[0].artifact}"
    assert all(f"#{number} {title}" in words for number in range(3)) and "#3 " not in words
    own = " ".join(record.compress) or "uncompressed"
    assert all(f"bundle {place}, #{place} {own}: {name}" in words for place, name in enumerate(compared.bundles))
    assert all(f"{one.ratio:.3f}" in words for one in compared.ratios)


def test_records_are_told_apart_by_model_and_compression(record: Record) -> None:
    """No number where a name says it; of several models, the model in front."""
    slow, fast = record.measurements
    others = [record.model_copy(update={"compress": ("topk:keep=0.5",)}), record.model_copy(update={"model": "demo:other"})]
    words = " ".join(Page(page([record, *others])).words)
    own = " ".join(record.compress) or "uncompressed"
    for title in (f"{record.model}, {own}", f"{record.model}, topk:keep=0.5", f"demo:other, {own}"):
        assert all(f"{title}: {one.artifact}" in words for one in (slow, fast))
    assert not re.search(rf"#\d (?:{record.model}|demo:other|{re.escape(own)})", words)
    alone = " ".join(Page(page([record, others[0]])).words)
    assert f"topk:keep=0.5: {fast.artifact}" in alone and f"{record.model}, " not in alone


def test_what_is_unknown_is_left_out_or_a_dash(record: Record) -> None:
    from edgewise.bench.record import Host

    bare = {
        name: None
        for name in (
            "latency",
            "placement",
            "quality",
            "accuracy",
            "artifact_bytes",
            "speedup",
            "warm_load_ms",
            "peak_memory_bytes",
        )
    }
    one = record.measurements[0].model_copy(update={**bare, "sites": ()})
    words = " ".join(
        Page(page([record.model_copy(update={"measurements": (one,), "host": Host(), "verification": ()})])).words
    )
    assert "a machine of unknown make" in words and "None" not in words
    for heading in ("Latency", "Accuracy, latency", "Tokens by layer", "Placement of", "Verification"):
        assert heading not in words


def plots_of(text: str, what: str) -> list[tuple[str, int]]:
    """Of every plot of a measure of accuracy, what lies across and how many marks it has."""
    parts = [part for part in text.split("<svg ") if f">{what}</text>" in part]
    across = ("median latency, ms", "size, MB")
    return [(next(one for one in across if f">{one}</text>" in part), part.count("<circle")) for part in parts]


def test_accuracy_on_labelled_data_is_plotted_where_it_is_known(record: Record) -> None:
    first, second = record.measurements
    told, cosine = "accuracy on labelled data", "cosine with the uncompressed model"
    assert plots_of(page([record]), told) == []
    assert plots_of(page([record]), cosine) == [("median latency, ms", 2), ("size, MB", 2)]
    own, other = ((one.artifact, one.artifact_digest) for one in (first, second))
    scores = {own: 0.93, other: 0.91, (first.artifact, "0" * 64): 0.5, (second.artifact, first.artifact_digest): 0.1}
    assert plots_of(page([record], scores), told) == [("median latency, ms", 2), ("size, MB", 2)]
    assert "0.93" in page([record], scores)
    # One alone, and one that something else timed in the place of the target's runtime.
    assert plots_of(page([record], {other: 0.91}), told) == [("median latency, ms", 1), ("size, MB", 1)]
    stand_in = first.model_copy(update={"stand_in": "an interpreter"})
    mixed = record.model_copy(update={"measurements": (stand_in, second)})
    assert plots_of(page([mixed], scores), told) == [("median latency, ms", 1), ("size, MB", 2)]
    assert "in the place of the target's" in page([mixed], scores)
    assert "in the place of the target's has no" not in page([record], scores)


def test_only_artifacts_of_one_model_and_role_are_held_against_one_another(record: Record) -> None:
    first, second = record.measurements
    projector = record.model_copy(update={"measurements": (first, second.model_copy(update={"role": "projector"}))})
    other = record.model_copy(update={"model": "demo:other"})
    text = page([projector, other])
    assert plots_of(text, "cosine with the uncompressed model") == [
        *[("median latency, ms", 1), ("size, MB", 1)] * 2,
        *[("median latency, ms", 2), ("size, MB", 2)],
    ]
    for title in (f"{record.model} {first.role}", f"{record.model} projector", f"demo:other {first.role}"):
        assert f"<h3>{title}</h3>" in text


def test_costs_that_are_far_apart_are_in_powers_of_ten() -> None:
    points = [svg.Point(f"p{i}", cost, 0.9, None, f"k{i}") for i, cost in enumerate((2.0, 20.0, 200.0, 2000.0))]
    plot = svg.pareto(points, "ms", "accuracy")
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', plot)]
    steps = [right - left for left, right in pairwise(places)]
    assert min(steps) > 50 and max(steps) - min(steps) < 0.21
    assert all(f">{text}</text>" in plot for text in ("10", "100", "1,000"))
    near = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg.pareto([*points[:2], svg.Point("q", 38.0, 0.9)], "ms", "a"))]
    assert near[2] - near[1] == pytest.approx(near[1] - near[0], abs=0.2), "a plain scale"
    assert "circle" in svg.pareto([svg.Point("none", 0.0, 1.0), svg.Point("all", 5.0, 1.0)], "ms", "a")


def test_more_artifacts_than_colours(record: Record) -> None:
    """Each target has latency plots of its own, and in the Pareto plots a colour for each of its precisions."""
    precisions = ("fp32", "fp16", "w8a8", "w8a16", "w4a16")
    many = record.model_copy(
        update={
            "measurements": tuple(
                one.model_copy(update={"artifact": f"{one.target}/{one.role}/{precision}", "precision": precision})
                for one in record.measurements
                for precision in precisions
            )
        }
    )
    few, text = page([record]), page([many])
    assert few.count("<div class=card>") == text.count("<div class=card>") == 2 and "Of 10 artifacts" in text
    order = [text.index(f"<h2>{one}</h2>") for one in ("The fastest on each target", "Accuracy, latency and size", "Latency")]
    assert order == sorted(order)
    is_inert(Page(text))
    assert few.count("<h3>Distribution") == 1 and text.count("<h3>Distribution") == len(record.measurements) == 2
    for one in record.measurements:
        title = f"<h3>{record.model} {one.role} on {one.target}</h3>"
        assert title in text and title not in few
    for plot in text.partition("Accuracy, latency and size</h2>")[2].partition("<h2>")[0].split("<svg ")[1:]:
        kinds = re.findall(r"<li><i style=\"background:(#\w+)\"></i>(\w+ \w+)</li>", plot)
        assert [kind for _, kind in kinds] == [f"{one.target} {one.precision}" for one in many.measurements]
        marks = re.findall(r'<circle [^>]* fill="(#\w+)"', plot)
        assert marks == [colour for colour, _ in kinds]
        front = re.search("<ul class='notes soft'>(.*?)</ul>", plot)
        assert front and any(f"<li>{one.artifact}: " in front[1] for one in many.measurements)


def test_a_record_of_a_build_gives_the_accuracy(record: Record, tmp_path: Path, cli: Cli) -> None:
    from edgewise.builder.figures import Figures
    from edgewise.builder.gates import BuildRecord

    figures = tuple(
        Figures(bundle="b", artifact=one.artifact, digest=one.artifact_digest, size=1, accuracy=value)
        for one, value in zip(record.measurements, (0.875, None), strict=True)
    )
    built, measured, out = tmp_path / "build.json", tmp_path / "record.json", tmp_path / "page.html"
    built.write_text(BuildRecord(figures=figures).model_dump_json())
    measured.write_text(record.model_dump_json())
    said = cli("report", measured, built, "-o", out)
    assert said.code == 0, said.err
    assert plots_of(out.read_text("utf-8"), "accuracy on labelled data") == [("median latency, ms", 1), ("size, MB", 1)]
    out.unlink()
    cli("report", built, "-o", out).refused("records of builds", "edgewise bench -o")
    for text in ("[]", '{"format": "edgewise-build"}' * 2, '{"format": "edgewise-build", "figures": [{"size": 1}]}', "[" * 10**5):
        built.write_text(text)
        cli("report", measured, built, "-o", out).refused("build.json")
    assert not out.exists()


TRAP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&]]>\u202e"


def everywhere(value: Any, text: str) -> Any:
    """The document with `text` in every place where a record takes any text."""
    if isinstance(value, dict):
        fixed = ("format", "validity", "kind", "bundle_digest", "artifact_digest")
        return {
            (text + key if isinstance(inner, (int, str)) and key not in RECORD_KEYS else key): inner
            if key in fixed
            else everywhere(inner, text)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [everywhere(one, text) for one in value]
    return text + value if isinstance(value, str) else value


RECORD_KEYS = set(
    re.findall(r'"(\w+)"', (Path(svg.__file__).parents[1] / "schemas" / "comparison.json").read_text("utf-8"))
)


@pytest.mark.parametrize("text", [TRAP, "</style></title></svg>", "javascript:x", "x" * 5000])
def test_text_of_a_record_stays_text(compared: Comparison, text: str) -> None:
    hostile = Comparison.model_validate(everywhere(json.loads(compared.model_dump_json()), text))
    read = Page(page([hostile]))
    is_inert(read)
    assert text[:20] in "".join(read.words)


numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=60), st.lists(numbers, min_size=1, max_size=40), min_size=1, max_size=4))
def test_plots_of_any_numbers(series: dict[str, list[float]]) -> None:
    points = [svg.Point(name, values[0], values[-1], 1 << 70) for name, values in series.items()]
    for text in (svg.distributions(series, "ms"), svg.over_time(series, "ms"), svg.pareto(points, "x", "y")):
        read = Page(text)
        assert "nan" not in text.lower().replace("".join(series).lower(), "") or any(
            "nan" in name.lower() for name in series
        )
        for tag, attributes in read.elements:
            if tag == "rect":
                assert all(-1 <= float(attributes[name] or "nan") <= 10_000 for name in ("x", "y", "width", "height"))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6))
def test_bars_of_any_counts(counts: list[int]) -> None:
    Page(svg.bars([("row", [("CPU", count) for count in counts], "told")], "label"))
    Page(svg.tokens([("site", count, counts[0]) for count in counts], "label"))


@given(numbers, numbers)
def test_ticks_are_round_and_inside(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = svg.ticks(low, high)
    assert 1 <= len(found) <= 7
    room = 1e-9 * max(abs(low), abs(high), high - low)
    assert all(low - room <= value <= high + room for value in found)
    assert svg.ticks(0, 10) == [0, 2.5, 5, 7.5, 10] or svg.ticks(0, 10) == [0, 2, 4, 6, 8, 10]


def test_the_front() -> None:
    points = [
        svg.Point(name, cost, quality)
        for name, cost, quality in (("a", 1, 0.5), ("b", 2, 0.4), ("c", 2, 0.9), ("d", 3, 0.9))
    ]
    assert [point.name for point in svg.front(points)] == ["a", "c"]


def test_the_verb(cli: Cli, digits: Path, tmp_path: Path) -> None:
    record, out = tmp_path / "r.json", tmp_path / "r.html"
    record.write_text(bench(Bundle.open(digits), samples=2, seconds=0, cold=False).model_dump_json(), "utf-8")
    said = cli("report", record, record, "-o", out, "--json")
    assert said.code == 0 and said.document["bytes"] == out.stat().st_size
    is_inert(Page(out.read_text("utf-8")))
    cli("report", tmp_path / "none.json", "-o", out).refused("none.json")
    cli("report", digits / "manifest.json", "-o", out).refused("no benchmark record")
    cli("report", record, "-o", tmp_path / "no" / "r.html").refused("cannot write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_has_nothing_to_complain_of(compared: Comparison, record: Record, tmp_path: Path) -> None:
    """No message on the console, and on a narrow screen nothing wider than it."""
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(page([compared, record]), "utf-8")
    frame = "<!doctype html><body><iframe id=f src=page.html style='width:360px;height:640px;border:0'></iframe><script>"
    frame += "f.onload=()=>{let d=f.contentDocument.documentElement;document.title=d.scrollWidth+' '+d.scrollHeight}</script>"
    (tmp_path / "frame.html").write_text(frame, "utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path}/user",
    ]
    log = ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, *log, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120
    )
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    assert int(found[1]) <= 360 and int(found[2]) > 1500
