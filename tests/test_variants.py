"""Several compressions as the functions of one artifact: each gives what it gave alone, and weights are there once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from tiny_encoder import Encoder

import edgewise
from edgewise import targets
from edgewise.bench import bench
from edgewise.bench.ratios import nearest
from edgewise.errors import CheckFailed, InputError
from edgewise.exporter.variant_specs import parse_variants
from edgewise.targets.coreml.package import HEADER, Package

pytest.importorskip("coremltools")

HALF, LESS = "tome:keep=0.5", "tome:keep=0.75"


def wide(blocks: int = 2, width: int = 160) -> tuple[torch.nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(blocks, width).eval(), torch.randn(1, 3, 32, 32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("variants") / "b"
    module, image = wide()
    edgewise.export(module, out, example=(image,), targets=["coreml"], precision="fp16", compress=LESS,
                    compress_variants=[HALF, "all=none"])  # fmt: skip
    return out


def package_of(bundle: Path) -> Path:
    (name,) = {one.files for one in edgewise.Bundle.open(bundle).manifest.targets}
    return (bundle / name[0]).parent


def blobs(package: Path, function: str) -> set[int]:
    """Where the weights of a function lie."""
    found: set[int] = set()

    def walk(message: Any) -> None:
        for field, value in message.ListFields():
            if field.message_type is None:
                continue
            entries = field.message_type.GetOptions().map_entry
            for one in value.values() if entries else value if hasattr(value, "add") else [value]:
                if not hasattr(one, "ListFields"):
                    continue
                if one.DESCRIPTOR.name == "BlobFileValue":
                    found.add(one.offset)
                walk(one)

    walk(Package.open(package).model.mlProgram.functions[function])
    return found


def unshared(package: Path, function: str, other: str) -> float:
    """Bytes of weights that a function alone has / those of another."""
    data = next(package.rglob("weight.bin")).read_bytes()
    size = {at: HEADER.unpack_from(data, at)[2] for name in (function, other) for at in blobs(package, name)}
    own = blobs(package, function) - blobs(package, other)
    return sum(size[at] for at in own) / sum(size[at] for at in blobs(package, other))


def test_each_function_computes_its_own_program(bundle: Path) -> None:
    """The golden outputs are those of the compressed programs in torch."""
    opened = edgewise.Bundle.open(bundle)
    assert [one.function for one in opened.manifest.targets] == ["main", "tome_keep_0_5", "all"]
    outputs = {}
    for artifact in opened.manifest.targets:
        golden = opened.golden(artifact.role)
        with edgewise.load(opened, function=artifact.function) as session:
            outputs[artifact.function] = session.run(golden.feeds(0))["output"]
        far = np.abs(outputs[artifact.function] - golden.outputs["output"][0]).max() / np.abs(golden.outputs["output"][0]).max()
        assert far < 5e-3
    assert not np.array_equal(outputs["main"], outputs["tome_keep_0_5"])
    module, _ = wide()
    with torch.no_grad():
        plain = module(torch.from_numpy(opened.golden("vision_encoder.all").inputs["image"][0])).numpy()
    assert np.abs(outputs["all"] - plain).max() / np.abs(plain).max() < 5e-3


def test_the_manifest_tells_every_variant(bundle: Path) -> None:
    manifest = edgewise.Bundle.open(bundle).manifest
    main, half, whole = manifest.components
    assert (main.role, half.role, whole.role) == ("vision_encoder", "vision_encoder.tome_keep_0_5", "vision_encoder.all")
    assert (main.variant_of, half.variant_of, whole.variant_of) == (None, "vision_encoder", "vision_encoder")
    assert (main.compress, half.compress, whole.compress) == ((LESS,), (HALF,), ())
    assert half.sites[-1].tokens_out < main.sites[-1].tokens_out and whole.sites == ()
    assert half.flops_after < main.flops_after < whole.flops_after == main.flops_before
    joined = [rung for rung in manifest.verification if rung.name.endswith(", as a function")]
    assert len(joined) == 3 and all(rung.passed and rung.threshold == 0 for rung in joined)
    assert any("which share weights" in note for note in manifest.notes)


def test_weights_are_there_once(bundle: Path) -> None:
    package = package_of(bundle)
    size = sum(path.stat().st_size for path in package.rglob("weight.bin"))
    for function in ("tome_keep_0_5", "all"):
        assert unshared(package, function, "main") < 0.05
    data = next(package.rglob("weight.bin")).read_bytes()
    main = sum(HEADER.unpack_from(data, at)[2] for at in blobs(package, "main"))
    assert size < 1.1 * main


def test_coremltools_opens_the_package(bundle: Path) -> None:
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(package_of(bundle)), skip_model_load=True)
    spec = model.get_spec()
    assert spec.description.defaultFunctionName == "main" and spec.specificationVersion == 9
    assert [one.name for one in spec.description.functions] == ["main", "tome_keep_0_5", "all"]
    program = load(spec, specification_version=9, file_weights_dir=model.weights_dir)
    assert sorted(program.functions) == ["all", "main", "tome_keep_0_5"]


def test_quantised_weights_are_shared_though_statistics_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smoothing folds the ranges of activations, which compression changes, into weights."""
    from edgewise.targets.coreml.quantise import CoreMLQuantiser

    module, image = wide()
    data = {"image": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).numpy()}

    def made(name: str) -> Path:
        edgewise.export(module, tmp_path / name, example=(image,), targets=["coreml"], precision="w8a8", compress=LESS,
                        compress_variants=HALF, calibration=data)  # fmt: skip
        return package_of(tmp_path / name)

    assert unshared(made("a"), "tome_keep_0_5", "main") < 0.1
    monkeypatch.setattr(CoreMLQuantiser, "follow", lambda self, other: None)
    assert unshared(made("b"), "tome_keep_0_5", "main") > 0.3


