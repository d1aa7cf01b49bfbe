"""Fitted weights: better than their start and than pooling on unseen inputs, the same every time, and refused where they do not
belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from families import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edgewise
from edgewise import demos
from edgewise.errors import CheckFailed, EdgewiseError, InputError
from edgewise.exporter.compare import Data
from edgewise.exporter.fit import Fitted, fit
from edgewise.exporter.objective import SHARPNESS, Cover, Match
from edgewise.exporter.rest import Rest, outputs
from edgewise.exporter.sources import load_source
from edgewise.ops import METHODS, apply
from edgewise.ops.start import place_logits, windows
from edgewise.passes.program import Program

SITE = "encoder.block[0]"
LEARNER = f"token-learner@{SITE}:keep=4"


@pytest.fixture(scope="module")
def program() -> Program:
    source = load_source("demo:digits", batch=16)
    assert source.module is not None
    return edgewise.capture(source.module, source.args, source.kwargs)


def digits(first: int, count: int) -> Data:
    """Every other image of the split, from the even or the odd ones."""
    images = demos.split("digits").inputs["pixel_values"][first::2][:count]
    return Data("digits", {"pixel_values": images})


@pytest.fixture(scope="module")
def fitted(program: Program) -> Fitted:
    return fit(program, [LEARNER], digits(0, 80), samples=80, steps=60)


def error(program: Program, spec: str) -> float:
    """Of the scores, on images that nothing was fitted on, in units of their variance."""
    unseen = torch.from_numpy(digits(1, 64).inputs["pixel_values"]).split(16)
    with torch.no_grad():
        wanted = torch.cat([program.uncompressed().module()(pixel_values=x).logits for x in unseen])
        module = edgewise.compress(program, spec).module()
        found = torch.cat([module(pixel_values=x).logits for x in unseen])
    return float((found - wanted).square().mean() / wanted.var(0).mean())


def test_it_beats_its_start_and_pooling_on_unseen_data(program: Program, fitted: Fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path / "w.safetensors")
    save_file(fitted.start, tmp_path / "start.safetensors")
    found = error(program, fitted.spec_with(tmp_path / "w.safetensors"))
    start = error(program, f"{LEARNER},weights={tmp_path / 'start.safetensors'}")
    pool = error(program, f"pool@{SITE}:keep=4,kind=adaptive")
    assert found < 0.8 * min(start, pool), (found, start, pool)
    record = fitted.record
    assert record.after < 0.8 * record.before
    assert (record.samples, record.held_out, record.width, record.keep, record.steps) == (64, 16, 96, 4, 60)


def test_the_same_bytes_every_time(program: Program, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(program, [LEARNER], digits(0, 48), samples=48, steps=12, seed=seed).save(tmp_path / f"{name}.safetensors")
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


def test_time_only_cuts_the_steps(program: Program) -> None:
    cut = fit(program, [LEARNER], digits(0, 48), samples=48, steps=10_000, seconds=2)
    assert 0 < cut.record.steps < 10_000
    again = fit(program, [LEARNER], digits(0, 48), samples=48, steps=cut.record.steps)
    assert all(torch.equal(cut.weights[name], again.weights[name]) for name in cut.weights)
    assert cut.record == again.record


def test_the_bundle_tells_of_it_and_is_right(fitted: Fitted, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    fitted.save(file)
    bundle = edgewise.export("demo:digits", tmp_path / "b", targets=["openvino", "onnxruntime"],
                             compress=fitted.spec_with(file), cache=False)
    lowered = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    assert len(lowered) == 2 and all(rung.passed and rung.threshold == 1e-4 for rung in lowered)
    note = next(note for note in bundle.manifest.notes if "fitted" in note)
    assert "64 samples of digits" in note and "60 steps, seed 0" in note and "other weights" not in note
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["edgewise"]) == fitted.record.document
    assert fitted.record.model == bundle.manifest.model.weights_digest


# -- where tokens are what comes out


class Features(nn.Module):
    """The encoder of the demo model, which puts its tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = load_source("demo:digits").module.vit  # type: ignore[union-attr]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", ["token-learner@encoder.out:keep=4", "resampler@encoder.out:keep=4,heads=2"])
