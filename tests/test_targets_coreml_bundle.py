"""Bundles with Core ML packages: from the command line, from the cache, and in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from families import build
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.passes.legalise import Legalise

pytest.importorskip("coremltools")

SPEC = "topk@encoder.block[1]:keep=0.5"
FILES = ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("coreml") / "digits"
    edgewise.export("demo:digits", out, targets=["coreml"], compress=SPEC, precision="fp16")
    return out


def test_every_verb_takes_a_bundle_with_a_package(bundle: Path, cli: Cli) -> None:
    (artifact,) = edgewise.Bundle.open(bundle).manifest.targets
    assert list(artifact.files) == [f"coreml/vision_encoder.mlpackage/{name}" for name in FILES]
    (rung,) = cli("verify", bundle, "--json").document["verification"]
    assert rung["passed"] and 1e-5 < rung["outputs"]["logits"]["relative"] < 2e-2  # the arithmetic is of half precision
    assert cli("run", bundle, "--inputs", "demo:digits[0]").code == 0
    (measured,) = cli("bench", bundle, "--samples", "2", "--seconds", "0", "--json").document["measurements"]
    assert measured["target"] == "coreml" and measured["latency"]["n"] == 2


def test_a_package_comes_from_the_cache_as_it_was(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("lowered")

    monkeypatch.setattr("edgewise.targets.coreml.lower.lower", never)
    edgewise.export("demo:digits", tmp_path / "b", targets=["coreml"], compress=SPEC, precision="fp16")
    for path in [one for one in bundle.rglob("*") if one.is_file()]:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(bundle)).read_bytes()


@pytest.mark.parametrize("part", FILES)
def test_a_damaged_cache_is_made_anew(part: str, tmp_path: Path) -> None:
    from edgewise.exporter.cache import Cache

    def make(folder: Path) -> list[Path]:
        files = [folder / "m.mlpackage" / name for name in FILES]
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        return files

    cache = Cache(tmp_path / "cache")
    assert cache.fetch("key", tmp_path / "a", make)[1] is False
    files, found = cache.fetch("key", tmp_path / "b", make)
    assert found and [path.read_text() for path in files] == [Path(name).name for name in FILES]
    (tmp_path / "cache" / "key" / "m.mlpackage" / part).unlink()
    assert cache.fetch("key", tmp_path / "c", make)[1] is False


@pytest.mark.parametrize("target", ["coreml", "coreml-topk"])
@pytest.mark.parametrize("spec", ["tome@encoder.block[1]:r=9", "topk@encoder.block[1]:keep=0.5"])
def test_a_small_model_of_each_kind_of_op(target: str, spec: str, tmp_path: Path) -> None:
    """Both realisations, at batch 2: the ops that they leave are those that the target promises."""
    from edgewise.targets.coreml.package import Package

    model, inputs = build("vit", small=True)
    inputs = {k: torch.cat([v, v.flip(-1)]) for k, v in inputs.items()}
    bundle = edgewise.export(model, tmp_path / "b", example=inputs, targets=[target], compress=spec, cache=False)
    (rung,) = [rung for rung in bundle.manifest.verification if rung.name.startswith(f"{target}/")]
    assert all(errors.relative is not None and errors.relative <= 1e-5 for errors in rung.outputs.values())
    package = Package.open(bundle.file(bundle.manifest.targets[0].files[0]).parent)
    (block,) = package.model.mlProgram.functions["main"].block_specializations.values()
    ops = {op.type for op in block.operations}
    off = {"topk", "argsort", "gather", "gather_nd", "gather_along_axis", "scatter", "scatter_along_axis"} & ops
    assert (not off) if target == "coreml" else off


HALF = pytest.mark.parametrize("name", ["coreml", "coreai"])


def run_half(
    name: str, model: nn.Module, inputs: dict[str, Tensor], outputs: list[str], folder: Path
) -> dict[str, np.ndarray]:
    target = targets.get(name)
    target.check()
    program = Legalise(target.realisations)(torch.export.export(model, tuple(inputs.values()), strict=False)).program
    files = target.lower(program, folder, "m", precision="fp16", input_names=list(inputs), output_names=outputs)
    with target.load(files) as session:
        return session.run({name: value.numpy() for name, value in inputs.items()})


@HALF
def test_token_numbers_beyond_what_halves_tell_apart(name: str, tmp_path: Path) -> None:
    class Picked(nn.Module):
        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            return torch.ops.edgewise.take(x, kept, 1, 0)

    places = torch.arange(2100)
    x = torch.stack([places % 64, places // 64], -1)[None].float()
    kept = torch.tensor([[0, 7, 2051, 2052, 2061, 2099]])
    got = run_half(name, Picked(), {"x": x, "kept": kept}, ["tokens"], tmp_path)
    assert np.array_equal(got["tokens"], x[:, kept[0]].numpy())


@HALF
def test_the_largest_numbers_stay_finite_in_half_precision(name: str, tmp_path: Path) -> None:
    """Masks of the lowest finite number: multiplied by what is zero, chosen by products, and in a weight."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((1, 6, 4), torch.finfo(torch.float32).min).triu(2))

        def forward(self, x: Tensor, score: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
            bias = (1.0 - real[:, None, :]) * torch.finfo(torch.float32).min
            kept = torch.ops.edgewise.top_tokens(score, 3, 0)
            rows = torch.ops.edgewise.take(self.mask, kept, 1, 0)
            return (x @ x.transpose(1, 2) + bias).softmax(-1), (rows + x[:, :3, :4]).softmax(-1)

    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(1, 6, 8, generator=generator),
        "score": torch.tensor([[0.5, 3.0, 1.0, 2.0, 0.0, 1.5]]),
        "real": torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]),
    }
    expected = Masked()(*inputs.values())
    got = run_half(name, Masked(), inputs, ["all", "some"], tmp_path)
    for output, value in zip(("all", "some"), expected, strict=True):
        np.testing.assert_allclose(got[output], value.numpy(), atol=5e-3)