def test_verbs_take_one_function(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    label = "coreml/vision_encoder.tome_keep_0_5/fp16"
    np.savez(tmp_path / "x.npz", image=np.ones((1, 3, 32, 32), np.float32))
    ran = cli("run", bundle, "--function", "tome_keep_0_5", "--inputs", tmp_path / "x.npz", "--json")
    assert ran.document["role"] == "vision_encoder.tome_keep_0_5"
    (rung,) = cli("verify", bundle, "--function", "tome_keep_0_5", "--json").document["verification"]
    assert rung["name"] == label and rung["passed"]
    shown = cli("inspect", bundle, "--function", "tome_keep_0_5", "--json").document["manifest"]
    assert [one["compress"] for one in shown["components"]] == [[HALF]] and shown["compress"] == [HALF]
    names = [rung["name"] for rung in shown["verification"]]
    assert {"captured", "tome_keep_0_5: compressed", label, f"{label}, as a function"} <= set(names)
    assert not [name for name in names if name == "compressed" or "all: " in name or ".all/" in name or "vision_encoder/" in name]
    record = bench(edgewise.Bundle.open(bundle), samples=1, seconds=0, cold=False, function="tome_keep_0_5")
    assert [one.artifact for one in record.measurements] == [label]
    every = bench(edgewise.Bundle.open(bundle), samples=2, seconds=0, cold=False)
    assert every.measurements[0].speedup is None and every.measurements[2].speedup is not None
    assert every.measurements[1].sites[-1].tokens_out < every.measurements[0].sites[-1].tokens_out
    np.savez(tmp_path / "h.npz", image=np.ones((1, 3, 32, 32), np.float16))
    ran = cli("run", package_of(bundle), "--function", "all", "--inputs", tmp_path / "h.npz", "--json")
    assert ran.code == 0 and ran.document["role"] == "all"
    wrong = cli("run", bundle, "--function", "al", "--inputs", tmp_path / "x.npz")
    assert wrong.code == 2 and "unknown function of this bundle 'al': did you mean 'all'?" in wrong.err
    both = cli("run", bundle, "--function", "all", "--role", "vision_encoder", "--inputs", tmp_path / "x.npz")
    assert both.code == 2 and "give one of them" in both.err


def test_a_function_is_held_to_its_own_compression_or_else_to_that_of_its_model(bundle: Path) -> None:
    main, fast, whole = edgewise.Bundle.open(bundle).manifest.targets
    alone = main.model_copy(update={"function": None, "target": "openvino"})
    assert [one.base_role for one in (main, fast, whole, alone)] == ["vision_encoder"] * 4
    assert nearest(fast, [alone]) == alone and nearest(alone, [fast, main]) == main
    assert nearest(fast, [main, whole, fast, alone]) == fast and nearest(fast, [alone, main, whole]) == main
    assert nearest(fast, [alone.model_copy(update={"role": "projector"})]) is None


@pytest.mark.parametrize(
    ("main", "variants", "message"),
    [
        ([LESS], [LESS], "is the same compression as 'main', tome:keep=0.75"),
        ([LESS], ["a=tome:keep=0.5", "b=tome:keep=.5"], "same compression as 'a'"),
        ([LESS], ["a=tome:keep=0.5", "a=none"], "two compressions are called 'a'"),
        ([LESS], ["a=tome:keep=0.5", "A=none"], "two compressions are called 'A'"),
        ([LESS], ["main=none"], "two compressions are called 'main'"),
        ([], ["none"], "same compression as 'main', none"),
        ([LESS], ["tomme:keep=0.5"], "did you mean 'tome'"),
        ([LESS], ["a=tome:keep=0.5 + "], "unknown parameter|not|tome"),
        ([LESS], [""], "empty"),
        ([LESS], ["my-name=tome:keep=0.5"], "unknown variant .* the name 'my-name' is not of letters"),
        ([LESS], ["nope"], "unknown variant 'nope': unknown method"),
    ],
)
def test_variants_that_make_no_sense(main: list[str], variants: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_variants(main, variants)


def test_variants_are_named_after_their_specs() -> None:
    found = parse_variants([LESS], ["topk@encoder.block[1]:keep=8 + tome:keep=0.5", "x=none", "tome:r=8"])
    assert found == {
        "main": (LESS,),
        "topk_encoder_block_1_keep_8_tome_keep_0_5": ("topk@encoder.block[1]:keep=8", HALF),
        "x": (),
        "tome_r_8": ("tome:r=8",),
    }


def test_a_variant_that_comes_to_the_same_program_is_refused(tmp_path: Path) -> None:
    module, image = wide(1, 16)
    with pytest.raises(InputError, match="'other' comes to the same program as 'main'"):
        edgewise.export(module, tmp_path / "b", example=(image,), targets=["coreml"], compress="topk@encoder.block[0]:keep=16",
                        compress_variants="other=topk@encoder.block[0]:keep=0.25")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_targets_without_functions_say_so(tmp_path: Path, cli: Cli) -> None:
    for target in ("openvino", "onnxruntime"):
        done = cli("export", "demo:digits", "--target", target, "--compress-variant", HALF, "-o", tmp_path / "b")
        assert done.code == 2 and f"target {target} has no artifacts of several functions" in done.err
        with pytest.raises(InputError, match="none called fast"):
            targets.get(target).load_function([tmp_path / "m"], "fast")
    model = "demo:vqa"
    done = cli("export", model, "--target", "coreml", "--compress-variant", HALF, "-o", tmp_path / "b")
    assert done.code == 2 and "leave the variants out" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_function_that_differs_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.coreml import CoreML

    right = CoreML.join
    module, image = wide(2, 16)

    def mixed_up(self: Any, parts: Any, folder: Path, stem: str) -> list[Path]:
        first, second = parts
        return right(self, {first: parts[second], second: parts[first]}, folder, stem)

    monkeypatch.setattr(CoreML, "join", mixed_up)
    with pytest.raises(CheckFailed, match="gives other numbers than alone"):
        edgewise.export(module, tmp_path / "b", example=(image,), targets=["coreml"], compress=LESS, compress_variants=HALF)
    assert list(tmp_path.iterdir()) == []


RECIPE = """
model: "py:tiny_encoder:factory"
targets: coreml
precision: fp32
compress: tome:keep=0.75
compress_variants: ["fast=tome:keep=0.5"]
"""


def test_recipes_have_variants(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert cli("export", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "b").code == 0
    opened = edgewise.Bundle.open(tmp_path / "b")
    assert [one.function for one in opened.manifest.targets] == ["main", "fast"]
    assert "compress_variants:\n- fast=tome:keep=0.5" in (tmp_path / "b" / "recipe.yaml").read_text()
    for old, new, message in (
        ("targets: coreml", "targets: openvino", "target openvino has no artifacts of several functions"),
        ("fast=tome:keep=0.5", "tome:keep=0.75", "is the same compression as 'main'"),
        ("compress_variants", "compress_variant", "did you mean 'compress_variants'"),
    ):
        (tmp_path / "bad.yaml").write_text(RECIPE.replace(old, new))
        done = cli("build", tmp_path / "bad.yaml", "-o", tmp_path / "bad", "--dry-run")
        assert done.code == 2 and message in done.err


def test_the_same_packages_join_to_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    module, image = wide()
    edgewise.export(module, tmp_path / "b", example=(image,), targets=["coreml"], precision="fp16", compress=LESS,
                    compress_variants=[HALF, "all=none"])  # fmt: skip
    for path in [one for one in bundle.rglob("*") if one.is_file()]:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(bundle)).read_bytes()
