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
