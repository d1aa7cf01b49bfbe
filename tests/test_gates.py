"""Gates: a missed limit is exit code 1 and is named everywhere; a figure that is unknown passes nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from bundle_helpers import make
from conftest import Cli
from test_build import in_turn

from edgewise.builder.build import build
from edgewise.builder.figures import Figures, measure
from edgewise.builder.gates import BuildRecord, judge, read_record, regressions
from edgewise.builder.reports import junit, summary
from edgewise.builder.task import Outcome
from edgewise.errors import InputError
from edgewise.exporter.matrix import Entry
from edgewise.exporter.recipe import Gates, Recipe, Regressions

RECIPE = Recipe(model="m", targets=("openvino",))


def figures(**changes: Any) -> Figures:
    known: dict[str, Any] = {"bundle": "b", "artifact": "openvino/x/fp32", "digest": "0" * 64, "size": 100}
    return Figures(**{**known, **changes})


@pytest.mark.parametrize(
    ("gate", "limit", "good", "bad"),
    [
        ("size", 100, 100, 101),
        ("tokens", 9, 9, 10),
        ("lowering_error", 1e-5, 1e-5, 1.01e-5),
        ("accuracy", 0.9, 0.9, 0.89),
        ("accuracy_drop", 0.0, -0.1, 0.001),
        ("latency_ratio", 1.0, 1.0, 1.001),
    ],
)
def test_a_limit_is_inclusive_and_the_unknown_passes_nothing(gate: str, limit: float, good: float, bad: float) -> None:
    entry = Entry("b", RECIPE, Gates(**{gate: limit}))
    for value, passed in ((good, True), (bad, False), *(((None, False),) if gate != "size" else ())):
        (verdict,) = judge([entry], [figures(**{gate: value})])
        assert (verdict.gate, verdict.value, verdict.passed) == (gate, value, passed)
        assert bool(verdict.note) == (value is None)
    assert judge([Entry("b", RECIPE, Gates())], [figures()]) == []


def test_the_baseline_is_not_compared_with_itself() -> None:
    gates = Gates(baseline="b", latency_ratio=0.5, accuracy_drop=0.0, tokens=4, size=10)
    assert [one.gate for one in judge([Entry("b", RECIPE, gates)], [figures()])] == ["size"]


@pytest.mark.parametrize(
    ("limit", "allowed", "then", "now", "passed"),
    [
        ("size", 1.1, 100, 110, True),
        ("size", 1.1, 100, 111, False),
        ("lowering_error", 2, 1e-6, 2.1e-6, False),
        ("lowering_error", 2, 0.0, 0.0, True),
        ("lowering_error", 2, 0.0, 1e-9, False),
        ("lowering_error", 2, None, 1e-9, None),
        ("lowering_error", 2, 1e-9, None, False),
        ("latency_ratio", 1.0, 0.5, 0.4, True),
        ("accuracy_drop", 0.01, 0.9, 0.895, True),
        ("accuracy_drop", 0.01, 0.9, 0.88, False),
    ],
)
def test_regressions(limit: str, allowed: float, then: Any, now: Any, passed: bool | None) -> None:
    name = "accuracy" if limit == "accuracy_drop" else limit
    earlier = BuildRecord(figures=(figures(**{name: then}),))
    (verdict,) = regressions([figures(**{name: now})], earlier, Regressions(record="-", **{limit: allowed}))
    assert (verdict.gate, verdict.passed) == (f"regression.{limit}", passed)
    (new,) = regressions([figures(bundle="new", **{name: now})], earlier, Regressions(record="-", **{limit: allowed}))
    assert new.passed is None and "earlier record" in new.note


def test_a_record_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = BuildRecord(figures=(figures(),), outcomes=(Outcome(name="b", status="built"),))
    path.write_text(record.model_dump_json())
    assert read_record(path) == record
    deep = "[" * 10**5
    other = json.dumps({**json.loads(record.model_dump_json()), "format": "edgewise-bundle"})
    for text in ("", "{}x", '{"format": 1}', '{"figures": ' + deep, '{"format": "edgewise-build", "more": 1}', other):
        path.write_text(text)
        with pytest.raises(InputError, match="edgewise build --record"):
            read_record(path)
    with pytest.raises(InputError, match="cannot read"):
        read_record(tmp_path / "none.json")


def test_reports_hold_any_text() -> None:
    """Names and messages come from models and files."""
    hostile = 'a | b <script> & "c" \x00\x1b[31m `d` ]]> *e*\nf'
    outcomes = (Outcome(name="b", status="built"), Outcome(name="z", status="failed", message=hostile, kind="Refused", code=2))
    verdicts = judge([Entry("b", RECIPE, Gates(size=1, tokens=3))], [figures(size=2, tokens=3, artifact=hostile)])
    record = BuildRecord(outcomes=outcomes, figures=(figures(size=2, tokens=3),), verdicts=tuple(verdicts))
    assert record.code == 2
    root = ElementTree.fromstring(junit(record))
    suites = {suite.get("name"): suite for suite in root}
    assert [(s.get("tests"), s.get("failures"), s.get("errors")) for s in suites.values()] == [("3", "1", "0"), ("1", "0", "1")]
    assert [case.get("name") for case in suites["b"]] == ["build", "size <= 1", "tokens <= 3"]
    assert "<script>" in str(root.find(".//error").get("message"))  # type: ignore[union-attr]
    text = summary(record)
    assert "<script>" not in text and "1 not built, 1 gates missed" in text
    tables = [list(rows) for is_row, rows in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")) if is_row]
    for rows in tables:
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def test_what_a_manifest_says(tmp_path: Path) -> None:
    make(tmp_path / "b")
    (found,) = measure([Entry("b", RECIPE, Gates())], tmp_path)
    assert (found.size, found.tokens, found.lowering_error, found.accuracy, found.latency_ratio) == (7, 9, None, None, None)


@pytest.fixture
def recipe(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "__kwdefaults__", {**(build.__kwdefaults__ or {}), "engine": in_turn})
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", pixels=rng.standard_normal((8, 3, 16, 16), np.float32), labels=rng.integers(0, 5, 8))
    path = tmp_path / "gated.yaml"
    path.write_text(
        f"model: {tiny}:make\ntargets: onnxruntime\nmatrix: {{compress: [null, 'tome:r=2']}}\n"
        "gates: {baseline: plain, data: data.npz, accuracy_drop: 1, latency_ratio: 100, lowering_error: 1.0e-4,"
        " tokens: 13, size: 1 MiB, samples: 3, seconds: 0}\n"
    )
    return path


def test_gates_of_a_build(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    flags = ("--record", "r.json", "--junit", "j.xml", "--summary", "s.md")
    said = cli("build", recipe, "-o", "out", "--json", *flags)
    assert said.code == 0, said.err
    record = read_record(tmp_path / "r.json")
    assert said.document["record"] == json.loads((tmp_path / "r.json").read_text())
    plain, merged = record.figures
    assert (plain.tokens, merged.tokens) == (None, 13) and plain.latency_ratio is None
    assert merged.latency_ratio is not None and merged.latency_ratio > 0 and merged.accuracy_drop is not None
    assert plain.accuracy is not None and merged.accuracy == pytest.approx(plain.accuracy - merged.accuracy_drop)
    assert [(v.bundle, v.gate) for v in record.verdicts if v.bundle != "plain"] == [
        ("tome-r=2", gate) for gate in ("size", "tokens", "lowering_error", "accuracy_drop", "latency_ratio")
    ]
    # Accuracy is measured once, as long as the data are the same.
    said = cli("build", recipe, "-o", "out", "--record", "r.json")
    assert said.code == 0 and "latency against plain" in said.err and "accuracy on" not in said.err
    assert [f.accuracy for f in read_record(tmp_path / "r.json").figures] == [plain.accuracy, merged.accuracy]
    # A part of the data is another measurement: three of eight samples are right in thirds.
    whole = recipe.read_text()
    recipe.write_text(whole.replace("data: data.npz", "data: data.npz, data_samples: 3"))
    said = cli("build", recipe, "-o", "out", "--record", "r.json")
    assert said.code == 0 and "accuracy on" in said.err
    parts = [f.accuracy for f in read_record(tmp_path / "r.json").figures]
    assert all(part is not None and part * 3 == pytest.approx(round(part * 3)) for part in parts)
    recipe.write_text(whole)
    assert cli("build", recipe, "-o", "out", "--record", "r.json").code == 0
    # A missed gate: the table, the exit code, JUnit and the summary say so, and the bundles are there.
    recipe.write_text(recipe.read_text().replace("tokens: 13", "tokens: 12"))
    said = cli("build", recipe, "-o", "out", *flags)
    assert said.code == 1 and "tokens <= 12" in said.out and "MISSED" in said.out
    failures = ElementTree.parse(tmp_path / "j.xml").findall(".//failure")
    assert [failure.get("message") for failure in failures] == ["tokens is 13"]
    assert (tmp_path / "s.md").read_text().count("## edgewise build") == 2 and "1 gates missed" in (tmp_path / "s.md").read_text()
    assert cli("build", recipe, "-o", "out", "--no-gates").code == 0
    data = dict(np.load(tmp_path / "data.npz"))
    np.savez(tmp_path / "data.npz", pixels=data["pixels"], labels=(data["labels"] + 1) % 5)
    assert "accuracy on" in cli("build", recipe, "-o", "out").err
    # Against an earlier record, in which the artifact was smaller.
    document = json.loads((tmp_path / "r.json").read_text())
    document["figures"][1]["size"] = merged.size - 10
    (tmp_path / "r.json").write_text(json.dumps(document))
    recipe.write_text(recipe.read_text().replace("tokens: 12", "tokens: 13") + "regressions: {record: r.json, size: 1}\n")
    said = cli("build", recipe, "-o", "out")
    assert said.code == 1 and "regression.size <= 1" in said.out
    cli("build", recipe, "-o", "out", "--baseline", "none.json").refused("none.json")