def test_full_tokens_are_read_back_better_than_from_pooled_ones(spec: str, tmp_path: Path) -> None:
    unseen = torch.from_numpy(digits(1, 32).inputs["pixel_values"]).split(16)
    program = edgewise.capture(Features(), (), {"pixel_values": unseen[0]})
    fitted = fit(program, [spec], digits(0, 80), steps=60)
    fitted.save(tmp_path / "w.safetensors")
    with torch.no_grad():
        full = [program.module()(pixel_values=x) for x in unseen]
        cover = Cover.of(full, 1, 1, 16)

        def loss(spec: str) -> float:
            module = edgewise.compress(program, spec).module()
            return sum(float(cover(module(pixel_values=x), y)) for x, y in zip(unseen, full, strict=True))

        assert loss(fitted.spec_with(tmp_path / "w.safetensors")) < 0.8 * loss("pool@encoder.out:keep=4,kind=adaptive")


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("vit", "resampler@encoder.block[1]:keep=0.25,heads=3"),  # three heads of 11 features, and 32 of the model
        ("whisper", "conv1d@encoder.out:kernel=3,stride=2,padding=1"),
        ("whisper", "token-learner@encoder.block[0]:keep=5"),
        ("whisper", "window-resampler@encoder.block[1]:window=7,heads=4"),
        ("videomae_classifier", "frame-resampler@encoder.block[1]:keep=6,heads=4"),
    ],
)
def test_other_models_with_a_batch_of_one(family: str, spec: str, tmp_path: Path) -> None:
    model, inputs = build(family, small=True)
    ((name, example),) = inputs.items()
    program = edgewise.capture(model, (), {name: example[:1]})
    generator = torch.Generator().manual_seed(5)
    patterns, shares = torch.randn(6, *example.shape[1:], generator=generator), torch.randn(32, 6, generator=generator)
    data = Data("patterns", {name: torch.einsum("np,p...->n...", shares, patterns).numpy()})
    fitted = fit(program, [spec], data, samples=32, steps=30)
    assert fitted.record.after < 0.97 * fitted.record.before
    assert not any(torch.equal(fitted.weights[key], start) for key, start in fitted.start.items())
    fitted.save(tmp_path / "w.safetensors")
    compressed = edgewise.compress(program, fitted.spec_with(tmp_path / "w.safetensors"))
    assert compressed.steps[0].fitted == fitted.record


def test_cover_against_numpy() -> None:
    rng = np.random.default_rng(0)
    full, few = rng.normal(size=(3, 2, 7, 5)).astype(np.float32), rng.normal(size=(2, 4, 5)).astype(np.float32)
    cover = Cover.of([torch.from_numpy(batch) for batch in full], 1, 1, 2)
    x, z, scale = full[0][:, 1:], few[:, 1:], full[:, :, 1:].reshape(-1, 5).std(0)
    distance = (((x / scale)[:, :, None] - (z / scale)[:, None]) ** 2).sum(-1)
    weight = np.exp(-distance / 2 * SHARPNESS / 5)
    read = weight / weight.sum(-1, keepdims=True) @ z
    means = full[:, :, 1:].mean(2).reshape(-1, 5)
    wanted = [
        (((x - read) / scale) ** 2).mean(),
        ((z.mean(1) - x.mean(1)) ** 2 / means.var(0)).mean(),
        ((few[:, :1] - full[0][:, :1]) ** 2 / full[:, :, :1].reshape(-1, 5).var(0)).mean(),
    ]
    assert float(cover(torch.from_numpy(few), torch.from_numpy(full[0]))) == pytest.approx(np.mean(wanted), rel=1e-4)


