"""The target `tensorrt`: the numbers of the ONNX file, and what it is made of."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnx_ir as ir
import pytest
import tensorrt_cases
import torch
from conftest import Cli
from onnx import TensorProto, shape_inference
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass
from tensorrt_cases import METHODS, built, draw, headed, lowered, measured
from tiny_programs import CASES, case
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.errors import InputError
from edgewise.exporter.half import rounded
from edgewise.ops import METHODS as ALL_METHODS
from edgewise.targets.tensorrt import capabilities, rtx
from edgewise.targets.tensorrt.lint import findings
from edgewise.verify.metrics import compare

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


def types(path: Path) -> dict[str, int]:
    """The type of every value of a file, from the checker's own strict inference."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    graph = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return known | {t.name: t.data_type for t in graph.initializer}


def check_file(path: Path) -> Counter[str]:
    """What must hold of every file: static, strongly typed, no cast in vain, none of the ops that TensorRT has no way for."""
    model = onnx.load(path)
    kind, graph = types(path), model.graph
    (opset,) = (one.version for one in model.opset_import if not one.domain)
    # JetPack 6 has TensorRT 10.3, which reads opset 20 and was built with ONNX 1.16. Whole numbers of 4 bits came with opset 21.
    assert opset == (21 if TensorProto.INT4 in kind.values() else 20) and model.ir_version <= 10
    assert {node.op_type for node in graph.node} <= capabilities.SUPPORTED - set(capabilities.LATER)
    assert [one.domain for one in model.opset_import] == [""] and not model.functions
    for value in (*graph.input, *graph.output):
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    made_by = {output: node for node in graph.node for output in node.output}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts), "a value is cast twice"
    for node in graph.node:
        assert node.op_type not in ("NonZero", "CastLike", "Identity", "Shape"), node
        assert not (node.op_type == "ScatterElements" and any(a.name == "reduction" for a in node.attribute))
        floats = {kind[name] for name in node.input if kind.get(name) in FLOATS}
        assert len(floats) < 2, (node.op_type, node.name)
        if node.op_type in ("Softmax", "LayerNormalization", "TopK", "ReduceMean", "ReduceSum", "ReduceL2", "Log", "Pow", "Sqrt"):
            assert TensorProto.FLOAT16 not in floats, node.name
        if node.op_type == "Cast":
            assert kind[node.input[0]] != node.attribute[0].i, "a cast to the same type"
            before = made_by.get(node.input[0])
            undone = before is not None and before.op_type == "Cast" and kind[before.input[0]] == node.attribute[0].i
            assert not undone or kind[node.input[0]] not in FLOATS, "a cast undone"
        ours = node.name.startswith(("legalise", "insert"))
        if ours and node.op_type in ("Add", "Sub", "Mul", "Concat", "Where", "Equal", "Gather"):
            assert TensorProto.INT64 not in {kind[name] for name in (*node.input, *node.output)}, node.name
    return Counter(node.op_type for node in graph.node)


def recast(model: onnx.ModelProto) -> None:
    """Half-precision products through a cast to single precision and back."""
    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    (user,) = (one for one in model.graph.node if node.output[0] in one.input)
    place = list(model.graph.node).index(node) + 1
    wide = onnx.helper.make_node("Cast", [node.output[0]], ["wide"], name="wide", to=TensorProto.FLOAT)
    back = onnx.helper.make_node("Cast", ["wide"], ["back"], name="back", to=TensorProto.FLOAT16)
    user.input[list(user.input).index(node.output[0])] = "back"
    for one in (back, wide):
        model.graph.node.insert(place, one)


def same_type(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, onnx.helper.make_node("Cast", [node.input[0]], ["s"], name="same", to=TensorProto.FLOAT))
    node.input[0] = "s"


def twice(model: onnx.ModelProto) -> None:
    cast = next(node for node in model.graph.node if node.op_type == "Cast")
    again = onnx.NodeProto()
    again.CopyFrom(cast)
    again.output[0], again.name = "again", "again"
    model.graph.node.insert(list(model.graph.node).index(cast), again)


