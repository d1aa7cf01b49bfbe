"""What lint says of a program for TensorRT, and that NVIDIA's parser and builder say the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from conftest import Cli
from onnx import TensorProto, helper, numpy_helper
from tiny_programs import CASES, case
from torch import Tensor, nn

from edgewise import targets
from edgewise.errors import InputError
from edgewise.targets.tensorrt import capabilities, engine, rtx
from edgewise.targets.tensorrt.lint import findings

F, I, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8  # noqa: E741
needs_rtx = pytest.mark.skipif(not rtx.installed(), reason="needs the extra tensorrt-rtx, which has no package for this platform")
Value = tuple[str, int, list[int | str]]


def one(op: str, inputs: list[Value], outputs: list[Value], constants: dict[str, Any] | None = None, **attributes: Any) -> Any:
    """A model of one node."""
    weights = [numpy_helper.from_array(torch.as_tensor(v).numpy(), k) for k, v in (constants or {}).items()]
    names = [*(i[0] for i in inputs), *(constants or {})], [o[0] for o in outputs]
    node = helper.make_node(op, *names, name="the/node", **attributes)
    values = [[helper.make_tensor_value_info(*value) for value in some] for some in (inputs, outputs)]
    return helper.make_model(
        helper.make_graph([node], "g", *values, weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )


def loop() -> Any:
    scalar = [helper.make_tensor_value_info(n, k, []) for n, k in (("n", I), ("c", TensorProto.BOOL))]
    vector = [helper.make_tensor_value_info(n, F, [4]) for n in ("a", "b")]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["a", "a"], ["b"])],
        "body",
        [*scalar, vector[0]],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), vector[1]],
    )
    return one("Loop", [], [("y", F, [4])], {"m": 3, "on": True, "start": torch.ones(4)}, body=body)


def four_bits() -> Any:
    """A layer with weights of 4 bits in blocks of 128 inputs, as `w4a16` writes it."""
    half = TensorProto.FLOAT16
    weights = [
        helper.make_tensor("w", TensorProto.INT4, [128, 16], [1] * (128 * 16)),
        numpy_helper.from_array(torch.ones(1, 16, dtype=torch.float16).numpy(), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="d", axis=0, block_size=128),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="the/node"),
    ]
    values = [[helper.make_tensor_value_info(name, half, shape)] for name, shape in (("x", [4, 128]), ("y", [4, 16]))]
    return helper.make_model(
        helper.make_graph(nodes, "g", *values, weights), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


SCATTER: list[Value] = [("x", F, [1, 8]), ("i", I, [1, 4]), ("u", F, [1, 4])]
MODELS: dict[str, Callable[[], Any]] = {
    "scatter-add": lambda: one("ScatterElements", SCATTER, [("y", F, [1, 8])], axis=1, reduction="add"),
    "scatter": lambda: one("ScatterElements", SCATTER, [("y", F, [1, 8])], axis=1),
    "topk-5000": lambda: one("TopK", [("x", F, [1, 6000])], [("v", F, [1, 5000]), ("i", I, [1, 5000])], {"k": [5000]}),
    "topk-3840": lambda: one("TopK", [("x", F, [1, 6000])], [("v", F, [1, 3840]), ("i", I, [1, 3840])], {"k": [3840]}),
    "nonzero": lambda: one("NonZero", [("x", F, [1, 8])], [("y", I, [2, "n"])]),
    "bitwise-and": lambda: one("BitwiseAnd", [("x", I, [8]), ("z", I, [8])], [("y", I, [8])]),
    "determinant": lambda: one("Det", [("x", F, [4, 4])], [("y", F, [])]),
    "spectrum": lambda: one("DFT", [("x", F, [1, 8, 1])], [("y", F, [1, 8, 2])]),
    "nine-dimensions": lambda: one("Mul", [("x", F, [1] * 8 + [4])] * 2, [("y", F, [1] * 8 + [4])]),
    "bytes": lambda: one("Add", [("x", B, [4]), ("z", B, [4])], [("y", B, [4])]),
    "dynamic": lambda: one("Relu", [("x", F, [1, "n"])], [("y", F, [1, "n"])]),
    "float64": lambda: one("Relu", [("x", TensorProto.DOUBLE, [4])], [("y", TensorProto.DOUBLE, [4])]),
    "window": lambda: one("HannWindow", [], [("y", F, [16])], {"n": 16}),
    "int64": lambda: one("Mul", [("x", I, [4]), ("z", I, [4])], [("y", I, [4])]),
    "loop": loop,
    "scatter-nd-max": lambda: one(
        "ScatterND", [("x", F, [8]), ("i", I, [4, 1]), ("u", F, [4])], [("y", F, [8])], reduction="max"
    ),
    "data-dependent-k": lambda: one("TopK", [("x", F, [1, 8]), ("k", I, [1])], [("v", F, [1, "n"]), ("i", I, [1, "n"])]),
    "strings": lambda: one("Equal", [("x", TensorProto.STRING, [4])] * 2, [("y", TensorProto.BOOL, [4])]),
    "four-bits": four_bits,
}


def said(name: str, folder: Path) -> tuple[str, str, str]:
    """What lint, the parser and the builder say of a model."""
    model = MODELS[name]()
    if name in ("nine-dimensions", "strings"):
        del model.graph.input[1]
    levels = {finding.level for finding in findings(onnx_ir.from_proto(model))}
    lint = next((level for level in ("fails", "slow", "note") if level in levels), "passes")
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    trt = rtx.package()
    try:
        network = engine.parse(trt, path)
    except InputError:
        return lint, "refuses", "-"
    config = network.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    try:
        engine.build(network, config, name)
    except InputError:
        return lint, "takes", "refuses"
    return lint, "takes", "takes"


@needs_rtx
def test_the_table_of_the_docs_is_measured(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "targets" / "tensorrt.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (\w+) \| (\w+|-) \|$", page, re.MULTILINE)
    assert {row[0]: row[1:] for row in rows} == {name: said(name, tmp_path) for name in MODELS}


@needs_rtx
def test_the_capabilities_are_what_the_parser_says() -> None:
    trt = rtx.package()
    log = engine.logger(trt)
    builder = trt.Builder(log)
    parser = trt.OnnxParser(builder.create_network(0), log)
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain and schema.since_version <= 20}
    assert {op for op in known if parser.supports_operator(op)} == capabilities.SUPPORTED
    assert set(capabilities.LATER) | capabilities.LOOPS <= capabilities.SUPPORTED


def lines(module: nn.Module, *inputs: Tensor) -> list[str]:
    return targets.get("tensorrt").lint(torch.export.export(module, inputs, strict=False))


def test_lines_name_the_op_and_the_line_of_the_model() -> None:
    torch.manual_seed(0)
    target = targets.get("tensorrt")
    for name, words in (("synonyms", "BitwiseAnd, node and_2 "), ("merge", "ScatterElements, node scatter_add ")):
        found = [line for line in target.lint(CASES[name]().exported) if not line.startswith("slow")]
        assert len(found) == 1 and found[0].startswith(words) and "tiny_programs.py:" in found[0], found
    for name in ("block", "masked_block", "convolutions"):
        assert target.lint(CASES[name]().exported) == []
    long = case(nn.Sequential(nn.Linear(2, 4000), Top()), torch.randn(1, 2))
    assert [line for line in target.lint(long.exported) if "K is 3900: TensorRT takes at most 3840" in line]
    dynamic = torch.export.export(nn.Linear(4, 4), (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert any("dynamic shape" in line for line in target.lint(dynamic))


class Top(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(3900).values


class Attention(nn.Module):
    """Attention that is spelled out, in ways that are one kernel and in ways that are not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        scores = (q * 0.5) @ q.transpose(-1, -2)
        if self.kind == "mask":
            scores = scores + torch.ones(8, 8).triu(1) * -1e9
        if self.kind == "clipped":
            scores = torch.tanh(scores)
        weights = scores.softmax(-1)
        return (weights @ q, weights) if self.kind == "shown" else weights @ q