def test_match_against_numpy() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(3, 4, 6)).astype(np.float32) * np.array([1, 2, 3, 1e-6, 1, 1], np.float32)
    match = Match.to([torch.from_numpy(t) for t in targets], 4)
    assert match is not None
    variance = targets.reshape(-1, 6).var(0)
    variance = np.maximum(variance, 0.01 * variance.mean())
    value = rng.normal(size=(4, 6)).astype(np.float32)
    wanted = ((value - targets[1]) ** 2 / variance).mean()
    assert float(match(torch.from_numpy(value), torch.from_numpy(targets[1]))) == pytest.approx(wanted, rel=1e-4)
    assert Match.to([torch.full((4, 6), 3.0)] * 3, 4) is None


# -- the start, and the program cut in two


def test_windows_are_adaptive_pooling() -> None:
    x = torch.randn(2, 36, 3)
    for keep, cells in ((4, (2, 2)), (6, (2, 3)), (9, (3, 3)), (36, (6, 6))):
        wanted = nn.functional.adaptive_avg_pool2d(x.transpose(1, 2).reshape(2, 3, 6, 6), cells).flatten(2).transpose(1, 2)
        torch.testing.assert_close(windows(36, keep, (6, 6)) @ x, wanted)
    wanted = nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 13).transpose(1, 2)
    for grid in (None, (6, 6), (5, 5)):  # thirteen cells are no grid
        torch.testing.assert_close(windows(36, 13, grid) @ x, wanted)


@pytest.mark.parametrize("name", ["token-learner", "resampler"])
def test_the_start_pools_where_features_tell_the_place(name: str) -> None:
    place = torch.eye(36).expand(8, -1, -1)
    x = torch.cat([place * 3, torch.randn(8, 36, 12, generator=torch.Generator().manual_seed(0))], dim=2)
    begin = METHODS[name].start
    assert begin is not None
    weights = {key: weight.value for key, weight in begin(x, 4, (6, 6), {"heads": 2}).items()}
    more = {"heads": 2} if name == "resampler" else {}
    found = apply(name, x, keep=4, weights=weights, **more).tokens
    wanted = apply("pool", x, keep=4, kind="adaptive", grid=(6, 6)).tokens
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(
    ("name", "known", "pool", "pooled"),
    [
        ("frame-resampler", {"frames": 4}, "frame-pool", {"frames": 4}),
        ("window-resampler", {"window": 17}, "avgpool1d", {"kernel": 17, "stride": 17}),
        ("window-resampler", {"window": 12, "tail": "pad"}, "avgpool1d", {"kernel": 12, "stride": 12}),
    ],
)
def test_the_start_of_one_query_is_the_mean(name: str, known: dict[str, Any], pool: str, pooled: dict[str, Any]) -> None:
    x = torch.randn(3, 36, 10, generator=torch.Generator().manual_seed(0))
    begin, wanted = METHODS[name].start, apply(pool, x, **pooled).tokens
    assert begin is not None
    keep = 3 if "tail" in known else wanted.shape[1]
    parameters = {**known, "per_frame": 1, "per_window": 1, "heads": 4}
    weights = {key: weight.value for key, weight in begin(x, keep, None, parameters).items()}
    found = apply(name, x, weights=weights, heads=4, **known).tokens
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert bool(weights["k.weight"].any())  # else no query would ever have a gradient


def test_the_start_pools_the_grid_of_each_frame() -> None:
    place = torch.eye(36).repeat(3, 1).expand(8, -1, -1)
    x = torch.cat([place * 3, torch.randn(8, 108, 12, generator=torch.Generator().manual_seed(0))], dim=2)
    begin = METHODS["frame-resampler"].start
    assert begin is not None
    weights = {key: weight.value for key, weight in begin(x, 12, (3, 6, 6), {"heads": 2, "per_frame": 4}).items()}
    found = apply("frame-resampler", x, keep=12, frames=3, weights=weights, heads=2).tokens
    wanted = apply("pool", x, keep=12, kind="adaptive", grid=(3, 6, 6)).tokens
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_tokens_that_are_all_alike_have_a_start() -> None:
    assert bool(place_logits(torch.ones(2, 9, 4), windows(9, 3, None)).isfinite().all())


