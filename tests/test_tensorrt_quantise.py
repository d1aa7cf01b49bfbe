"""The target `tensorrt` in 8 and 4 bits: where Q and DQ stand, in which types, how right the numbers are, and that it is built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Cli
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from tensorrt_cases import draw, lowered
from test_tensorrt import check_file, types
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.targets.base import layer_of
from edgewise.targets.tensorrt import rtx
from edgewise.verify.metrics import compare

WIDTH, EDGE = 64, 24
LAYERS = ["patches", "qkv", "out", "up", "down", "head"]


class Encoder(nn.Module):
    """Patches, one block with a loud channel, and a head of an odd number of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.norms[0].weight.data[3] = 30.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, n, c))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(x.mean(1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def images(count: int = 6, batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((count * batch, 3, EDGE, EDGE)).astype(np.float32)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, edgewise.Bundle]:
    """The encoder with half of its tokens merged; the engine of the 8-bit one."""
    made = {}
    for precision in ("w8a8", "w4a16"):
        given = {"calibration": images(), "devices": ["sm86"] if rtx.installed() else []} if precision == "w8a8" else {}
        made[precision] = edgewise.export(
            encoder(), tmp_path_factory.mktemp(precision) / "b", example=(torch.from_numpy(images()["x"][:2]),),
            targets=["tensorrt"], compress="tome:keep=0.5", precision=precision, cache=False, **given,
        )  # fmt: skip
    return made


def check_places(path: Path) -> int:
    """Q and DQ stand in front of layers and nowhere else: what computes scores, softmax, norms and choices reads and makes numbers
    in floating point, and so do the products of attention; biases have none. Gives how many layers have them."""
    graph, kind = onnx.load(path).graph, types(path)
    made = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            users.setdefault(name, []).append((node, place))
    assert not {value.name for value in graph.output} & {name for name, node in made.items() if "Linear" in node.op_type}
    whole = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4)
    quantised = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert kind[node.input[0]] in (TensorProto.FLOAT, TensorProto.FLOAT16) and kind[node.output[0]] == TensorProto.INT8
            assert [user.op_type for user, _ in users[node.output[0]]] == ["DequantizeLinear"]
        elif node.op_type == "DequantizeLinear":
            weight = node.input[0] not in made
            for user, place in users[node.output[0]]:
                assert layer_of(user.name) is not None and place == int(weight), f"{user.name} reads a dequantised value"
                quantised.add(user.name)
        else:
            assert not any(kind.get(name) in whole for name in (*node.input, *node.output)), node.name
            if layer_of(node.name) is None:  # softmax, norms, products of attention, and all that compression made
                assert not any(made[name].op_type == "DequantizeLinear" for name in node.input if name in made), node.name
    return len(quantised)


def artifact(bundle: edgewise.Bundle) -> Path:
    return bundle.file(bundle.manifest.targets[0].files[0])


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_layers_alone_are_quantised(bundles: dict[str, edgewise.Bundle], precision: str) -> None:
    path = artifact(bundles[precision])
    check_file(path)
    assert check_places(path) == len(LAYERS) - (precision == "w4a16")
    graph, kind = onnx.load(path).graph, types(path)
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    held = {layer_of(node.name): node for node in graph.node if layer_of(node.name)}
    assert set(held) == set(LAYERS)
    for node in graph.node:
        sources = [made[name].op_type if name in made else "" for name in node.input]
        name = layer_of(node.name)
        if name is None or (precision == "w4a16" and name == "patches"):
            assert "DequantizeLinear" not in sources, node.name
            continue
        assert "DequantizeLinear" not in sources[2:], "biases are not quantised"
        weight = made[node.input[1]]
        code, scale = (arrays[one] for one in weight.input)
        assert len(weight.input) == 2 and scale.dtype == np.float16
        axis = next(a.i for a in weight.attribute if a.name == "axis")
        block = next((a.i for a in weight.attribute if a.name == "block_size"), 0)
        if precision == "w4a16":
            assert kind[weight.input[0]] == TensorProto.INT4 and block in (64, 128)
            assert scale.size * block == code.size and made.get(node.input[0], node).op_type != "DequantizeLinear"
        else:
            assert code.dtype == np.int8 and np.abs(code.astype(int)).max() <= 127 and code.shape[axis] == scale.size
            assert len(set(np.abs(code.astype(int)).max(tuple(a for a in range(code.ndim) if a != axis)))) <= 2
            back = made[node.input[0]]
            forth = made[back.input[0]]
            assert (back.op_type, forth.op_type) == ("DequantizeLinear", "QuantizeLinear") and back.input[1:] == forth.input[1:]
            assert arrays[back.input[1]].shape == () and arrays[back.input[2]] == 0
    opset = {one.domain: one.version for one in onnx.load(path).opset_import}[""]
    assert opset == (21 if precision == "w4a16" else 20)
    told = " ".join(bundles[precision].manifest.notes)
    assert ("JetPack 7" in told and "patches" in told) == (precision == "w4a16")


@pytest.mark.parametrize("where", ["Softmax", "LayerNormalization", "legalise:", "insert-compression"])
def test_a_quantised_value_elsewhere_is_found(bundles: dict[str, edgewise.Bundle], where: str, tmp_path: Path) -> None:
    """The check itself: Q and DQ in front of one more node."""
    model = onnx.load(artifact(bundles["w8a8"]))
    kind = types(artifact(bundles["w8a8"]))
    index, node = next(
        (place, one) for place, one in enumerate(model.graph.node)
        if (one.op_type == where or one.name.startswith(where)) and kind.get(one.input[0]) == TensorProto.FLOAT
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "more.scale"))
    added = [
        onnx.helper.make_node("QuantizeLinear", [node.input[0], "more.scale", "edgewise.zero"], ["more.int8"], name="more.int8"),
        onnx.helper.make_node("DequantizeLinear", ["more.int8", "more.scale", "edgewise.zero"], ["more"], name="more"),
    ]
    node.input[0] = "more"
    for one in reversed(added):
        model.graph.node.insert(index, one)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(AssertionError, match="reads a dequantised value"):
        check_places(tmp_path / "m.onnx")


