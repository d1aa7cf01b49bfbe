"""Bundles and records from anywhere: whatever was changed in them, they are refused or used as they are.

Nothing is written outside of their folder, nothing is executed, and no error is one that edgewise does not expect.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_helpers import ROLE, list_file, make, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.bench import record as records
from edgewise.bench.record import Comparison, Record
from edgewise.bench.report import page
from edgewise.bundle import Bundle
from edgewise.errors import InputError

NAMES = (
    *(
        "../outside",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../../outside",
        "openvino/../../outside",
        "..\\outside",
        "C:\\outside",
        "C:outside",
    ),
    *(
        "a\0b",
        "a\nb",
        "\u202e",
        "con",
        "aux.txt",
        "nul",
        "a.",
        "a ",
        " ",
        "//host/share/x",
        "~/x",
        "$(touch x)",
        "`touch x`",
        "-rf",
        "a" * 5000,
    ),
)
VALUES = (
    *(None, True, -1, 0, 2**63, 10**30, 10**400, 1e308, -0.0, "", "x" * 10_000, [], {}, [[]], {"a": {}}),
    *("../../outside", "\ud800", "<script>", "0" * 64),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hostile") / "bundle").path


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a document is."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three values replaced, removed, copied from elsewhere in it, or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = [place for place in places(document) if place]
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        holder = document
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "remove", "copy", "rename"]))
        if kind == "replace":
            holder[last] = draw(st.sampled_from(VALUES) | st.sampled_from(NAMES) | st.text(max_size=8) | st.floats())
        elif kind == "copy":
            source: Any = document
            for key in draw(st.sampled_from(found)):
                source = source[key]
            holder[last] = copy.deepcopy(source)
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(NAMES))] = holder.pop(last)
        else:
            del holder[last]
    return document


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_manifests_that_somebody_changed(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = data.draw(changed(json.loads((good / "manifest.json").read_text("utf-8"))))
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        bundle = shutil.copytree(good, folder / "inner" / "bundle")
        (bundle / "manifest.json").write_text(json.dumps(document), "utf-8", errors="surrogatepass")
        before = snapshot(folder)
        try:
            opened = Bundle.open(bundle)
            for role in opened.manifest.golden:
                opened.golden(role)
        except InputError as error:
            assert str(error)
        else:
            # Whatever is still a bundle keeps its files to itself.
            for name in opened.manifest.files:
                assert opened.file(name).resolve().is_relative_to(bundle.resolve())
        assert snapshot(folder) == before
    finally:
        shutil.rmtree(folder)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.integers(0, 10**6), st.booleans())
def test_manifests_with_other_bytes(good: Path, noise: bytes, at: int, insert: bool) -> None:
    from edgewise.bundle.manifest import parse

    data = (good / "manifest.json").read_bytes()
    at %= len(data)
    with_noise = data[:at] + noise + data[at if insert else at + len(noise) :]
    try:
        parse(with_noise, "manifest.json")
    except InputError as error:
        assert "manifest.json" in str(error)


def traps() -> list[tuple[str, bytes]]:
    """Files that run code, or fill memory, where somebody unpickles or unpacks them."""

    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch executed",)

    import pickle

    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("../../outside", "x")
    objects = io.BytesIO()
    np.save(objects, np.array([Trap()], dtype=object), allow_pickle=True)
    header = json.dumps({"output.y": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}).encode()
    return [
        ("pickle", pickle.dumps(Trap())),
        ("zip", zipped.getvalue()),
        ("npy", objects.getvalue()),
        ("huge header", (2**62).to_bytes(8, "little") + b"{}"),
        ("huge tensor", len(header).to_bytes(8, "little") + header + b"\0" * 8),
        ("deep header", (10**5).to_bytes(8, "little") + b"[" * 10**5),
    ]


@pytest.mark.parametrize(("name", "data"), traps(), ids=lambda value: value if isinstance(value, str) else "")
def test_golden_files_that_are_traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes) -> None:
    bundle = make(tmp_path / "inner" / "bundle").path
    (bundle / f"golden/{ROLE}.safetensors").write_bytes(data)
    list_file(bundle, f"golden/{ROLE}.safetensors")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="safetensors"):
        Bundle.open(bundle).golden(ROLE)
    assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def measured(digits: Path) -> Comparison:
    from edgewise.bench import compare

    bundle = Bundle.open(digits)
    return compare([bundle, bundle], ["onnxruntime"], samples=3, seconds=0, warmup=0, threads=1, cold=False)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_records_that_somebody_changed(measured: Comparison, data: st.DataObject) -> None:
    """A record that is still one can be shown: no number and no text in it ends the report."""
    whole = json.loads(measured.model_dump_json())
    document = data.draw(changed(whole if data.draw(st.booleans()) else whole["records"][0]))
    try:
        found = records.parse(json.dumps(document).encode("utf-8", "surrogatepass"), "record.json")
    except InputError as error:
        assert "record.json" in str(error)
        return
    assert isinstance(found, (Record, Comparison))
    text = page([found])
    assert "<script" not in text
    text.encode("utf-8")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"null",
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b'{"format":"edgewise-benchmark","format":1}',
        b'{"a":NaN}',
    ],
    ids=range(9),
)
def test_bytes_that_are_no_record(data: bytes) -> None:
    with pytest.raises(InputError, match=r"record\.json"):
        records.parse(data, "record.json")


def test_a_record_too_large_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 1000)
    (tmp_path / "record.json").write_bytes(b" " * 5000)
    with pytest.raises(InputError, match="at most 1000"):
        records.read(tmp_path / "record.json")


def test_a_link_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "record.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link"):
        records.read(tmp_path / "record.json")