def test_the_two_parts_are_the_program(program: Program, fitted: Fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path / "w.safetensors")
    compressed = edgewise.compress(program, "tome:r=8", fitted.spec_with(tmp_path / "w.safetensors"))
    names = [node.name for node in compressed.exported.graph.nodes if node.op == "placeholder" and "weight" in node.name]
    constants = {n: t for n, t in compressed.exported.constants.items() if n in names}
    assert len(constants) == 2
    x = torch.from_numpy(digits(1, 16).inputs["pixel_values"])
    rest = Rest(compressed.exported, compressed.output_names, list(constants))
    border = rest.first({"pixel_values": x})
    with torch.no_grad():
        wanted = compressed.module()(pixel_values=x).logits
    torch.testing.assert_close(rest.second(border, constants)["logits"], wanted)
    torch.testing.assert_close(outputs(compressed.exported, compressed.output_names, {"pixel_values": x})["logits"], wanted)


# -- what is refused


class Classes(nn.Module):
    """The demo model with class numbers, or a share of them, instead of scores."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        source = load_source("demo:digits")
        self.model, self.read = source.module, read

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.read(self.model(pixel_values).logits)  # type: ignore[misc]


@pytest.mark.parametrize("read", [lambda s: s.argmax(-1), lambda s: s.round(), lambda s: s * 0 + 1])
def test_a_model_that_teaches_nothing(read: Callable[[Tensor], Tensor]) -> None:
    example = torch.from_numpy(digits(0, 16).inputs["pixel_values"])
    program = edgewise.capture(Classes(read), (), {"pixel_values": example})
    with pytest.raises(InputError, match="nothing can teach"):
        fit(program, [LEARNER], digits(0, 32))


def changed(**arrays: Any) -> Data:
    return Data("d", {**digits(0, 32).inputs, **arrays})


@pytest.mark.parametrize(
    ("specs", "data", "known", "message"),
    [
        ([], None, {}, "nothing to fit: give --compress"),
        (["tome:r=8"], None, {}, "tome has no weights: conv1d, frame-resampler, resampler, token-learner, window-resampler have"),
        ([LEARNER, f"resampler@{SITE}:keep=4"], None, {}, "both want weights"),
        ([f"{LEARNER},weights=x.safetensors"], None, {}, "from a file already"),
        ([f"token-learner@{SITE}"], None, {}, "give keep="),
        ([f"token-learner@{SITE}:keep=1.0"], None, {}, "keeps every token"),
        (["token-learner@encoder.block[0,1]:keep=0.1"], None, {}, "2 sites"),
        (["token-learner@encoder.out:keep=4"], None, {}, "reads any token but the protected"),
        ([LEARNER], digits(0, 15), {}, "15 samples: a fit takes 16 or more"),
        ([LEARNER], digits(0, 16), {}, "two batches"),
        ([LEARNER], Data("d", {}), {}, "no array for the input 'pixel_values'"),
        ([LEARNER], changed(pixel_values=np.zeros((32, 1, 8, 8), np.float32)), {}, "samples of shape"),
        ([LEARNER], changed(pixel_values=np.full((32, 1, 56, 56), np.nan, np.float32)), {}, "NaN or infinity"),
        ([LEARNER], changed(pixel_values=np.ones((32, 1, 56, 56), np.float32)), {}, "inputs are the same"),
        ([LEARNER], changed(pixel_values=np.full((32, 1, 56, 56), "a")), {}, "the model takes float32"),
        ([LEARNER], None, {"steps": 0}, "1 step or more"),
        ([LEARNER], None, {"samples": 3}, "16 samples or more"),
        ([LEARNER], None, {"seconds": 0.0}, "some time"),
        ([LEARNER], None, {"seed": -1}, "seed=-1 is negative"),
    ],
)
def test_what_cannot_be_fitted(program: Program, specs: list[str], data: Data | None, known: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgewiseError, match=message) as caught:
        fit(program, specs, data or digits(0, 32), **known)
    assert caught.value.exit_code == 2


def test_no_better_than_the_start_is_a_failed_check(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.exporter import fit as module

    monkeypatch.setattr(module, "RATE", 1e4)
    with pytest.raises(CheckFailed, match="no better on 16 held-out samples"):
        fit(program, [LEARNER], digits(0, 32), steps=5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"resampler@{SITE}:keep=4", "fitted for token-learner, and this is resampler"),
        ("token-learner@encoder.block[2]:keep=4", r"fitted for encoder.block\[0\]"),
        (f"token-learner@{SITE}:keep=5", "trained for keep=4"),
    ],
)
def test_files_for_something_else(program: Program, fitted: Fitted, tmp_path: Path, spec: str, message: str) -> None:
    fitted.save(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message):
        edgewise.compress(program, f"{spec},weights={tmp_path / 'w.safetensors'}")


def test_files_of_another_width_model_or_parameter(fitted: Fitted, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    fitted.save(file)
    model, inputs = build("vit_classifier", small=True)
    with pytest.raises(InputError, match="for tokens of 96 features, and these have 32"):
        edgewise.compress(edgewise.capture(model, (), inputs), f"{LEARNER},weights={file}")
    with pytest.raises(ValueError, match="heads=8, and heads=4"):
        replace(fitted.record, parameters={"heads": 8}).check("token-learner", SITE, {"heads": 4})
    assert "other weights" in fitted.record.note("0" * 64)


@pytest.mark.parametrize("text", ["{", "[]", '{"method": "token-learner"}', '{"method": 1}', "null"])
def test_a_damaged_record(program: Program, fitted: Fitted, tmp_path: Path, text: str) -> None:
    save_file(fitted.weights, tmp_path / "w.safetensors", {"edgewise": text})
    with pytest.raises(InputError, match="what it says of its fit cannot be read"):
        edgewise.compress(program, f"{LEARNER},weights={tmp_path / 'w.safetensors'}")


# -- the command line


def test_the_verb(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    known = ("fit", "demo:digits", "--calib", "demo:digits", "--samples", 32, "--steps", 12, "--quiet", "--json")
    said = cli(*known, "--compress", LEARNER, "-o", file)
    assert said.code == 0, said.err
    document = said.document
    assert document["compress"] == [f"{LEARNER},weights={file}"] and document["after"] < document["before"]
    assert set(load_file(file)) == {"in.weight", "in.bias", "out.weight"}
    before = file.read_bytes()
    cli(*known, "--compress", LEARNER, "-o", file, "--calib", "demo:speech").refused("pixel_values", "demo:speech")
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("no place for the weights",)),
        (("-o", "w.safetensors"), ("no calibration data", "--calib")),
        (("-o", "w.bin", "--calib", "demo:digits"), (".safetensors file",)),
        (("-o", "no/w.safetensors", "--calib", "demo:digits"), ("there is no folder no",)),
        (("-o", "a,b.safetensors", "--calib", "demo:digits"), ("cannot hold this name",)),
        (("-o", "w.safetensors", "--calib", "demo:digits"), ("nothing to fit",)),
        (("-o", "w.safetensors", "--calib", "no.npz", "--compress", LEARNER), ("no.npz does not exist",)),
    ],
)
def test_bad_command_lines(cli: Cli, args: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
                           tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cli("fit", "demo:digits", *args).refused(*words)
    assert not list(tmp_path.iterdir())
