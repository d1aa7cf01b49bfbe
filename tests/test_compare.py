"""Methods side by side: equal counts, figures against the model itself, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from query_models import build

from edgewise import demos
from edgewise.errors import InputError
from edgewise.exporter.compare import Data, compare, parse_keeps
from edgewise.exporter.compare_report import front
from edgewise.exporter.sources import Source, load_source

FAST = ("--samples", 8, "--no-latency", "--quiet", "--json")
DIGITS = ("compare", "demo:digits", "--calib", "demo:digits")


@pytest.fixture(scope="module")
def found() -> Any:
    data = demos.split("digits")
    source = load_source("demo:digits")
    return compare(source, Data("d", data.inputs, data.labels), [0.25, 20], ["visionzip", "tome", "prumerge"], samples=8)


def test_counts_are_equal_with_the_context_tokens(found: Any) -> None:
    rows = found.rows[1:]
    assert {row.method for row in rows} == {"smaller input", "random", "pool", "visionzip", "tome", "prumerge"}
    exact = [row for row in rows if row.method not in ("pool", "smaller input")]
    assert {(row.wanted, row.tokens) for row in exact} == {(50, 50), (21, 21)}
    assert {(row.wanted, row.tokens) for row in rows if row.method == "pool"} == {(50, 50), (21, 17)}
    zipped = next(row for row in rows if row.method == "visionzip" and row.keep == 20)
    assert zipped.spec == "visionzip:keep=10" and all(row.flops_ratio < 1 for row in rows)


def test_smaller_input_is_the_model_on_smaller_pictures(found: Any) -> None:
    data, source = demos.split("digits"), load_source("demo:digits")
    pictures = torch.from_numpy(data.inputs["pixel_values"][np.linspace(0, len(data.labels) - 1, 8).round().astype(int)])
    rows = [row for row in found.rows if row.method == "smaller input"]
    assert [(row.wanted, row.tokens) for row in rows] == [(50, 50), (21, 17)]
    assert source.module is not None
    for row, side in zip(rows, (7, 4), strict=True):
        patch = pictures.shape[2] // 14
        small = torch.nn.functional.interpolate(pictures, (side * patch,) * 2, mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = source.module.eval()(pixel_values=small, interpolate_pos_encoding=True).logits.numpy()
            full = source.module(pixel_values=pictures).logits.numpy()
        assert row.spec == f"pixel_values={side * patch}x{side * patch}" and row.flops_ratio < 0.3
        assert row.agreement == (logits.argmax(-1) == full.argmax(-1)).mean()
        relative = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(logits, full, strict=True)]
        assert row.relative == pytest.approx(np.mean(relative), rel=1e-4)


def test_what_has_no_smaller_input() -> None:
    model, inputs = build("qformer")  # CLIP's position embeddings have one size
    speech = load_source("demo:speech")
    saved = load_source("demo:digits")
    assert saved.module is not None
    saved = Source("m.pt2", "", exported=torch.export.export(saved.module, (), saved.kwargs, strict=False), kwargs=saved.kwargs)
    for source, words in (
        (Source("clip", "", module=model, kwargs=inputs), "cannot take pictures of"),
        (speech, "pictures that are cut into a grid"),
        (saved, "one input size"),
    ):
        data = Data("d", {k: np.repeat(v.numpy(), 2, axis=0) for k, v in source.kwargs.items()})
        made = compare(source, data, [0.5], ["random"], samples=2)
        assert words in next(one.reason for one in made.left_out if one.method == "smaller input")


def test_the_uncompressed_row_is_the_model(found: Any) -> None:
    data, source = demos.split("digits"), load_source("demo:digits")
    rows = np.linspace(0, len(data.labels) - 1, 8).round().astype(int)
    assert source.module is not None
    with torch.no_grad():
        logits = source.module.eval()(torch.from_numpy(data.inputs["pixel_values"][rows])).logits.numpy()
    first = found.rows[0]
    assert first.accuracy == (logits.argmax(-1) == data.labels[rows]).mean()
    assert (first.cosine, first.relative, first.agreement, first.flops_ratio) == (1.0, 0.0, 1.0, 1.0)
    assert found.samples == 8 and found.labelled


def test_files_and_json(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = cli(*DIGITS, "--keep", "0.5", "--method", "topk", "-o", tmp_path / "c", *FAST)
    assert said.code == 0, said.err
    written = json.loads((tmp_path / "c" / "compare.json").read_text("utf-8"))
    assert said.document == {**written, "folder": str(tmp_path / "c")}
    page = (tmp_path / "c" / "compare.html").read_text("utf-8")
    assert "<svg" in page and "topk" in page and "http" not in page
    assert (tmp_path / "c" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_latency_is_a_ratio(cli: Cli, tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    np.savez(tmp_path / "d.npz", pixels=np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32))
    given = ("compare", f"{tiny}:make", "--calib", tmp_path / "d.npz", "--keep", "0.5", "--method", "random")
    said = cli(*given, "--target", "onnxruntime")
    assert said.code == 0, said.err
    assert "over FLOPs" in said.out and "encoder.block[0]" in said.out
    assert "random, 8 tokens" in said.err or "random, 9 tokens" in said.err
    for row in cli(*given, "--json", "--quiet").document["rows"][1:]:
        assert row["latency"]["ratio"] > 0 and row["latency"]["runs"] >= 30
        assert row["over_flops"] == pytest.approx(row["latency"]["ratio"] - row["flops_ratio"])


def test_data_without_labels(cli: Cli, tiny: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pixels=np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32))
    said = cli("compare", f"{tiny}:make", "--calib", tmp_path / "d.npz", "--keep", "0.5", "--method", "tome", *FAST)
    rows = said.document["rows"]
    assert said.document["samples"] == 3 and [row["method"] for row in rows] == [
        "uncompressed", "smaller input", "random", "pool", "tome"
    ]
    assert all(row["accuracy"] is None and 0 < row["cosine"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--method", "tomee"), ("unknown method", "'tome'")),
        (("--method", "tome:r=2"), ("leave r out",)),
        (("--target", "openvno"), ("unknown target", "'openvino'")),
        (("--keep", "0"), ("out of range",)),
        (("--keep", "1.5"), ("out of range",)),
        (("--keep", "half"), ("not a number",)),
        (("--keep", "500"), ("between 1 and 196",)),
        (("--calib", "demo:speech"), ("pixel_values", "demo:speech")),
        (("--calib", "nothing.npz"), ("does not exist",)),
    ],
)
def test_bad_input(cli: Cli, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    cli(*DIGITS, "--no-latency", *args).refused(*words)


def test_no_data(cli: Cli, tiny: str, tmp_path: Path) -> None:
    cli("compare", "demo:digits").refused("--calib")
    for shape, words in (((0, 3, 16, 16), "no samples"), ((2, 3, 8, 8), "samples of shape (3, 8, 8)")):
        np.savez(tmp_path / "d.npz", pixels=np.zeros(shape, np.float32))
        cli("compare", f"{tiny}:make", "--calib", tmp_path / "d.npz", "--no-latency").refused(words)


def test_keeps() -> None:
    assert parse_keeps("0.5, 16,0.5") == [0.5, 16]
    with pytest.raises(InputError, match="nan"):
        parse_keeps("nan")


def test_the_front_has_what_no_other_beats() -> None:
    points = [("a", 1.0, 0.9), ("b", 0.5, 0.8), ("c", 0.6, 0.7), ("d", 0.5, 0.6)]
    assert [name for name, _, _ in front(points)] == ["b", "a"]
