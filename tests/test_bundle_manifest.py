from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
from bundle_helpers import component, manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edgewise.bundle.manifest import MAX_MANIFEST_BYTES, Artifact, Manifest, dump, parse, path_fault
from edgewise.errors import InputError


def document() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(dump(manifest()))
    return result


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_dump_and_parse_are_inverse_and_deterministic() -> None:
    data = dump(manifest())
    assert parse(data, "manifest.json") == manifest()
    assert dump(parse(data, "manifest.json")) == data
    assert data.endswith(b"}\n")
    assert data.startswith(b'{\n "calibration"')


def test_a_name_that_is_not_utf8_is_readable() -> None:
    data = dump(manifest(notes=(os.fsdecode(b"im\xff.png"),)))
    assert parse(data, "manifest.json").notes == ("im\ufffd.png",)


def test_a_component_is_found_by_its_role() -> None:
    assert manifest().component("vision_encoder") == component()
    with pytest.raises(InputError, match="unknown role 'vision_encodr': did you mean 'vision_encoder'"):
        manifest().component("vision_encodr")


def test_a_manifest_of_an_older_version_is_read() -> None:
    older = document()
    older["schema_version"] = 1
    del older["notes"]
    read = parse(encode(older), "manifest.json")
    assert (read.schema_version, read.notes) == (1, ())
    assert read == manifest(schema_version=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a manifest"),
        (b"\xff\xfe{}", "not a manifest"),
        (b"{", "not a manifest"),
        (b"[]", "lacks"),
        (b'{"format": "zip"}', "lacks"),
        (b'{"format": "edgewise-bundle"}', "schema_version None"),
        (b'{"format": "edgewise-bundle", "schema_version": true}', "schema_version True"),
        (b'{"format": "edgewise-bundle", "schema_version": 0}', "Export the model again"),
        (b'{"format": "edgewise-bundle", "schema_version": 1.5}', "Export the model again"),
        (b'{"format": "edgewise-bundle", "schema_version": 8}', "reads 1 to 7. Upgrade edgewise"),
        (b'{"format": "edgewise-bundle", "schema_version": 1}', "does not fit"),
        (b'{"a": 1, "a": 2}', "key 'a' is there more than once"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a manifest"),
        (b'{"\\ud800": 1}', "not a manifest"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "has at most"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(data, "manifest.json")


def test_brackets_in_strings_are_not_nesting() -> None:
    value = document()
    value["seed"] = 3
    value["preprocessing"] = {"note": "[" * 500 + '"' + "{" * 500 + "\\"}
    assert parse(encode(value), "manifest.json").preprocessing == value["preprocessing"]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("seed",), "7"),
        (("seed",), 1.5),
        (("extra",), 1),
        (("model", "parameters"), -1),
        (("model", "parameters"), True),
        (("components",), {}),
        (("components", 0, "inputs", 0, "shape"), [-1]),
        (("components", 0, "inputs", 0, "shape"), ["1"]),
        (("components", 0, "flops_after"), None),
        (("files",), {"a": {"sha256": "A" * 64, "bytes": 1}}),
        (("files",), {"a": {"sha256": "0" * 64, "bytes": -1}}),
        (("files",), {"manifest.json": {"sha256": "0" * 64, "bytes": 1}}),
        (("files",), {"a": {"sha256": "0" * 64, "bytes": 1}, "A": {"sha256": "0" * 64, "bytes": 1}}),
        (("recipe",), "../recipe.yaml"),
        (("golden",), {"vision_encoder": "/etc/passwd"}),
        (("verification",), [{"name": "a"}]),
    ],
)
def test_a_wrong_value_is_refused(where: tuple[Any, ...], value: Any) -> None:
    changed = document()
    place = changed
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(InputError, match="does not fit the manifest's schema"):
        parse(encode(changed), "manifest.json")


@pytest.mark.parametrize("key", sorted(set(Manifest.model_fields) - {"format", "schema_version"}))
@pytest.mark.parametrize("value", [None, 0, [], {}, "x", [[1]], {"a": {"b": 1}}])
def test_wrong_types_never_escape_as_other_errors(key: str, value: Any) -> None:
    try:
        parse(encode({**document(), key: value}), "manifest.json")
    except InputError as error:
        assert key in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(Manifest.model_fields)), json_values)
def test_fuzzed_manifests_are_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(InputError):
        parse(encode({**document(), key: value}), "manifest.json")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_bytes_are_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(dump(manifest()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        parse(bytes(raw), "manifest.json")


def test_names_must_be_unique() -> None:
    with pytest.raises(ValidationError, match="component vision_encoder is there more than once"):
        manifest(components=(component(), component()))
    artifact = Artifact(target="openvino", role="r", precision="fp32", files=("a",))
    with pytest.raises(ValidationError, match="artifact openvino/r/fp32"):
        manifest(targets=(artifact, artifact))


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "./a",
        "/a",
        "//a",
        "a//b",
        "a/",
        "C:/a",
        "C:a",
        "a\\b",
        "..\\a",
        "\\\\server\\a",
        "a\0b",
        "a\nb",
        "a\u202eb",
        "a.",
        "a ",
        "a. /b",
        "nul",
        "NUL.txt",
        "a/com1",
        "\ud800",
    ],
)
def test_paths_that_leave_or_mislead_are_refused(path: str) -> None:
    assert path_fault(path)
    with pytest.raises(ValidationError):
        Artifact(target="t", role="r", precision="p", files=(path,))


@pytest.mark.parametrize(
    "path", ["a", "openvino/vision_encoder.xml", ".hidden", "a b/c..d", "modèle/x.bin", "a/null"]
)
def test_plain_paths_are_allowed(path: str) -> None:
    assert path_fault(path) is None
