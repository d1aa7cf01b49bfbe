"""Quantised artifacts: what is quantised and what is not, how right the numbers are, and the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Cli
from torch import nn

import edgewise
from edgewise.calibration.control import PROBES, Candidate, keep_metric, parse_drop
from edgewise.calibration.data import Port, open_source
from edgewise.calibration.metric import accuracy
from edgewise.calibration.samples import Samples, survey
from edgewise.errors import InputError
from edgewise.exporter.quantise import skipped
from edgewise.passes.layers import layers
from edgewise.passes.legalise import Legalise
from edgewise.targets import get
from edgewise.targets.base import layer_of
from edgewise.verify.bundle import verify_bundle

TARGETS = ("openvino", "onnxruntime")
PRECISIONS = ("w8a16", "w8a8", "w4a16")
WIDTH, CLASSES, TOKENS = 32, 4, 16
Artifacts = dict[tuple[str, str], list[Path]]
LAYERS = ["head", *(f"blocks.{i}.{name}" for i in range(2) for name in ("down", "out", "qkv", "up"))]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, n, c))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """A stream of tokens through two blocks, one channel of which is far louder than the others, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            self.blocks[0].norms[0].weight[3] = 40.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def data(count: int = 24, batch: int = 1) -> dict[str, np.ndarray]:
    """Samples, and the classes that the model itself gives them."""
    x = np.random.default_rng(1).standard_normal((count, TOKENS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        return {"x": x, "labels": model()(torch.from_numpy(x)).argmax(-1).numpy()}


def export(out: Path, target: str, precision: str, **given: object) -> edgewise.Bundle:
    if precision == "w8a8" or "max_drop" in given:
        given.setdefault("calibration", data())
    given = {"compress": "tome:keep=0.5", "cache": False, **given}
    example = (torch.from_numpy(data()["x"][:2]),)
    return edgewise.export(model(), out, example=example, targets=[target], precision=precision, **given)  # type: ignore[arg-type]


def lower(target: str, folder: Path, *specs: str) -> list[Path]:
    """The model's artifact in floating point, without the checks of an export."""
    program = edgewise.compress(edgewise.capture(model(), (torch.from_numpy(data()["x"][:2]),)), *specs)
    legal = Legalise(get(target).realisations)(program.exported).program
    names = {"input_names": list(program.inputs), "output_names": list(program.output_names)}
    folder.mkdir()
    return get(target).lower(legal, folder, "model", precision="fp32", **names)


PORTS = {"x": Port((2, TOKENS, WIDTH), "float32")}


def samples(arrays: dict[str, np.ndarray] | None = None) -> Samples:
    source = open_source(data() if arrays is None else arrays, PORTS)
    return survey(source, PORTS, range(len(source)))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The files of every target and precision, of the model with half of its tokens merged."""
    made: Artifacts = {}
    for name in TARGETS:
        folder = tmp_path_factory.mktemp(name)
        made[name, "fp32"] = lower(name, folder / "fp32", "tome:keep=0.5")
        for precision in PRECISIONS:
            quantiser = get(name).quantiser(made[name, "fp32"], precision, samples())
            assert sorted(quantiser.layers) == sorted(LAYERS)
            made[name, precision] = quantiser.write(folder / precision, "model")
            made[name, f"{precision} in part"] = quantiser.write(folder / "part", precision, ["head", "blocks.0.down"])
            made[name, f"{precision} floating"] = quantiser.write(folder / "floating", precision, LAYERS)
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The same of the model with all of its tokens, so that no choice between them can differ."""
    made: Artifacts = {}
    for name in TARGETS:
        folder = tmp_path_factory.mktemp(name)
        made[name, "fp32"] = lower(name, folder / "fp32")
        for precision in PRECISIONS:
            made[name, precision] = get(name).quantiser(made[name, "fp32"], precision, samples()).write(folder / precision, "model")
    return made


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, edgewise.Bundle]:
    """`w8a8` of both targets."""
    return {target: export(tmp_path_factory.mktemp("b") / "b", target, "w8a8") for target in TARGETS}


def artifact(bundle: edgewise.Bundle) -> Path:
    return bundle.file(bundle.manifest.targets[0].files[0])


def test_layers_are_found_by_their_weights() -> None:
    program = edgewise.capture(model(), (torch.randn(2, TOKENS, WIDTH),))
    compressed = edgewise.compress(program, "tome:r=3")
    assert sorted(layers(program.exported).values()) == sorted(LAYERS)
    assert layers(compressed.exported) == layers(program.exported)


def test_a_weight_of_scores_is_no_layer() -> None:
    """A parameter that scores tokens, a table that is looked up, and a layer that shares its weight with such a table."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.table = nn.Parameter(torch.randn(5, 8)), nn.Embedding(6, 8)
            self.both, self.plain = nn.Linear(8, 8), nn.Linear(8, 6)
            self.plain.weight = self.table.weight

        def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            attended = (self.query @ x.transpose(1, 2)).softmax(-1) @ x
            return self.plain(attended) + (self.both(self.table(i)) @ self.both.weight.t()).sum() + i.sum()

    program = edgewise.capture(Scores().eval(), (torch.randn(1, 7, 8), torch.zeros(1, 3, dtype=torch.int64)))
    assert set(layers(program.exported).values()) <= {"plain", "table"}
    assert len(layers(program.exported)) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_quantises_layers_alone(artifacts: Artifacts, precision: str) -> None:
    """Read from the artifact: weights in whole numbers are those of layers, and values are quantised in front of layers only."""
    import openvino

    read = openvino.Core().read_model(artifacts["openvino", precision][0])
    found, fakes = set(), 0
    for node in read.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" and node.get_element_type().to_string() in ("i8", "u8", "i4", "u4"):
            found |= {layer_of(user.get_friendly_name()) for user in readers(node)}
        if kind == "FakeQuantize":
            fakes += 1
            names = {layer_of(user.get_friendly_name()) for user in readers(node)}
            assert None not in names, node.get_friendly_name()
    assert sorted(found) == sorted(LAYERS)  # type: ignore[type-var]
    # One for every value that layers read; q, k and v are one layer here.
    assert fakes == (len(LAYERS) if precision == "w8a8" else 0)


def readers(node: object) -> list[object]:
    """What reads a value, through nodes that scale or move it."""
    through = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
    found = []
    for output in node.outputs():  # type: ignore[attr-defined]
        for port in output.get_target_inputs():
            user = port.get_node()
            found += readers(user) if user.get_type_name() in through else [user]
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_quantises_layers_alone(artifacts: Artifacts, precision: str) -> None:
    read = onnx.load(str(artifacts["onnxruntime", precision][0]))
    made = {output: node for node in read.graph.node for output in node.output}
    for node in read.graph.node:
        sources = [made[name].op_type if name in made else "" for name in node.input]
        if layer_of(node.name) is not None:
            assert sources[1] == "DequantizeLinear"
            assert (sources[0] == "DequantizeLinear") == (precision == "w8a8")
            assert "DequantizeLinear" not in sources[2:], "biases are not quantised"
        else:
            assert "DequantizeLinear" not in sources, node.name
    named = {layer_of(node.name) for node in read.graph.node} - {None}
    assert sorted(named) == sorted(LAYERS)  # type: ignore[type-var]


def noise(target: str, reference: list[Path], files: list[Path]) -> float:
    """Signal to noise of one artifact against another, in dB, on data that the calibration did not see."""
    other = np.random.default_rng(9).standard_normal((8, TOKENS, WIDTH)).astype(np.float32)
    results = []
    for one in (reference, files):
        with get(target).load(one) as session:
            results.append(np.concatenate([session.run({"x": other[i : i + 2]})["output"] for i in range(0, 8, 2)]))
    error = results[1] - results[0]
    return float(10 * np.log10((results[0] ** 2).sum() / (error**2).sum()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("precision", "least"), [("w8a16", 26), ("w8a8", 12), ("w4a16", 8)])
def test_outputs_are_near_those_of_floating_point(plain: Artifacts, target: str, precision: str, least: float) -> None:
    assert noise(target, plain[target, "fp32"], plain[target, precision]) > least


@pytest.mark.parametrize("target", TARGETS)
def test_the_ladder_keeps_quantisation_apart(bundles: dict[str, edgewise.Bundle], target: str) -> None:
    bundle = bundles[target]
    rungs = {rung.kind: rung for rung in bundle.manifest.verification}
    role = bundle.manifest.components[0].role
    assert rungs["lowering"].name == f"{target}/{role}/fp32" and rungs["lowering"].passed
    assert rungs["quantisation"].against == rungs["lowering"].name
    lowering, quantisation = (rungs[kind].outputs["output"].relative for kind in ("lowering", "quantisation"))
    assert lowering is not None and quantisation is not None and lowering < 1e-5 < 1e-3 < quantisation
    (checked,) = verify_bundle(bundle)
    assert checked.passed and checked.threshold is not None and checked.threshold < 3 * quantisation
    assert bundle.manifest.calibration is not None and bundle.manifest.calibration.samples == 24


@pytest.mark.parametrize("target", TARGETS)
def test_two_exports_are_byte_identical(bundles: dict[str, edgewise.Bundle], target: str, tmp_path: Path) -> None:
    again = export(tmp_path / "b", target, "w8a8")
    assert again.manifest == bundles[target].manifest  # which holds the digest of every file


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_layers_are_put_back_exactly(artifacts: Artifacts, target: str, precision: str) -> None:
    """The bytes of the layers that stay in floating point come back, and with all of them the numbers."""
    kinds = (precision, f"{precision} in part", f"{precision} floating")
    sizes = [sum(file.stat().st_size for file in artifacts[target, kind]) for kind in kinds]
    assert sizes == sorted(set(sizes))
    with get(target).load(artifacts[target, kinds[2]]) as one, get(target).load(artifacts[target, "fp32"]) as other:
        x = {"x": data()["x"][:2]}
        np.testing.assert_allclose(one.run(x)["output"], other.run(x)["output"], rtol=1e-5, atol=1e-5)


def test_layers_are_skipped_by_pattern(tmp_path: Path) -> None:
    made = export(tmp_path / "b", "onnxruntime", "w8a16", skip_quant=["*.down", "head"])
    record = made.manifest.targets[0].quantisation
    assert record is not None and record.skipped == ("blocks.0.down", "blocks.1.down", "head")
    with pytest.raises(InputError, match=r"matches 'blocks\.0\.dwn': did you mean 'blocks\.0\.down'"):
        skipped(LAYERS, ["blocks.0.dwn"], "onnxruntime")


def test_weights_are_rounded_to_the_nearest_code(artifacts: Artifacts) -> None:
    """Of the ONNX artifact, against the model's weights, by hand."""
    for precision, levels in (("w8a16", 127), ("w4a16", 7)):
        read = onnx.load(str(artifacts["onnxruntime", precision][0]))
        held = {one.name: onnx.numpy_helper.to_array(one).astype(np.float32) for one in read.graph.initializer}
        scales = {k: v for k, v in held.items() if k.startswith("quantised/") and k.endswith(".scale")}
        assert len(scales) == len(LAYERS)
        for name, scale in scales.items():
            code = held[name.removesuffix(".scale")]
            if code.shape[0] == CLASSES:  # a Gemm, whose weight is the other way round
                code, scale = code.T, scale.T
            layer = name.removeprefix("quantised/").removesuffix(".scale")
            wanted = model().get_parameter(f"{layer}.weight").detach().numpy().T
            blocks = code.shape[0] // scale.shape[0] if precision == "w4a16" else 1
            full = np.repeat(scale, blocks, axis=0) if precision == "w4a16" else scale[None]
            assert np.abs(code).max() == levels
            assert (np.abs(code * full - wanted) <= full * 0.5 + np.abs(wanted) * 2**-10).all()


def test_outliers_are_smoothed(plain: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loud channel would take seven of eight bits from all others, and does not."""
    from edgewise.targets import scales

    monkeypatch.setattr(scales, "STRENGTH", 0.0)
    files = get("onnxruntime").quantiser(plain["onnxruntime", "fp32"], "w8a8", samples()).write(tmp_path, "m")
    smooth, rough = (noise("onnxruntime", plain["onnxruntime", "fp32"], f) for f in (plain["onnxruntime", "w8a8"], files))
    assert smooth > rough + 3


@pytest.mark.parametrize("target", TARGETS)
def test_constant_data(artifacts: Artifacts, target: str, tmp_path: Path) -> None:
    """Inputs of nothing but zeros: an artifact that gives finite values."""
    given = samples({"x": np.zeros((2, TOKENS, WIDTH), np.float32)})
    files = get(target).quantiser(artifacts[target, "fp32"], "w8a8", given).write(tmp_path, "m")
    with get(target).load(files) as session:
        assert np.isfinite(session.run({"x": data()["x"][:2]})["output"]).all()


def test_a_metric_that_counts_errors_may_not_rise() -> None:
    harm = {"a": 0.01, "b": 0.5, "c": 0.0, "d": 0.06}

    def make(floating: object) -> Candidate:
        error = sum(cost for layer, cost in harm.items() if layer not in floating)  # type: ignore[operator]
        return Candidate(lambda probe: {"logits": np.array([[1.0, error]], np.float32)}, 100, lambda: 0.2 + error)

    found = keep_metric(list(harm), make, [None], 0.02, errors=True)
    assert [one.layer for one in found.floating] == ["b", "d"] and found.reference == 0.2
    assert found.before == pytest.approx(0.77) and found.after == pytest.approx(0.21)
    assert not keep_metric(list(harm), make, [None], 0.6, errors=True).floating


class TestAccuracyControl:
    """Layers as numbers: an artifact is right on as many samples as its layers in floating point allow."""

    def find(self, harm: dict[str, int], max_drop: float, count: int = 40) -> tuple[list[str], float]:
        ports = {"x": Port((1, 1), "float32")}
        source = open_source({"x": np.arange(count, dtype=np.float32)[:, None], "labels": np.zeros(count, np.int64)}, ports)
        held_out = survey(source, ports, range(count))

        def make(floating: object) -> Candidate:
            wrong = sum(cost for layer, cost in harm.items() if layer not in floating)  # type: ignore[operator]

            def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                right = feed["x"][0, 0] >= wrong
                return {"logits": np.array([[1.0, wrong / 100] if right else [0.0, 1.0]], np.float32)}

            return Candidate(run, 100, lambda: accuracy(run, held_out))

        found = keep_metric(list(harm), make, list(held_out.first(PROBES)), max_drop)
        return [one.layer for one in found.floating], found.after

    def test_nothing_is_put_back_where_the_metric_holds(self) -> None:
        assert self.find({"a": 0, "b": 1}, 0.03) == ([], 1 - 1 / 40)

    def test_the_most_sensitive_layers_are_put_back_and_no_more(self) -> None:
        assert self.find({"a": 1, "b": 8, "c": 2, "d": 4, "e": 0}, 0.08) == (["b", "d"], 1 - 3 / 40)
        assert self.find({"a": 1, "b": 8, "c": 2, "d": 4, "e": 0}, 0) == (["b", "d", "c", "a"], 1.0)

    def test_real_layers(self, tmp_path: Path) -> None:
        """At four bits the model errs on samples near the border of two classes; with no drop allowed, it does not."""
        given = {"calibration": data(300), "calibration_samples": 100, "max_drop": "0%", "compress": None}
        made = export(tmp_path / "b", "onnxruntime", "w4a16", **given)
        record = made.manifest.targets[0].quantisation
        assert record is not None and record.metric == "accuracy" and record.held_out == 200
        assert record.all_quantised is not None and record.all_quantised < 1 and record.unquantised == record.result == 1
        noises = [one.sqnr_db for one in record.floating]
        assert noises and noises == sorted(noises) and all(one.bytes > 0 for one in record.floating)  # type: ignore[type-var]
        read = onnx.load(str(artifact(made)))
        kinds = {output: node.op_type for node in read.graph.node for output in node.output}
        kept = {layer_of(n.name) for n in read.graph.node if layer_of(n.name) and kinds.get(n.input[1]) != "DequantizeLinear"}
        assert kept == {one.layer for one in record.floating}
        assert record.sensitivity[: len(record.floating)] == record.floating and len(record.sensitivity) == record.layers
        report = json.loads((tmp_path / "b" / "report.json").read_text())
        (known,) = report["quantisation"].values()
        assert [one["layer"] for one in known["sensitivity"]] == [one.layer for one in record.sensitivity]
        page = (tmp_path / "b" / "report.html").read_text()
        assert all(f">{one.layer}</text>" in page or one.layer[-47:] in page for one in record.sensitivity)

    @pytest.mark.parametrize("text", ["-1%", "100%", "1.5", "much", "nan"])
    def test_drops_that_are_none(self, text: str) -> None:
        with pytest.raises(InputError, match="the largest drop"):
            parse_drop(text)

    def test_a_drop_is_in_points(self) -> None:
        assert parse_drop("1%") == parse_drop(0.01) == parse_drop("0.01") == 0.01


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="w8a8 needs calibration data: give --calib SRC"):
        export(tmp_path / "b", "onnxruntime", "w8a8", calibration=None)
    with pytest.raises(InputError, match="no labels, and accuracy control measures an accuracy"):
        export(tmp_path / "b", "onnxruntime", "w8a16", calibration={"x": data()["x"]}, max_drop=0.01)
    with pytest.raises(InputError, match="target coreml quantises no layers one by one"):
        export(tmp_path / "b", "coreml", "w8a16", max_drop=0.01)
    wrong = {**data(), "labels": np.full(24, CLASSES)}
    with pytest.raises(InputError, match="the label 4, and the model has classes 0 to 3"):
        export(tmp_path / "b", "onnxruntime", "w8a16", calibration=wrong, max_drop=0.01)
    assert not (tmp_path / "b").exists()


def test_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    """A demo brings its own data; the table says what was quantised."""
    out = tmp_path / "b"
    said = cli("export", "demo:digits", "-o", out, "--target", "onnxruntime", "--compress", "tome:keep=0.5",
               "--precision", "w8a8", "--max-drop", "1%", "--skip-quant", "classifier", "--calib-samples", "32")  # fmt: skip
    assert said.code == 0, said.err
    assert "25 of 26 layers quantised, 1 left out as asked; accuracy on 328 held-out samples" in " ".join(said.out.split())
    recipe = (out / "recipe.yaml").read_text()
    assert "calibration: demo:digits" in recipe and "max_drop: 0.01" in recipe and "- classifier" in recipe
    cli("export", "demo:digits", "-o", tmp_path / "d", "--calib", "demo:digits").refused("takes no calibration data")
