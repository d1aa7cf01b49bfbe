"""Programs as Core ML packages: the names, the numbers, the bytes, and what coremltools gets wrong without a word."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_programs import CASES, Case, Unknown, case
from torch import Tensor, nn

from edgewise import targets
from edgewise.bundle.manifest import path_fault
from edgewise.errors import InputError
from edgewise.verify import compare

pytest.importorskip("coremltools")

FITTING = [name for name in CASES if name not in ("convolutions", "synonyms")]
"""Those without a tensor of six dimensions and without the bits of whole numbers, which Core ML does not have."""


@functools.cache
def program(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


def lowered(one: Case, folder: Path, precision: str = "fp32", target: str = "coreml", stem: str = "m") -> list[Path]:
    return targets.get(target).lower(
        one.exported,
        folder,
        stem,
        precision=precision,
        input_names=one.input_names,
        output_names=one.output_names,
    )


def outputs_of(one: Case, folder: Path, precision: str = "fp32", target: str = "coreml") -> dict[str, np.ndarray]:
    with targets.get(target).load(lowered(one, folder, precision, target)) as session:
        return session.run(one.feeds)


def worst(one: Case, outputs: dict[str, np.ndarray]) -> float:
    """The largest relative error of a session's outputs, of the right names, shapes and types."""
    assert list(outputs) == one.output_names
    errors = []
    for name, expected in one.expected.items():
        assert (outputs[name].shape, outputs[name].dtype) == (expected.shape, expected.dtype)
        found = compare(expected, outputs[name])
        assert found.finite and found.relative is not None
        errors.append(found.relative)
    return max(errors)


@pytest.mark.parametrize("name", FITTING)
def test_the_package_computes_the_program(name: str, tmp_path: Path) -> None:
    one = program(name)
    assert worst(one, outputs_of(one, tmp_path)) <= 1e-5
    assert worst(one, outputs_of(one, tmp_path, "fp16")) <= 2e-3


class Written(nn.Module):
    """A module that is one expression."""

    def __init__(self, expression: Callable[..., Any]) -> None:
        super().__init__()
        self.expression = expression

    def forward(self, *x: Tensor) -> Any:
        return self.expression(*x)


MISREAD: dict[str, tuple[Any, Callable[..., Any]]] = {
    "tanh gelu": (torch.ops.aten.gelu.default, lambda x: F.gelu(3 * x, approximate="tanh")),
    "add alpha": (torch.ops.aten.add.Tensor, lambda x: torch.add(x, x.flip(0), alpha=0.5)),
    "sub alpha": (torch.ops.aten.sub.Tensor, lambda x: torch.sub(x, x.flip(0), alpha=3)),
    "rsub alpha": (torch.ops.aten.rsub.Tensor, lambda x: torch.rsub(x, x.flip(0), alpha=2)),
    "reciprocal": (torch.ops.aten.reciprocal.default, lambda x: torch.reciprocal(0.01 + x.abs())),
    "one over": (torch.ops.aten.reciprocal.default, lambda x: 1.0 / (0.01 + x.abs())),
    "rsqrt": (torch.ops.aten.rsqrt.default, lambda x: torch.rsqrt(x.abs() * 1e-11)),
    "whole bound": (torch.ops.aten.clamp_min.default, lambda x: x.clamp_min(1)),
    "bound of whole numbers": (torch.ops.aten.clamp.default, lambda x: (9 * x).to(torch.int64).clamp(min=-3)),
    "rows of truths": (torch.ops.aten.index_select.default, lambda x: (x > 0).index_select(0, torch.tensor([2, 0, 2]))),
    "truths along a dimension": (
        torch.ops.aten.gather.default,
        lambda x: (x > 0).gather(1, (x.abs() * 2).to(torch.int64).clamp(0, 5)),
    ),
    "zeros of another type": (
        torch.ops.aten.zeros_like.default,
        lambda x: torch.zeros_like(x, dtype=torch.int64) + (x > 0),
    ),
    "place of the largest": (torch.ops.aten.argmax.default, lambda x: x.argmax()),
    "grouped attention": (
        torch.ops.aten.scaled_dot_product_attention.default,
        lambda x: F.scaled_dot_product_attention(
            x.reshape(1, 4, 3, 4), x[:4].reshape(1, 2, 3, 4), x[4:].reshape(1, 2, 3, 4), enable_gqa=True
        ),
    ),
    "stable sort": (
        torch.ops.aten.sort.stable,
        lambda x: torch.sort((x * 2).round(), dim=-1, descending=True, stable=True)[1],
    ),
}
"""What coremltools has no rule for, does not read, or computes as something else: the op of the rewriting that mends it, and an
example that shows the difference."""