def later(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def another_domain(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (recast, "a cast undone"),
        (same_type, "to the same type"),
        (twice, "cast twice"),
        (later, "20"),
        (another_domain, "com.microsoft"),
    ],
)
def test_the_check_of_files_finds_faults(fault: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = lowered(CASES["block"]().exported, tmp_path, "fp16", 1, 2)
    check_file(path)
    model = onnx.load(path)
    fault(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    with pytest.raises(AssertionError, match=message):
        check_file(tmp_path / "faulty.onnx")


REJECTED = {"merge": "ScatterElements", "synonyms": "BitwiseAnd"}
"""Programs that NVIDIA's parser does not take, by the op that it has no way for."""


@pytest.mark.parametrize("name", sorted(CASES))
def test_programs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = CASES[name]()
    fails = [line for line in targets.get("tensorrt").lint(one.exported) if not line.startswith(("slow", "note"))]
    assert bool(fails) == (name in REJECTED), "lint and the parser agree"
    if name in REJECTED and rtx.installed():
        with pytest.raises(InputError, match=rf"cannot read .*\n  {REJECTED[name]}, node \w+ \(aten\..* at .*tiny_programs.py:\d+"):
            lowered(one.exported, tmp_path, "fp32", len(one.feeds), len(one.expected))
        return
    for precision, limit in (("fp32", 1e-5), ("fp16", 5e-3)):
        path = lowered(one.exported, tmp_path, precision, len(one.feeds), len(one.expected))
        check = onnx.load(path)
        assert check.opset_import[0].version == 20
        with targets.get("tensorrt").load([path], threads=1) as session:
            assert {info.name: (info.shape, info.dtype) for info in session.inputs} == {
                name: (array.shape, array.dtype.name) for name, array in one.feeds.items()
            }
            found = session.run(one.feeds)
        for key, expected in one.expected.items():
            assert (found[key].shape, found[key].dtype) == (expected.shape, expected.dtype)
            errors = compare(expected, found[key])
            assert errors.relative is not None and errors.relative <= limit, (precision, key, errors)


def test_every_method_is_here() -> None:
    assert set(METHODS) == set(ALL_METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, tmp_path: Path) -> None:
    """Each method as a graph of its own: the numbers, what lint says, and an engine where NVIDIA's builder is at hand."""
    for batch, precision, limit in ((2, "fp32", 1e-5), (1, "fp16", 1e-2)):
        model, x = tensorrt_cases.method(name, batch)
        x = x.half().float()  # so that inputs that are equal in half precision are equal here
        exported = rounded(torch.export.export(model, (x,), strict=False))
        expected = exported.module()(x).numpy()
        path = lowered(exported, tmp_path, precision)
        check_file(path)
        file = onnx_ir.load(path)
        ShapeInferencePass()(file)
        assert not [finding for finding in findings(file) if finding.level == "fails"]
        with targets.get("tensorrt").load([path], threads=1) as session:
            errors = compare(expected, session.run({"i0": x.numpy()})["o0"])
        assert errors.relative is not None and errors.relative <= limit, (precision, batch, errors)
        if rtx.installed():
            assert built(path) > 10_000


@pytest.mark.parametrize("name", METHODS[::4])
def test_methods_beside_8_bits(name: str, tmp_path: Path) -> None:
    """Q and DQ of the layer behind a method leave the method as it is; `benchmarks/tensorrt_matrix.py` does so for all methods."""
    path, _ = measured(*headed(name), "w8a8", tmp_path)
    check_file(path)
    if rtx.installed():
        assert built(path) > 10_000


def test_a_cast_to_a_third_type_stays() -> None:
    """Whole numbers become shorter, and what is made truths of them stays truths."""
    from edgewise.targets.tensorrt.retype import retype

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([3]))
    counted = ir.node("Cast", [x], attributes={"to": int(ir.DataType.INT64)})
    found = ir.node("Cast", [counted.outputs[0]], attributes={"to": int(ir.DataType.BOOL)})
    for node, kind in ((counted, ir.DataType.INT64), (found, ir.DataType.BOOL)):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), x.shape
    graph = ir.Graph([x], [found.outputs[0]], nodes=[counted, found], opset_imports={"": 20})
    retype(ir.Model(graph, ir_version=10), ir.DataType.INT64, ir.DataType.INT32, lambda node, operands: True)
    assert [node.attributes["to"].as_int() for node in graph] == [int(ir.DataType.INT32), int(ir.DataType.BOOL)]


