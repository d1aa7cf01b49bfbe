"""NVIDIA's own parser and builder on what the target `tensorrt` writes, and what is said where they refuse. They need no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
import torch
from conftest import Cli
from onnx import TensorProto, helper
from tensorrt_cases import lowered, method
from tiny_programs import CASES, case
from torch import nn

import edgewise
from edgewise import targets
from edgewise.errors import InputError, MissingExtra
from edgewise.passes.legalise import Legalise
from edgewise.targets.tensorrt import engine, rtx

needs_rtx = pytest.mark.skipif(not rtx.installed(), reason="needs the extra tensorrt-rtx, which has no package for this platform")


@needs_rtx
@pytest.mark.parametrize("name", ["block", "masked_block", "convolutions", "odd"])
def test_programs_are_parsed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = CASES[name]()
    for precision in ("fp32", "fp16"):
        assert rtx.parse(lowered(one.exported, tmp_path, precision, len(one.feeds), len(one.expected))) > 5


@needs_rtx
def test_engines_are_part_of_a_bundle(tmp_path: Path) -> None:
    from families import build

    model, inputs = build("vit", small=True)
    bundle = edgewise.export(
        model, tmp_path / "b", example=inputs, targets=["tensorrt"], compress="tome:keep=0.5", devices=["sm86", "sm120"],
        cache=False,
    )  # fmt: skip
    artifact = bundle.manifest.targets[0]
    names = [Path(name).name.partition(".")[2] for name in artifact.files]
    assert names == ["onnx", "sm86.engine", "sm86.engine.json", "sm120.engine", "sm120.engine.json"]
    assert artifact.versions[rtx.BINDINGS.package] == rtx.BINDINGS.installed
    rtx.check_engine(bundle.file(artifact.files[1]), "sm86", bundle.file(artifact.files[0]))


@needs_rtx
def test_engines_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(nn.Linear(8, 8), torch.randn(1, 8))
    path = lowered(one.exported, tmp_path)
    plan, note = rtx.build(path, "sm89")
    again = rtx.build(path, "sm89")[0].read_bytes()
    assert again == plan.read_bytes()
    with pytest.raises(InputError, match=r"built for device sm89, and here is sm86; export the model again with --device sm86"):
        rtx.check_engine(plan, "sm86", path)
    for damage, message in (
        (lambda: note.write_text(note.read_text().replace(rtx.package().__version__, "1.6.0.1")), "built for tensorrt-rtx 1.6.0.1"),
        (lambda: path.write_bytes(path.read_bytes() + b"\0\0"), "m-fp32.sm89.engine was built from another model"),
        (lambda: plan.write_bytes(plan.read_bytes()[:-5]), "is damaged"),
        (lambda: note.write_text("[]"), "does not say what"),
        (note.unlink, "does not say what"),
    ):
        kept = {file: file.read_bytes() for file in (plan, note, path)}
        damage()
        with pytest.raises(InputError, match=message):
            rtx.check_engine(plan, "sm89", path)
        for file, data in kept.items():
            file.write_bytes(data)


@needs_rtx
def test_devices_that_cannot_be(cli: Cli, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "b"]
    cli("export", "demo:digits", "--target", "tensorrt", "--device", "sm88", *out).refused("unknown device 'sm88'", "sm86", "sm120")
    cli("export", "demo:digits", "--target", "tensorrt", "--device", "sm87", *out).refused("Jetson Orin", "edgewise bench")
    cli("export", "demo:digits", "--target", "openvino", "--device", "sm86", *out).refused("openvino builds nothing for a device")
    assert not (tmp_path / "b").exists()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    """No engine, and a warning in the manifest that the parser did not see the artifact."""
    absent = type(rtx.BINDINGS)("no-such-package", "1", "1", extra=rtx.EXTRA, runtime=False)
    monkeypatch.setattr(rtx, "BINDINGS", absent)
    with pytest.raises(MissingExtra, match=r'pip install "edgewise\[tensorrt-rtx\]"'):
        targets.get("tensorrt").for_devices(["sm86"])
    asked = cli("export", "demo:digits", "--target", "tensorrt", "--device", "sm86", "-o", tmp_path / "b")
    asked.refused("no-such-package is not installed", 'pip install "edgewise[tensorrt-rtx]"')
    assert not (tmp_path / "b").exists()
    assert any("not parsed by NVIDIA's parser" in warning for warning in targets.get("tensorrt").check())
    assert not any("parser" in warning for warning in targets.get("tensorrt").check(runtime_only=True))
    lowered(case(nn.Linear(8, 8), torch.randn(1, 8)).exported, tmp_path)


@needs_rtx
def test_weights_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above 2 GB: the parser finds the second file, and its absence is named."""
    from edgewise.targets.onnx import lower

    monkeypatch.setattr(lower, "EXTERNAL_ABOVE", 10_000)
    torch.manual_seed(0)
    path = lowered(CASES["block"]().exported, tmp_path, outputs=2)
    assert path.with_name(path.name + ".data").exists() and rtx.build(path, "sm86")[0].exists()
    path.with_name(path.name + ".data").unlink()
    with pytest.raises(InputError, match=r"TensorRT-RTX 1\.7.* cannot read .*m-fp32.onnx") as caught:
        rtx.parse(path)
    assert "m-fp32.onnx.data" in str(caught.value)


