"""What two bundles differ in is named, in the section that it belongs to; what is the same is not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_bundles
from conftest import Cli
from tiny_programs import block, case

from edgewise import targets
from edgewise.builder.diff import diff
from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.targets.openvino.ops import ops as xml_ops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of a tiny program, and of it with another golden output."""
    place, one = tmp_path_factory.mktemp("diff"), block()
    both = (("openvino", "fp32"), ("onnxruntime", "fp32"))
    tiny_bundles.make(place / "a", one, kinds=both)
    tiny_bundles.make(place / "same", one, kinds=both)
    tiny_bundles.make(place / "shifted", one, kinds=both, shift=0.5, threshold=1e-3)
    tiny_bundles.make(place / "half", one, kinds=(("openvino", "fp16"),))
    return place


def found(folder: Path, a: str, b: str) -> dict[str, dict[str, tuple[str | None, str | None]]]:
    sections: dict[str, dict[str, tuple[str | None, str | None]]] = {}
    for one in diff(Bundle.open(folder / a), Bundle.open(folder / b)).differences:
        sections.setdefault(one.section, {})[one.name] = (one.a, one.b)
    return sections


def test_the_same_bytes_have_no_differences(folder: Path) -> None:
    same = diff(Bundle.open(folder / "a"), Bundle.open(folder / "same"))
    assert same.identical and not same.differences and not same.unknown


def test_golden_and_tolerances(folder: Path) -> None:
    sections = found(folder, "a", "shifted")
    assert set(sections) == {"files", "tolerances", "golden"}
    assert set(sections["files"]) == {"golden/vision_encoder.st"}
    assert set(sections["golden"]) == {"vision_encoder outputs o0", "vision_encoder outputs o1"}
    assert all("max abs 5.00e-01" in str(b) for _, b in sections["golden"].values())
    assert set(sections["tolerances"].values()) == {("0.0001", "0.001")}


def test_precision_and_targets(folder: Path) -> None:
    sections = found(folder, "a", "half")
    ops = sections["ops"]
    # Weights that half precision does not hold exactly stay as they are: the same graph, by the same name.
    assert not [name for name in ops if name.startswith("openvino")]
    assert ops["onnxruntime/vision_encoder Conv"] == ("1", None)


def test_what_compression_changes(cli: Cli, folder: Path, tiny: str, tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("merged", ["--compress", "tome:r=2", "--seed", "3"])):
        assert cli("export", f"{tiny}:make", "-o", tmp_path / name, "--target", "onnxruntime", *flags).code == 0
    said = cli("diff", tmp_path / "plain", tmp_path / "merged", "--json", "--exit-code")
    assert said.code == 1
    document = said.document
    by = {(one["section"], one["name"]): (one["a"], one["b"]) for one in document["differences"]}
    assert by["recipe", "compress"] == ("[]", '["tome:r=2"]') and by["recipe", "seed"] == ("0", "3")
    assert by["tokens", "vision_encoder encoder.block[0]"] == (None, "17 > 15 (tome)")
    assert by["ops", "onnxruntime/vision_encoder TopK"][0] is None
    assert ("figures", "onnxruntime/vision_encoder bytes") in by and ("model", "weights_digest") not in by
    assert not any(section == "versions" for section, _ in by) and not document["unknown"]
    sections = [one["section"] for one in document["differences"]]
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index) and sections[0] == "files"
    assert cli("diff", tmp_path / "plain", tmp_path / "plain", "--exit-code").code == 0
    said = cli("diff", tmp_path / "plain", tmp_path / "merged")
    assert said.code == 0 and "tome:r=2" in said.out
    cli("diff", tmp_path / "plain", tmp_path).refused("is not a bundle")


def test_other_shapes(folder: Path, tmp_path: Path) -> None:
    import torch

    wide = case(torch.nn.Linear(4, 3), torch.ones(2, 4))
    tiny_bundles.make(tmp_path / "b", dataclasses.replace(wide), kinds=(("onnxruntime", "fp32"),))
    differences = diff(Bundle.open(folder / "a"), Bundle.open(tmp_path / "b")).differences
    golden = {one.name: (one.a, one.b) for one in differences if one.section == "golden"}
    assert golden["vision_encoder inputs i0"] == ("(2, 1, 3, 16, 16)", "(2, 2, 4)")
    assert golden["vision_encoder outputs o1"] == ("(2, 1, 10)", None)


def test_ops_agree_with_the_runtimes(folder: Path) -> None:
    """OpenVINO's own reader, and ONNX's, as references."""
    openvino = pytest.importorskip("openvino")
    path = folder / "a" / "openvino" / "vision_encoder.fp32.xml"
    model = openvino.Core().read_model(path)
    # The IR has other names for inputs, outputs and constants only.
    names = {"Constant": "Const"}
    wanted = Counter(names.get(op.get_type_name(), op.get_type_name()) for op in model.get_ops())
    assert targets.get("openvino").ops([path]) == dict(sorted(wanted.items()))
    assert targets.get("coreai").ops([path]) is None


def test_ops_of_hostile_files(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    for text in (b"<a", b"", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'):
        path.write_bytes(text)
        with pytest.raises(InputError, match=r"x\.xml"):
            xml_ops(path)
    onnx = tmp_path / "x.onnx"
    onnx.write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(InputError, match=r"x\.onnx"):
        targets.get("onnxruntime").ops([onnx])