def test_half_precision_computes_in_half_precision(tmp_path: Path) -> None:
    """By another evaluator, in NumPy: what it gives is off by the rounding of half precision, and no more than a little."""
    torch.manual_seed(0)
    one = CASES["block"]()
    path = lowered(one.exported, tmp_path, "fp16", 1, 2)
    kind = types(path)
    products = [node for node in onnx.load(path).graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert len(products) == 8 and all(kind[name] == TensorProto.FLOAT16 for node in products for name in node.input)
    assert check_file(path)["Cast"] <= 11
    sizes = {t.data_type for t in onnx.load(path).graph.initializer if len(t.raw_data) > 1024}
    assert sizes == {TensorProto.FLOAT16}
    for expected, found in zip(one.expected.values(), ReferenceEvaluator(str(path)).run(None, one.feeds), strict=True):
        errors = compare(expected, found)
        assert errors.relative is not None and 1e-5 < errors.relative < 5e-3


def test_what_half_precision_cannot_hold_stays_single(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.first.weight.data[3, 3] = 1e6

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * 1e-7)

    one = case(Large(), draw(1, 32))
    path = lowered(one.exported, tmp_path, "fp16")
    kind = types(path)
    products = [node for node in onnx.load(path).graph.node if node.op_type in ("MatMul", "Gemm")]
    assert [kind[node.output[0]] for node in products] == [TensorProto.FLOAT, TensorProto.FLOAT16]
    with targets.get("tensorrt").load([path]) as session:
        errors = compare(one.expected["o0"], session.run(one.feeds)["o0"])
    assert errors.relative is not None and errors.relative < 2e-3


def test_attention_is_what_tensorrt_fuses(tmp_path: Path) -> None:
    """Scaled queries and keys, a product, softmax, a product, and no more reshapes than the heads take."""
    torch.manual_seed(0)
    counts = check_file(lowered(CASES["block"]().exported, tmp_path, outputs=2))
    assert counts["Transpose"] == 4 and counts["Softmax"] == 1 and counts["Mul"] == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_bytes(precision: str, tmp_path: Path) -> None:
    model, x = tensorrt_cases.method("tome")
    exported = torch.export.export(model, (x,), strict=False)
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        found.append(lowered(exported, tmp_path / folder, precision).read_bytes())
    assert found[0] == found[1]
    assert not any(secret in found[0] for secret in (b".py", b"site-packages", str(tmp_path).encode()))


def test_an_artifact_that_chooses_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded scores may change places. The artifact is then compared with the program that makes the artifact's choices."""
    from edgewise.exporter import component

    monkeypatch.setattr(component, "ATTEMPTS", 1)

    class Close(nn.Module):
        """Blocks whose queries and keys see features that only single precision tells apart: half precision keeps the first."""

        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v, self.up = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)
            self.qk.weight.data[:, :16] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([torch.ones_like(x[:, :1]), x], 1)
            for _ in range(2):
                b, n, c = x.shape
                q, k = self.qk(x).reshape(b, n, 2, 2, 16).permute(2, 0, 3, 1, 4)
                v = self.v(x).reshape(b, n, 2, 16).transpose(1, 2)
                x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
                x = x + torch.nn.functional.gelu(self.up(x))
            return x

    torch.manual_seed(0)
    x = torch.randn(1, 48, 32)
    x[..., 16:] = 1 + 1e-4 * x[..., 16:]
    bundle = edgewise.export(
        Close(), tmp_path / "b", example=(x,), targets=["tensorrt"], compress="topk@encoder.block[0]:keep=0.5", precision="fp16",
        cache=False,
    )  # fmt: skip
    rungs = {rung.name: rung for rung in bundle.manifest.verification if rung.kind == "lowering"}
    label = bundle.manifest.targets[0].label
    assert rungs[label].passed is None and "other tokens" in rungs[label].note
    assert rungs[label].kept_overlap is not None and rungs[label].kept_overlap < 1
    assert rungs[f"{label}, same choices"].passed and rungs[f"{label}, same choices"].threshold == 1e-2
    assert np.isfinite(bundle.golden(bundle.manifest.targets[0].role).outputs["output"]).all()


def test_inspect_prints_the_command_of_the_device(cli: Cli, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "a bundle"
    assert cli("export", f"{tiny}:make", "--target", "tensorrt", "--target", "openvino", "-o", out).code == 0
    said = cli("inspect", out, "--json")
    path = out / "tensorrt" / "vision_encoder.onnx"
    assert list(said.document["commands"]) == ["tensorrt/vision_encoder/fp32"]
    words = shlex.split(said.document["commands"]["tensorrt/vision_encoder/fp32"])
    assert words[:4] == ["trtexec", f"--onnx={path}", "--stronglyTyped", "--noTF32"] and path.exists()
    assert "trtexec --onnx=" in cli("inspect", out).out
    for verb in (["verify"], ["bench", "--samples", "1", "--seconds", "0"]):
        assert cli(verb[0], out, "--target", "tensorrt", *verb[1:]).code == 0
    assert cli("run", out, "--target", "tensorrt", "--inputs", "absent.npz").code == 2