def model_of(path: Path, op: str, inputs: dict[str, tuple[int, list[int]]], output: tuple[int, list[int | str]], *,
             constants: dict[str, list[int]] | None = None, opset: int = 20, **attributes: object) -> Path:  # fmt: skip
    outs = ["y", "z"][: 2 if op == "TopK" else 1]
    node = helper.make_node(op, [*inputs, *(constants or {})], outs, name="the/node", **attributes)
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    outputs = [helper.make_tensor_value_info(node.output[-1], *output)]
    weights = [helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in (constants or {}).items()]
    graph = helper.make_graph([node], "g", values, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


@needs_rtx
def test_refusals_say_where_and_how_to_mend(tmp_path: Path) -> None:
    from edgewise.targets.tensorrt.origin import Origin

    origins = {"the/node": Origin("scatter", "aten.scatter_add", "legalise:merge", "model.py:12, in forward: x.scatter_add(...)")}
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    path = model_of(tmp_path / "s.onnx", "Det", {"x": (floats, [4, 4])}, (floats, []))
    with pytest.raises(InputError) as caught:
        rtx.parse(path, origins)
    for word in ("cannot read", "Det", "aten.scatter_add", "legalise:merge", "model.py:12", "way round: TensorRT has no det"):
        assert word in str(caught.value), caught.value
    values = {"x": (floats, [1, 8]), "i": (ints, [1, 4]), "u": (floats, [1, 4])}
    scatter = model_of(tmp_path / "t.onnx", "ScatterElements", values, (floats, [1, 8]), axis=1, reduction="add")
    with pytest.raises(InputError, match=r"ScatterElements: Unsupported reduction type\n    way round: .*one-hot"):
        rtx.parse(scatter)
    topk = model_of(tmp_path / "k.onnx", "TopK", {"x": (floats, [1, 6000])}, (ints, [1, 5000]), constants={"k": [5000]})
    assert rtx.parse(topk) > 0  # the parser takes it, and the builder does not
    with pytest.raises(InputError, match=r"cannot build k\.onnx for sm86:\n.*K exceeds the maximum value allowed .3840."):
        rtx.build(topk, "sm86", origins)
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 400)
    for name in ("noise.onnx", "absent.onnx"):
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            rtx.parse(tmp_path / name)
    assert not list(tmp_path.glob("*.engine*"))


class Top(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1).topk(3900).values


