"""Core ML packages at eight bits: what is quantised, the numbers against quantisation written out in torch, the same bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgewise
from edgewise.errors import InputError
from edgewise.passes.graph import MADE_BY
from edgewise.passes.legalise import Legalise
from edgewise.targets import get
from edgewise.targets.base import Lowering
from edgewise.targets.coreml.convert import quiet
from edgewise.targets.coreml.package import Package
from edgewise.targets.coreml.pt2e import observe, quantised
from edgewise.targets.coreml.weights import check_whole
from edgewise.targets.scales import smoothing

WIDTH, TOKENS, SAMPLES = 48, 16, 12
LAYERS = ["patches", "q", "k", "v", "out", "up", "down", "head"]


class Model(nn.Module):
    """A block over the patches of a picture. Three layers read one norm, a channel of which is far louder than the others, as
    transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH), nn.Linear(WIDTH, 24)
        with torch.no_grad():
            self.norm1.weight[3] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).reshape(b, n, 2, c // 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, n, c))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def pictures(count: int = SAMPLES) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 3, 32, 32)).astype(np.float32)


def export(out: Path, target: str = "coreml", **given: Any) -> edgewise.Bundle:
    given = {"calibration": {"x": pictures()}, "cache": False, "precision": "w8a8", **given}
    return edgewise.export(model(), out, example=(torch.from_numpy(pictures(1)),), targets=[target], **given)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    return export(tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> edgewise.Bundle:
    return export(tmp_path_factory.mktemp("half") / "b", precision="fp16", calibration=None)


def files(bundle: edgewise.Bundle) -> list[Path]:
    return [bundle.file(one) for one in bundle.manifest.targets[0].files]


def operations(bundle: edgewise.Bundle) -> list[Any]:
    function = Package.open(files(bundle)[0].parent).model.mlProgram.functions["main"]
    return list(function.block_specializations[function.opset].operations)


def read(op: Any, name: str) -> str:
    return str(op.inputs[name].arguments[0].name)


def outputs(target: str, artifact: list[Path], x: np.ndarray) -> np.ndarray:
    with get(target).load(artifact) as session:
        return np.concatenate([next(iter(session.run({"x": one[None]}).values())) for one in x])


def sqnr(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()))


@torch.no_grad()
def by_hand(x: np.ndarray, *, quantise: bool = True) -> np.ndarray:
    """The model with every layer's input and weight put on a grid of eight bits, in torch. Layers are smoothed as SmoothQuant
    says, those that read one value together."""
    made = model()
    layers = dict(made.named_modules())
    seen: dict[str, Tensor] = {}
    groups = [["patches"], ["q", "k", "v"], ["out"], ["up"], ["down"], ["head"]]

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            value = args[0].abs().amax([i for i in range(args[0].ndim) if i != (1 if name == "patches" else args[0].ndim - 1)])
            seen[name] = torch.maximum(seen[name], value) if name in seen else value

        return hook

    hooks = [layers[name].register_forward_pre_hook(watch(name)) for name in LAYERS]
    for one in pictures():
        made(torch.from_numpy(one[None]))
    for hook in hooks:
        hook.remove()
    for group in groups if quantise else ():
        largest = seen[group[0]]
        scale = torch.ones_like(largest)
        if group != ["patches"]:
            columns = torch.cat([layers[name].weight for name in group]).abs().amax(0)
            scale = (largest / columns).sqrt()
        step = (largest / scale).max() / 127
        for name in group:
            weight = layers[name].weight * (1 if name == "patches" else scale)
            rows = weight.abs().amax([i for i in range(weight.ndim) if i], keepdim=True) / 127
            layers[name].weight.copy_((weight / rows).round() * rows)

            by = 1 if name == "patches" else scale

            def grid(_: nn.Module, args: tuple[Tensor], step: Tensor = step, by: Any = by) -> Any:
                value = args[0] / by
                return ((value / step).round().clamp(-128, 127) * step,)

            layers[name].register_forward_pre_hook(grid)
    return np.concatenate([made(torch.from_numpy(one[None])).numpy() for one in x])


def test_numbers_are_those_of_the_arithmetic_by_hand(plain: edgewise.Bundle) -> None:
    """Half precision puts a value on the next step of the grid now and then; that is far below what the grid itself costs."""
    x = pictures()
    wanted, exact, found = by_hand(x), by_hand(x, quantise=False), outputs("coreml", files(plain), x)
    lost = sqnr(exact, wanted)
    assert 25 < lost < 45
    assert sqnr(wanted, found) > lost + 4
    assert abs(sqnr(exact, found) - lost) < 1.5


def test_layers_alone_are_quantised(plain: edgewise.Bundle) -> None:
    ops = operations(plain)
    made = {op.outputs[0].name: op for op in ops}
    layers = [op for op in ops if op.type in ("linear", "conv")]
    assert len(layers) == len(LAYERS) and plain.manifest.targets[0].quantisation.layers == len(LAYERS)  # type: ignore[union-attr]
    for op in layers:
        assert made[read(op, "x")].type == "dequantize" and made[read(op, "weight")].type == "constexpr_affine_dequantize"
    # Three layers read one value: it is quantised once.
    kinds = [op.type for op in ops]
    assert kinds.count("quantize") == kinds.count("dequantize") == len(LAYERS) - 2
    quantised = {op.outputs[0].name for op in ops if op.type == "dequantize"}
    users = [op.type for op in ops if any(a.name in quantised for i in op.inputs.values() for a in i.arguments)]
    assert set(users) == {"linear", "conv"}


def test_layers_that_are_left_out_compute_as_they_did(plain: edgewise.Bundle, half: edgewise.Bundle, tmp_path: Path) -> None:
    none = export(tmp_path / "none", skip_quant=["*"])
    x = pictures(3)
    np.testing.assert_array_equal(outputs("coreml", files(none), x), outputs("coreml", files(half), x))
    some = export(tmp_path / "some", skip_quant=["patches", "q"])
    record = some.manifest.targets[0].quantisation
    assert record is not None and record.skipped == ("patches", "q")
    kinds = [op.type for op in operations(some)]
    # `q` reads in half precision what `k` and `v` read in eight bits.
    assert kinds.count("constexpr_affine_dequantize") == len(LAYERS) - 2 and kinds.count("quantize") == len(LAYERS) - 3
    exact = by_hand(x, quantise=False)
    assert sqnr(exact, outputs("coreml", files(some), x)) > 20
    with pytest.raises(InputError, match="did you mean 'patches'"):
        export(tmp_path / "wrong", skip_quant=["patchs"])


def test_the_same_bytes_and_a_smaller_package(plain: edgewise.Bundle, half: edgewise.Bundle, tmp_path: Path) -> None:
    assert export(tmp_path / "again").manifest == plain.manifest
    weights = [next(one.stat().st_size for one in files(b) if one.name == "weight.bin") for b in (plain, half)]
    assert weights[0] < 0.62 * weights[1]


def test_a_compressed_program_is_quantised_in_its_layers_alone(tmp_path: Path) -> None:
    made = export(tmp_path / "b", "coreml-topk", compress="tome:keep=0.5")
    rungs = {rung.kind: rung for rung in made.manifest.verification}
    assert rungs["lowering"].name.endswith("/fp16") and rungs["lowering"].passed
    assert rungs["quantisation"].against == rungs["lowering"].name
    assert all(errors.sqnr_db is not None and errors.sqnr_db > 20 for errors in rungs["quantisation"].outputs.values())
    record = made.manifest.targets[0].quantisation
    assert record is not None and record.layers == [op.type for op in operations(made)].count("constexpr_affine_dequantize")


def of(module: nn.Module, *inputs: Tensor) -> Lowering:
    """A program that is to be quantised, with inputs `x`, `y`."""
    return Lowering(torch.export.export(module.eval(), inputs, strict=False), ["x", "y"][: len(inputs)], ["output"])


def test_silent_layers_stay_in_half_precision(tmp_path: Path) -> None:
    """Nothing can be learned of a layer that sees nothing but zeros, and a scale of zero would be no number."""
    zeros = [{"x": np.zeros((1, 3, 32, 32), np.float32)}] * 2
    quantiser = get("coreml").quantiser([], "w8a8", zeros, made_of=of(model(), torch.zeros(1, 3, 32, 32)))
    assert "patches" not in quantiser.layers and "(patches) are zero on all samples" in quantiser.notes[0]
    written = quantiser.write(tmp_path / "q", "m")
    assert np.isfinite(outputs("coreml", written, pictures(2))).all()


@pytest.mark.parametrize("large", [1e6, float("nan")])
def test_what_is_too_large_for_half_precision_is_said(large: float) -> None:
    feeds = [{"x": pictures(1)}, {"x": np.full((1, 3, 32, 32), large, np.float32)}, {"x": pictures(1)}]
    with pytest.raises(InputError, match="not finite on the calibration data"):
        get("coreml").quantiser([], "w8a8", feeds, made_of=of(model(), torch.zeros(1, 3, 32, 32)))


def test_smoothing_leaves_products_as_they_are() -> None:
    random = np.random.default_rng(0)
    x, weights = random.standard_normal((9, 5)) * [1, 100, 1e-3, 0, 3], [random.standard_normal((n, 5)) for n in (4, 7)]
    for weight in weights:
        weight[:, 4] = 0
    scale = smoothing(np.abs(x).max(0), weights)
    assert scale[3] == scale[4] == 1 and scale[1] > 1 > scale[2] > 0
    for weight in weights:
        np.testing.assert_allclose((x / scale) @ (weight * scale).T, x @ weight.T, atol=1e-9)
    spread = [np.ptp(np.log(np.abs(value).max(0)[:3])) for value in (x, x / scale)]
    assert spread[1] < 0.6 * spread[0]


@torch.no_grad()
@pytest.mark.parametrize("target", ["coreml", "coreml-ane", "coreml-ios18"])
def test_packages_compute_what_pt2e_made(target: str, tmp_path: Path) -> None:
    """In single precision a value is put on another step of the grid only where sums in another order pass half of one."""
    x, made_of = pictures(), of(model(), torch.zeros(1, 3, 32, 32))
    program = quantised(made_of.exported, observe(made_of.exported, [{"x": one[None]} for one in x], ["x"]), {})
    wanted = np.concatenate([program.module()(torch.from_numpy(one[None])).numpy() for one in x])
    named = {"input_names": ["x"], "output_names": ["output"]}
    written = get(target).lower(program, tmp_path, "m", precision="fp32", **named)  # type: ignore[arg-type]
    ops = get(target).ops(written)
    assert ops is not None and sum(n for name, n in ops.items() if name.startswith("constexpr")) == len(LAYERS)
    lost = sqnr(by_hand(x, quantise=False), wanted)
    assert sqnr(wanted, outputs(target, written, x)) > lost + 15
    assert 25 < lost < 45 and sqnr(by_hand(x), wanted) > lost + 4  # steps and smoothing are rounded as they are stored


def test_marks_of_compression_are_kept() -> None:
    """They tell what stays in single precision, and what no layout or rewriting may touch."""
    captured = edgewise.capture(model(), (torch.from_numpy(pictures(1)),))
    compressed = edgewise.compress(captured, "tome:keep=0.5").exported
    exported = Legalise(get("coreml").realisations)(compressed).program
    made = quantised(exported, observe(exported, [{"x": pictures(1)}], ["x"]), {})

    def marked(program: torch.export.ExportedProgram) -> Counter[tuple[str, Any]]:
        ops = (torch.ops.aten.matmul.default, torch.ops.aten.amax.default, torch.ops.aten.linear.default)
        return Counter((str(n.target), n.meta.get(MADE_BY)) for n in program.graph.nodes if n.target in ops)

    assert marked(made) == marked(exported) and {mark for _, mark in marked(made)} > {None}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 64, 5, padding="same", groups=2)
        self.volume = nn.Conv3d(4, 16, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (self.line(x).mean() + self.volume(y),)


class Tied(nn.Module):
    """One table is looked up, and is the weight of a layer that is used twice, on values of other ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 48)
        self.layer = nn.Linear(48, 48, bias=False)
        self.layer.weight = self.table.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.layer(self.layer(x) * 0.1), self.table(y)], 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Convolutions, Tied])
def test_other_layers(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = kind().eval()
    if kind is Tied:
        samples = [(torch.randn(2, 5, 48), torch.randint(0, 48, (2, 3))) for _ in range(8)]
    else:
        samples = [(torch.randn(2, 8, 19), torch.randn(2, 4, 6, 7, 8)) for _ in range(8)]
    feeds = [{"x": x.numpy(), "y": y.numpy()} for x, y in samples]
    quantiser = get("coreml").quantiser([], "w8a8", feeds, made_of=of(module, *samples[0]))
    assert quantiser.layers == (("layer",) if kind is Tied else ("line", "volume"))
    written = quantiser.write(tmp_path, "m")
    ops = get("coreml").ops(written)
    # A weight that is used twice is smoothed alike, and stored once.
    assert ops is not None and ops["quantize"] == 2 and ops["constexpr_affine_dequantize"] == (1 if kind is Tied else 2)
    with get("coreml").load(written) as session:
        found = np.stack([session.run(feed)["output"] for feed in feeds])
    wanted = np.stack([torch.utils._pytree.tree_leaves(module(*one))[0].numpy() for one in samples])
    assert 25 < sqnr(wanted, found) < 50
    if kind is Tied:  # what is looked up is not on a grid
        np.testing.assert_allclose(found[:, :, 5:], wanted[:, :, 5:], rtol=2**-11, atol=1e-7)


def test_a_dense_weight_of_a_quantised_layer_is_refused() -> None:
    import coremltools
    from coremltools.converters.mil.mil import Builder

    with quiet():

        @Builder.program(input_specs=[Builder.TensorSpec(shape=(2, 3, 64))], opset_version=coremltools.target.iOS17)
        def program(x: Any) -> Any:
            code = Builder.quantize(input=x, scale=np.float32(0.1), output_dtype="int8")
            read = Builder.transpose(x=Builder.dequantize(input=code, scale=np.float32(0.1)), perm=[1, 0, 2])
            return Builder.linear(x=read, weight=np.ones((32, 64), np.float32), name="layer")

        made = coremltools.convert(program, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS17,
                                   compute_precision=coremltools.precision.FLOAT32, skip_model_load=True)  # fmt: skip
        with pytest.raises(InputError, match=r"did not quantise .*weight.* as it was told"):
            check_whole(made)


def test_layers_that_eight_bits_would_spoil_or_that_are_none_are_named() -> None:
    """Scales are stored in half precision, which has few digits for small ones."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.small, self.product = nn.Linear(64, 64), nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64))
            self.small.weight.data[::2] *= 1e-4

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.fine.bias, self.small(self.fine(x)), self.product)

    feeds = [{"x": np.random.default_rng(i).standard_normal((4, 64)).astype(np.float32)} for i in range(2)]
    quantiser = get("coreml").quantiser([], "w8a8", feeds, made_of=of(Mixed(), torch.zeros(4, 64)))
    assert quantiser.layers == ("fine",)
    (note,) = quantiser.notes
    assert note.startswith("2 layers (small, product) stay in floating point")
    with pytest.raises(InputError, match="fine is of float64, and w8a8 is for float32"):
        get("coreml").quantiser([], "w8a8", feeds, made_of=of(Mixed().double(), torch.zeros(4, 64, dtype=torch.float64)))
