"""Programs as Core AI models, run by Apple's runtime on this machine, and beside the Core ML interpreter."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from tiny_programs import CASES, Case, Unknown, case
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.errors import InputError
from edgewise.verify import compare

pytest.importorskip("coreai_torch")

FITTING = ("block", "masked_block", "odd", "convolutions", "in_place")


def program(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


def lowered(one: Case, folder: Path, precision: str = "fp32") -> list[Path]:
    names = {"input_names": one.input_names, "output_names": one.output_names}
    return targets.get("coreai").lower(one.exported, folder, "m", precision=precision, **names)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("fp16", 1e-2)])
@pytest.mark.parametrize("name", FITTING)
def test_the_model_computes_the_program(
    name: str, precision: str, most: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = program(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with targets.get("coreai").load(lowered(one, tmp_path, precision)) as session:
            outputs = session.run(one.feeds)
            again = session.run(one.feeds)
    assert capfd.readouterr() == ("", "")
    assert list(outputs) == one.output_names
    for key, expected in one.expected.items():
        assert (outputs[key].shape, outputs[key].dtype) == (expected.shape, expected.dtype)
        errors = compare(expected, outputs[key])
        assert errors.relative is not None and errors.relative <= most
        assert np.array_equal(outputs[key], again[key])


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("fp16", 1e-2)])
@pytest.mark.parametrize("spec", ["tome@encoder.block[1]:r=9", "topk@encoder.block[1]:keep=0.5"])
def test_a_compressed_model_agrees_with_the_core_ml_interpreter(
    spec: str, precision: str, most: float, tmp_path: Path
) -> None:
    model, inputs = build("vit", small=True)
    bundle = edgewise.export(
        model,
        tmp_path / "b",
        example=inputs,
        targets=["coreai", "coreml"],
        compress=spec,
        precision=precision,
        cache=False,
    )
    assert all(rung.passed is not False for rung in bundle.manifest.verification)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    results = []
    for target in ("coreai", "coreml"):
        with edgewise.load(bundle, target=target) as session:
            results.append(session.run(feeds))
    for name, value in results[0].items():
        errors = compare(results[1][name], value)
        assert errors.relative is not None and errors.relative <= most


class Spread(nn.Module):
    """Deviations, of which coreai-torch has no rule; `vidcom2` needs them."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.var(1), x.std((0, 2), keepdim=True), x.var(), x.var(-1, correction=0), torch.var_mean(x, 1)[0]


def test_deviations(tmp_path: Path) -> None:
    one = case(Spread(), torch.randn(2, 5, 3) + 4)
    with targets.get("coreai").load(lowered(one, tmp_path)) as session:
        outputs = session.run(one.feeds)
    for name, expected in one.expected.items():
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-5)


def test_half_precision_halves_weights_and_ports(tmp_path: Path) -> None:
    one = program("block")
    made = [lowered(one, tmp_path / name, name) for name in ("fp32", "fp16")]
    full, half = (sum(path.stat().st_size for path in files if path.suffix == ".mlirb") for files in made)
    assert half < 0.75 * full


class Weighted(nn.Module):
    """Layers, one of them with an output of zeros and one whose inputs no block divides, and a table that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.up, self.down = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 256), nn.Linear(256, 64)
        self.places = nn.Buffer(torch.arange(64.0 * 64).reshape(64, 64) / 2**10)
        with torch.no_grad():
            self.up.weight[3] = 0
            self.up.weight[4] *= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.down(torch.relu(self.up(x))) @ self.places


def stored(weight: Tensor, bits: int) -> Tensor:
    """The weight as symmetric whole numbers leave it: one scale for each output, or for 32 inputs of it at 4 bits."""
    block = 32 if bits == 4 and weight.shape[1] % 32 == 0 else weight.shape[1]
    most = 7 if bits == 4 and block == 32 else 127
    made = weight.clone()
    for row in made:
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = float(np.float16(float(part.abs().max()) / most)) or 1.0
            part.copy_((part / scale).round().clamp(-most, most) * scale)
    return made


@pytest.mark.parametrize(("precision", "bits", "share"), [("w8a16", 8, 0.55), ("w4a16", 4, 0.4)])
def test_weights_of_layers_alone_are_stored_in_few_bits(precision: str, bits: int, share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Weighted().eval()
    one = case(model, torch.randn(2, 3, 16, 16))
    files = lowered(one, tmp_path / precision, precision)
    half = lowered(one, tmp_path / "fp16", "fp16")
    assert sum(f.stat().st_size for f in files) < share * sum(f.stat().st_size for f in half)
    for layer in (model.patches, model.up, model.down):
        layer.weight.data = stored(layer.weight.data, bits)
    with torch.no_grad():
        expected = model(torch.from_numpy(next(iter(one.feeds.values())))).numpy()
    with targets.get("coreai").load(files) as session:
        (found,) = session.run(one.feeds).values()
    errors = compare(expected, found)
    assert errors.relative is not None and errors.relative <= 5e-3
    (name,) = one.expected
    assert compare(one.expected[name], expected).relative > 5e-3 or bits == 8  # type: ignore[operator]


def test_a_compressed_model_of_few_bits_passes_its_checks(tmp_path: Path) -> None:
    model, inputs = build("vit", small=True)
    spec = "tome@encoder.block[1]:r=9"
    bundle = edgewise.export(model, tmp_path / "b", example=inputs, targets=["coreai"], compress=spec, precision="w4a16")
    assert [rung.passed for rung in bundle.manifest.verification if rung.kind == "lowering"] == [True]


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    """In one process: the compiler names weights by hashes that it seeds anew in each."""
    first = lowered(program("block"), tmp_path / "a")
    lowered(program("in_place"), tmp_path / "c")
    assert [path.name for path in first] == ["metadata.json", "main.hash", "main.mlirb"]
    for path, again in zip(first, lowered(program("block"), tmp_path / "b"), strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes() and b".py" not in path.read_bytes()


def test_an_op_without_a_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target coreai cannot lower this program: .*bessel_j0"):
        lowered(case(Unknown(), torch.randn(3)), tmp_path)
    with pytest.raises(InputError, match=r"aten\.sort\.stable"):
        lowered(program("merge"), tmp_path)


@pytest.mark.parametrize("damage", ["missing", "noise", "cut", "foreign"])
def test_a_damaged_model_does_not_reach_the_runtime(damage: str, tmp_path: Path) -> None:
    files = lowered(program("in_place"), tmp_path)
    part = next(path for path in files if path.suffix == ".mlirb")
    if damage == "missing":
        part.unlink()
    elif damage == "foreign":
        files[0].write_text("{}")
    else:
        part.write_bytes(b"\xff" * 500 if damage == "noise" else part.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot load"):
        targets.get("coreai").load(files)


def test_numbers_beyond_the_model_s_range_and_closed_sessions_are_refused(tmp_path: Path) -> None:
    one = program("odd")
    session = targets.get("coreai").load(lowered(one, tmp_path))
    with pytest.raises(InputError, match="beyond the range of int32"):
        session.run({**one.feeds, "i2": np.array([2**40, 0, 0, 0])})
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(one.feeds)