@pytest.mark.parametrize(("precision", "least"), [("w8a8", 20), ("w4a16", 8)])
def test_numbers(bundles: dict[str, edgewise.Bundle], precision: str, least: float) -> None:
    """Near those of torch in single precision, on data that the calibration did not see; and those of another evaluator."""
    x = np.random.default_rng(7).standard_normal((2, 3, EDGE, EDGE)).astype(np.float32)
    program = edgewise.compress(edgewise.capture(encoder(), (torch.from_numpy(x),)), "tome:keep=0.5")
    wanted = program.module()(torch.from_numpy(x)).detach().numpy()
    with targets.get("tensorrt").load([artifact(bundles[precision])], threads=1) as session:
        found = session.run({"x": x})["output"]
    errors = compare(wanted, found)
    assert errors.sqnr_db is not None and least < errors.sqnr_db < 60
    (other,) = ReferenceEvaluator(str(artifact(bundles[precision]))).run(None, {"x": x})
    errors = compare(found, other)
    assert errors.sqnr_db is None or errors.sqnr_db > least


def test_engines_are_built_of_what_is_shipped(bundles: dict[str, edgewise.Bundle]) -> None:
    if rtx.installed():
        files = bundles["w8a8"].manifest.targets[0].files
        assert [name.partition(".")[2] for name in files] == ["onnx", "sm86.engine", "sm86.engine.json"]
        rtx.check_engine(bundles["w8a8"].file(files[1]), "sm86", artifact(bundles["w8a8"]))
        assert rtx.build(artifact(bundles["w4a16"]), "sm86")[0].stat().st_size > 10_000


def test_what_half_precision_can_hardly_hold(tmp_path: Path) -> None:
    """Weights whose scales are below what half precision tells apart, rows of zeros, and activations near its end."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.first.weight.data[:8] *= 1e-5
            self.first.weight.data[8] = 0
            self.first.weight.data[9:] *= 3e3

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * 1e-3

    torch.manual_seed(0)
    x = draw(8, 64)
    exported = torch.export.export(Wide().eval(), (x,), strict=False)
    path = lowered(exported, tmp_path, "fp16")
    # The program that a target lowers names its layers by parameters, as that of an export does.
    feeds = _Feeds({"i0": x.numpy()})
    files = targets.get("tensorrt").quantiser([path], "w8a8", feeds).write(tmp_path / "q", "m")
    arrays = {one.name: numpy_helper.to_array(one) for one in onnx.load(files[0]).graph.initializer}
    assert all((value > 0).all() for name, value in arrays.items() if name.endswith(".scale"))
    with targets.get("tensorrt").load(files) as session:
        errors = compare(exported.module()(x).detach().numpy(), session.run({"i0": x.numpy()})["o0"])
    assert errors.relative is not None and errors.relative < 0.03


class _Feeds:
    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self.feed = feed

    def __len__(self) -> int:
        return 1

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield self.feed


class Masked(nn.Module):
    """Attention with a mask of its own, or with one that is given."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mask = given if self.mask is None else self.mask
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, c)


@pytest.mark.parametrize("kind", ["causal", "nothing to see", "given"])
def test_masks_do_not_stand_in_the_way(kind: str, tmp_path: Path) -> None:
    """Softmax is followed by the product at once; a query that may see no key gets zeros all the same, as in torch."""
    torch.manual_seed(0)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    if kind != "causal":
        mask[4] = False
    mask = mask.expand(2, 1, 9, 9)
    inputs = (draw(2, 9, 32),) if kind != "given" else (draw(2, 9, 32), mask)
    module = Masked(None if kind == "given" else mask).eval()
    exported = torch.export.export(module, inputs, strict=False)
    wanted = exported.module()(*inputs).detach().numpy()
    for precision, limit in (("fp32", 1e-5), ("fp16", 5e-3)):
        path = lowered(exported, tmp_path, precision, len(inputs))
        graph = onnx.load(path).graph
        (weights,) = (node.output[0] for node in graph.node if node.op_type == "Softmax")
        after = [node.op_type for node in graph.node if weights in node.input]
        assert "IsNaN" not in [node.op_type for node in graph.node] and after == ["MatMul" if precision == "fp32" else "Cast"]
        with targets.get("tensorrt").load([path]) as session:
            found = session.run({f"i{n}": value.numpy() for n, value in enumerate(inputs)})["o0"]
        errors = compare(wanted, found)
        assert errors.relative is not None and errors.relative <= limit
        assert kind == "causal" or not found[:, 4].any()
        if rtx.installed():
            assert rtx.build(path, "sm86")[0].stat().st_size > 1000


def test_a_demo_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "b"
    said = cli("export", "demo:digits", "--precision", "w8a8", "--target", "tensorrt", "--calib", "demo:digits", "--calib-samples",
               "32", "--compress", "tome:keep=0.5", "--skip-quant", "classifier", "-o", out)  # fmt: skip
    assert said.code == 0, said.err
    assert "25 of 26 layers quantised, 1 left out as asked" in " ".join(said.out.split())
    bundle = edgewise.Bundle.open(out)
    rungs = {rung.kind: rung for rung in bundle.manifest.verification}
    assert check_places(artifact(bundle)) == 25
    assert rungs["lowering"].name == "tensorrt/vision_encoder/fp16" == rungs["quantisation"].against and rungs["lowering"].passed
    assert cli("verify", out).code == 0