@pytest.mark.parametrize(
    ("kind", "word"), [("plain", ""), ("mask", ""), ("clipped", "Tanh stands between"), ("shown", "read by more than its product")]
)
def test_what_breaks_the_fusion_of_attention(kind: str, word: str) -> None:
    found = lines(Attention(kind), torch.randn(1, 2, 8, 4))
    assert (found == []) if not word else (len(found) == 1 and found[0].startswith("slow: Softmax") and word in found[0]), found


def test_the_verb(cli: Cli, tiny: str) -> None:
    done = cli("lint", f"{tiny}:make", "--target", "tensorrt", "--compress", "tome:keep=0.5", "--json")
    assert done.code == 0 and done.document["targets"] == {"tensorrt": {"fails": [], "slow": [], "notes": []}}
    four = cli("lint", f"{tiny}:make", "--target", "tensorrt", "--precision", "w4a16", "--json")
    (needs, unfit) = four.document["targets"]["tensorrt"]["notes"]
    assert four.code == 0 and "opset 21, which TensorRT reads from 10.9 on: JetPack 7, and not 6" in needs
    assert unfit.startswith("layers ") and "blocks of 128 or 64" in unfit
    everywhere = cli("lint", f"{tiny}:make", "--precision", "w8a8", "--json").document["targets"]
    assert "tensorrt" in everywhere and "openvino" in everywhere and "coreai" not in everywhere
    cli("lint", f"{tiny}:make", "--precision", "w8a9").refused("unknown precision 'w8a9': did you mean 'w8a8'?")
    wrong = cli("lint", f"{tiny}:make", "--target", "tensorrt", "--precision", "w8a16")
    wrong.refused("unknown precision of target tensorrt 'w8a16'")
    Path("more.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        return x.scatter_add(0, x.long() * 0, x)\n"
        "def make():\n    return M(), torch.rand(4)\n"
    )
    both = cli("lint", "py:more:make", "--target", "tensorrt", "--target", "openvino", "--json")
    assert both.code == 1 and both.document["targets"]["openvino"]["fails"] == []
    assert "more.py:4" in both.document["targets"]["tensorrt"]["fails"][0]
    told = cli("lint", "py:more:make", "--target", "tensorrt")
    assert told.code == 1 and told.out.startswith("tensorrt: ScatterElements, node scatter_add")
    assert cli("lint", "py:more:make", "--target", "openvino").out == "openvino: nothing is known to fail or to be slow\n"
    cli("lint", f"{tiny}:make", "--target", "tensort").refused("unknown target 'tensort': did you mean 'tensorrt'?")