@needs_rtx
def test_refusals_name_the_line_of_the_model_and_our_pass(tmp_path: Path) -> None:
    """Of real programs: what the builder refuses, and what a pass of ours made that the parser refuses."""
    target = targets.get("tensorrt")
    names = {"precision": "fp32", "input_names": ["x"], "output_names": ["y"]}
    long = torch.export.export(Top(), (torch.randn(1, 4000),), strict=False)
    with pytest.raises(InputError, match=r"cannot build long\.onnx for sm86:\n.*K exceeds the maximum value") as caught:
        target.for_devices(["sm86"]).lower(long, tmp_path, "long", **names)
    said = str(caught.value)
    assert "model/topk is node topk (aten.topk.default) at " in said
    assert re.search(r"test_tensorrt_rtx\.py:\d+, in forward: return \(x \+ 1\)", said)
    assert "way round: TensorRT takes at most 3840 of one axis: rank by comparison" in said

    model, x = method("tome")
    exported = torch.export.export(model, (x,), strict=False)
    scattered = Legalise({**target.realisations, "merge": ("scatter",)})(exported).program
    with pytest.raises(InputError, match=r"cannot read .*scattered\.onnx") as caught:
        target.lower(scattered, tmp_path, "scattered", **names)
    said = str(caught.value)
    assert "ScatterElements, node scatter_add" in said and "made by legalise:merge at " in said and "method_graphs.py:" in said
    assert "Unsupported reduction type\n    way round: " in said and "/_src/" not in said


@needs_rtx
def test_valid_for_tensorrt_10_and_11(tmp_path: Path) -> None:
    """TensorRT 10 makes a strongly typed network where it is told to, and 11 has no other, and no flags of precision, as
    TensorRT-RTX has none: both read the same network. A file whose types do not fit is refused by both."""
    trt = rtx.package()
    assert not {"FP16", "BF16", "INT8", "FP8"} & set(trt.BuilderFlag.__members__), "precision is in the graph"
    torch.manual_seed(0)
    path = lowered(CASES["masked_block"]().exported, tmp_path, "fp16", len(CASES["masked_block"]().feeds), 2)

    def read(path: Path, flag: int) -> tuple[bool, list[tuple[str, str, tuple[int, ...]]]]:
        log = engine.logger(trt)
        builder = trt.Builder(log)
        network = builder.create_network(flag)
        parser = trt.OnnxParser(network, log)
        well = parser.parse_from_file(str(path))
        found = []
        for number in range(network.num_layers if well else 0):
            layer = network.get_layer(number)
            value = layer.get_output(0)
            found.append((layer.name, str(value.dtype), tuple(value.shape)))
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        return well and builder.build_serialized_network(network, config) is not None, found

    strongly = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    ten, eleven = read(path, strongly), read(path, 0)
    assert ten[0] and ten == eleven and {"DataType.HALF", "DataType.FLOAT"} <= {kind for _, kind, _ in ten[1]}
    model = onnx.load(path)
    # The softmax without its cast: half-precision scores where single ones were meant.
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16)
    user = next(node for node in model.graph.node if cast.output[0] in node.input)
    user.input[list(user.input).index(cast.output[0])] = cast.input[0]
    onnx.save(model, tmp_path / "mixed.onnx")
    assert [read(tmp_path / "mixed.onnx", flag)[0] for flag in (strongly, 0)] == [False, False]


@needs_rtx
def test_a_rejected_artifact_ends_the_export(tmp_path: Path, cli: Cli) -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 8).scatter_add(1, x.long() % 8, x)

    with pytest.raises(InputError, match=r"ScatterElements") as caught:
        edgewise.export(Sorted(), tmp_path / "b", example=(torch.rand(1, 4) * 8,), targets=["tensorrt"], cache=False)
    assert "way round" in str(caught.value) and not (tmp_path / "b").exists()


def test_messages_lose_nvidias_paths() -> None:
    text = "IBuilder: Error Code 4: API Usage Error (t: K exceeds (3840). In check at /_src/a.cpp:1066 In analyze at /_src/b.cpp:2)"
    assert engine._plain(text) == "IBuilder: Error Code 4: API Usage Error (t: K exceeds (3840).)"