@pytest.mark.parametrize("what", MISREAD)
def test_what_coremltools_misreads_is_rewritten(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.coreml import legal

    op, expression = MISREAD[what]
    one = case(Written(expression), torch.randn(8, 6, generator=torch.Generator().manual_seed(5)))
    assert worst(one, outputs_of(one, tmp_path)) <= 1e-6
    monkeypatch.delitem(legal.REWRITES, op)
    try:
        error = worst(one, outputs_of(one, tmp_path))
    except InputError as refused:
        assert "coremltools" in str(refused) or "no rule" in str(refused)
    else:
        assert error > 1e-4  # coremltools says nothing


def test_how_an_input_lies_in_memory_means_nothing(tmp_path: Path) -> None:
    """A cache is given as its model made it, with its heads behind its tokens."""
    one = case(Written(lambda x: x.cumsum(1) * 2), torch.randn(1, 5, 3, 4).transpose(1, 2))
    assert worst(one, outputs_of(one, tmp_path)) <= 1e-6


def test_a_product_and_a_sum_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools makes a batch norm of them, whose epsilon changes the product."""
    from edgewise.targets.coreml import convert

    scale, bias = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    one = case(Written(lambda x: x * scale + bias), 100 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert worst(one, outputs_of(one, tmp_path)) <= 1e-6
    monkeypatch.setattr(convert, "_TO_BATCH_NORM", "common::merge_tensorwise_affine_dequantize_with_consecutive_ops")
    assert worst(one, outputs_of(one, tmp_path)) > 3e-6


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v),
    "the usual scale": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=0.5),
    "another scale": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    "causal": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "numbers added": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.9),
    "truths": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > m.amin(-1, True)),
    "shared heads": lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True, scale=2.0),
    "no heads": lambda q, k, v, m: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], scale=1.0),
}


@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_is_one_op_by_choice(form: str, tmp_path: Path) -> None:
    """From iOS 18 on, whatever its scale and mask; before, it is taken apart."""
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(2, 4, 5, 4, generator=generator) for _ in range(3)]
    one = case(Written(ATTENTIONS[form]), *given, torch.randn(2, 1, 5, 5, generator=generator))
    assert worst(one, outputs_of(one, tmp_path, "fp32", "coreml-ios18")) <= 1e-5
    chosen = targets.get("coreml-ios18").ops([tmp_path / "m.mlpackage" / "Manifest.json"])
    assert chosen is not None
    assert chosen["scaled_dot_product_attention"] == 1 and "softmax" not in chosen
    if form == "another scale":
        assert worst(one, outputs_of(one, tmp_path, "fp16", "coreml-ios18")) <= 5e-3
    assert worst(one, outputs_of(one, tmp_path)) <= 1e-5
    usual = targets.get("coreml").ops([tmp_path / "m.mlpackage" / "Manifest.json"])
    assert usual is not None and "scaled_dot_product_attention" not in usual


def test_gelu_stays_one_op(tmp_path: Path) -> None:
    from edgewise.targets.coreml.package import Package

    one = case(Written(lambda x: F.gelu(x, approximate="tanh")), torch.randn(3, 4))
    package = Package.open(lowered(one, tmp_path)[0].parent)
    (block,) = package.model.mlProgram.functions["main"].block_specializations.values()
    assert [op.type for op in block.operations if op.type != "const"] == ["gelu"]


def test_a_keyword_that_is_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.coreml import legal

    monkeypatch.delitem(legal.REWRITES, torch.ops.aten.gelu.default)
    one = case(Written(lambda x: F.gelu(x, approximate="tanh")), torch.randn(3))
    with pytest.raises(InputError, match=r"does not read approximate='tanh' of node gelu.*coreml.py:\d+, in forward"):
        lowered(one, tmp_path)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (lambda x: x.to(torch.int64) // 2, "gives float values to node floor_divide"),
        (lambda x: x.to(torch.int64) + 2**40, "1099511627776 of node add.* is beyond 32 bits"),
        (lambda x: x.reshape(1, 1, 1, 1, 1, -1), "rank <= 5"),
        (lambda x: x.to(torch.int32) & 3, "bitwise_and"),
    ],
    ids=["floor_divide", "wide integer", "six dimensions", "bits"],
)
def test_what_core_ml_cannot_hold_is_refused(expression: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        lowered(case(Written(expression), torch.randn(6) * 5), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_op_without_a_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target coreml cannot lower this program: .*bessel_j0"):
        lowered(case(Unknown(), torch.randn(3)), tmp_path)


def test_ops_without_a_rule_are_taken_apart(tmp_path: Path) -> None:
    """As torch does it: RMS norm, Hugging Face's repeat of heads, a reduction over several dimensions, and others."""

    def expression(x: Tensor) -> tuple[Tensor, ...]:
        return (
            (x > 0).sum(-1, dtype=torch.float32),
            F.rms_norm(x, (6,), torch.full((6,), 0.5)),
            torch.cosine_similarity(x, x.flip(0), dim=-1),
            F.max_pool2d(x.reshape(1, 1, 8, 6), 2),
            x.take_along_dim(x.argmax(-1, keepdim=True), dim=-1),
            F.softplus(x).aminmax(dim=-1)[0],
            *x.chunk(3),
            *x.chunk(4, dim=-1),
        )

    one = case(Written(expression), torch.randn(8, 6))
    assert worst(one, outputs_of(one, tmp_path)) <= 1e-6


def test_names_may_be_any(tmp_path: Path) -> None:
    """Names of values inside, names that Core ML does not take, and each other's."""
    one = program("block")
    inner = [node.name for node in one.exported.graph.nodes if node.op == "call_function"]
    for name, *output_names in (
        (inner[3], "head.weight", inner[-1]),
        ("o1", "i0", "o0"),
        ("image", "a.b", "a_b"),
        ("bool", "1", "ö"),
    ):
        files = targets.get("coreml").lower(
            one.exported, tmp_path, "m", precision="fp32", input_names=[name], output_names=output_names
        )
        with targets.get("coreml").load(files) as session:
            outputs = session.run({name: one.feeds["i0"]})
        assert list(outputs) == output_names
        for got, expected in zip(outputs.values(), one.expected.values(), strict=True):
            assert np.allclose(got, expected, atol=1e-5)


AGAIN = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
from pathlib import Path
import torch, tiny_programs
from edgewise import targets
torch.manual_seed(0)
one, names = tiny_programs.block(), {{"input_names": ["i0"], "output_names": ["o0", "o1"]}}
targets.get("coreml").lower(one.exported, Path({folder!r}), "m", precision="fp16", **names)
"""


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    """After a conversion of another program and one that failed, and in another process and folder."""
    first = lowered(program("block"), tmp_path / "a", "fp16")
    with pytest.raises(InputError):
        lowered(case(Unknown(), torch.randn(3)), tmp_path)
    lowered(program("odd"), tmp_path / "c", "fp16")
    second = lowered(program("block"), tmp_path / "b", "fp16")
    here = Path(__file__).parent
    code = AGAIN.format(here=str(here), root=str(here.parent), folder=str(tmp_path / "d"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for path, again in zip(first, second, strict=True):
        name = path.relative_to(tmp_path / "a")
        assert path_fault(name.as_posix()) is None
        data = path.read_bytes()
        assert data == again.read_bytes() == (tmp_path / "d" / name).read_bytes()
        for secret in (str(tmp_path), str(here), "site-packages", ".py", "2026-"):
            assert secret.encode() not in data


def test_coremltools_opens_the_package(tmp_path: Path) -> None:
    import coremltools

    files = lowered(program("block"), tmp_path, "fp16")
    assert [path.name for path in files] == ["Manifest.json", "model.mlmodel", "weight.bin"]
    assert files[0].parent == tmp_path / "m.mlpackage"
    model = coremltools.models.MLModel(str(files[0].parent), skip_model_load=True)
    spec = model.get_spec()
    assert spec.specificationVersion == 8  # iOS 17
    kinds = {f.name: f.type.multiArrayType.dataType for f in (*spec.description.input, *spec.description.output)}
    half = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert kinds == {"i0": half, "o0": half, "o1": half}
    assert json.loads(spec.description.metadata.userDefined["edgewise.ports"])["inputs"][0]["dtype"] == "float32"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a16", "w8a16-palette", "w4a16"])
def test_inputs_and_outputs_have_the_type_of_the_arithmetic(precision: str, tmp_path: Path) -> None:
    """In the description and in the program alike, so that no cast stands between; whole numbers and truth values are int32."""
    from edgewise.targets.coreml.package import Package

    def expression(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, torch.linspace(-1, 1, 64 * 32).reshape(64, 32))
        return y, index + 1, y > 0, y.sum()

    one = case(Written(expression), torch.randn(4, 32), torch.arange(4))
    package = Package.open(lowered(one, tmp_path, precision)[0].parent)
    description, function = package.model.description, package.model.mlProgram.functions["main"]
    (block,) = function.block_specializations.values()
    half = precision != "fp32"
    fp, codes = (65552, (10,)) if half else (65568, (11,))  # FLOAT16 and FLOAT32, of features and in the program
    features = {f.name: f.type.multiArrayType.dataType for f in (*description.input, *description.output)}
    assert features == {"i0": fp, "i1": 131104, "o0": fp, "o1": 131104, "o2": 131104, "o3": fp}
    assert {one.name: one.type.tensorType.dataType for one in function.inputs} == {"i0": codes[0], "i1": 23}
    made = {out.name: out.type.tensorType.dataType for op in block.operations for out in op.outputs}
    assert (made["o0"], made["o1"], made["o3"]) == (codes[0], 23, codes[0])
    casts = [op for op in block.operations if op.type == "cast"]
    assert not [op for op in casts if {"i0", "o0", "o3"} & {*(a.arguments[0].name for a in op.inputs.values()), op.outputs[0].name}]
    with targets.get("coreml").load([package.path / "Manifest.json"]) as session:
        outputs = session.run(one.feeds)
    assert {name: str(array.dtype) for name, array in outputs.items()} == {
        **{"o0": "float32", "o1": "int64", "o2": "bool", "o3": "float32"}
    }


def test_half_precision_halves_the_weights(tmp_path: Path) -> None:
    one = case(nn.Linear(512, 512), torch.randn(1, 512))
    sizes = [sum(p.stat().st_size for p in lowered(one, tmp_path / kind, kind)) for kind in ("fp32", "fp16")]
    assert sizes[1] < 0.51 * sizes[0]


def test_lowering_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(program("odd"), tmp_path, "fp16")
    assert capfd.readouterr() == ("", "")


def test_the_program_is_not_changed(tmp_path: Path) -> None:
    one = program("block")
    before = (str(one.exported.graph), {key: value.clone() for key, value in one.exported.state_dict.items()})
    lowered(one, tmp_path, "fp16")
    assert str(one.exported.graph) == before[0]
    assert all(torch.equal(value, one.exported.state_dict[key]) for key, value in before[1].items())


def test_a_session_imports_no_torch_and_no_coremltools(tmp_path: Path) -> None:
    one = program("block")
    files = [str(path) for path in lowered(one, tmp_path, "fp16")]
    np.save(tmp_path / "x.npy", one.feeds["i0"])
    code = f"""
import numpy, pathlib, sys
from edgewise import targets
with targets.get("coreml").load([pathlib.Path(path) for path in {files!r}], threads=1) as session:
    assert session.run({{"i0": numpy.load({str(tmp_path / "x.npy")!r})}})["o1"].shape == (1, 10)
assert not {{"torch", "coremltools", "transformers", "onnx"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Risky(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        best = x.topk(3, dim=-1)[1]
        six = x.reshape(1, 2, 2, 2, 2, 3)
        passing = six.permute(0, 2, 1, 3, 4, 5).reshape(8, 6)
        return x.gather(1, best), torch.special.bessel_j0(x), passing, six.sum(0)


def test_lint_names_what_fails_and_what_leaves_the_neural_engine() -> None:
    one = case(Risky(), torch.randn(8, 6))
    lines = targets.get("coreml").lint(one.exported)
    assert [line.removeprefix("slow: ").split()[1] for line in lines] == [
        "special_bessel_j0",
        "reshape",
        "gather",
        "topk",
    ]
    assert "has no rule" in lines[0] and "6 dimensions" in lines[1] and "test_targets_coreml.py" in lines[1]
    assert [line.startswith("slow: ") for line in lines] == [False, False, True, True]
    assert "Neural Engine" in lines[2] and "issue 1103" in lines[2] and "issue 66" in lines[3]


class Keeps(nn.Module):
    """Writes to a cache of any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(32, width))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.copy_(self.cache * 0.5 + x)
        return self.cache + 1


RISKS: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "gather": (Written(lambda x: x.gather(1, torch.zeros(8, 2, dtype=torch.int64))), (torch.randn(8, 6),), "issue 1103"),
    "embedding": (nn.Embedding(9, 4), (torch.arange(3),), "issue 1103"),
    "index": (Written(lambda x, i: x[i]), (torch.randn(8, 6), torch.arange(3)), "issue 1103"),
    "topk": (Written(lambda x: x.topk(2)[0]), (torch.randn(8, 6),), "coreai-torch issue 66"),
    "sort": (Written(lambda x: x.sort()[0]), (torch.randn(8, 6),), "coreai-torch issue 66"),
    "scatter": (Written(lambda x, i: x.scatter_add(1, i, x)), (torch.ones(2, 3), torch.zeros(2, 3).long()), "only seen on the CPU"),
    "cumsum": (Written(lambda x: x.cumsum(-1)), (torch.randn(8, 6),), "sums of all before"),
    "triangle": (Written(lambda x: x.tril()), (torch.randn(8, 6),), "triangles"),
    "where": (Written(lambda x: torch.where(x > 0, x, -x)), (torch.randn(8, 6),), "choices and logic"),
    "masked_fill": (Written(lambda x: x.masked_fill(x > 0, 2.0)), (torch.randn(8, 6),), "choices and logic"),
    "logic": (Written(lambda x: (x > 0) & (x < 1)), (torch.randn(8, 6),), "choices and logic"),
    "random": (Written(lambda x: x + torch.rand_like(x)), (torch.randn(8, 6),), "random numbers"),
    "state": (Keeps(64), (torch.randn(32, 64),), "issue 2553"),
    "uneven state": (Keeps(40), (torch.randn(32, 40),), "issue 2631"),
}
"""A program for each rule, and what the rule's line says."""


@pytest.mark.parametrize("what", RISKS)
def test_each_rule_of_lint_fires_alone(what: str) -> None:
    module, given, words = RISKS[what]
    lines = targets.get("coreml").lint(torch.export.export(module, given, strict=False).run_decompositions({}))
    assert len(lines) == 1 and lines[0].startswith("slow: "), lines
    assert words in lines[0]


def test_lint_is_silent_where_nothing_is_at_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.coreml import lint as rules

    for name in ("coreml", "coreml-ane", "coreml-ios18"):
        assert targets.get(name).lint(program("block").exported) == []
    monkeypatch.setattr(rules, "LARGEST", 10_000)
    (line,) = targets.get("coreml").lint(program("block").exported)
    assert "beyond 1 GB" in line
    five = case(Written(lambda x: x.reshape(1, 2, 2, 2, -1) * 2), torch.randn(8, 6))
    monkeypatch.undo()
    assert targets.get("coreml").lint(five.exported) == []


def test_lint_knows_what_compression_needs_and_what_the_layout_lacks() -> None:
    """Sort-free compression is at no risk, topk is; attention written as products has no form in the layout."""
    from tiny_encoder import Encoder

    import edgewise
    from edgewise.passes.legalise import Legalise

    model = Encoder().eval()
    compressed = edgewise.compress(edgewise.capture(model, (torch.randn(1, 3, 32, 32),)), "topk@encoder.block[1]:keep=6")
    found = {}
    for name in ("coreml", "coreml-topk"):
        target = targets.get(name)
        found[name] = target.lint(Legalise(target.realisations)(compressed.exported).program)
    assert not any("topk" in line for line in found["coreml"])
    assert any("issue 66" in line for line in found["coreml-topk"])
    by_hand = case(Products(), torch.randn(1, 6, 8))
    (line,) = targets.get("coreml-ane").lint(by_hand.exported)
    assert line.startswith("slow: ") and "transposed between ops" in line and "test_targets_coreml.py" in line
    (line,) = targets.get("coreml-ane").lint(case(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4)).exported)
    assert "no linear layer" in line and not line.startswith("slow: ")


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last((y @ y.transpose(1, 2)).softmax(-1) @ y)


def test_the_page_has_every_rule_of_lint() -> None:
    from edgewise.targets.coreml import lint as rules

    page = " ".join((Path(__file__).parents[1] / "docs/targets/coreml.md").read_text("utf-8").split())
    for rule in rules.RULES:
        assert rule.source in page, rule.source
    assert "issue 2553" in page and "issue 2631" in page and "1 GB" in page
