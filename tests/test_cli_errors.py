"""Whatever is wrong: exit code 2, one clear message, no traceback, and nothing is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bundle_helpers import edit
from conftest import Cli, Said


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "bundle"


def nothing_written(out: Path) -> None:
    assert not out.parent.exists()


# What is unknown or out of range. {tiny} is the model, {count} its 16 free tokens.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["export", "demo:digit", "-o", "{out}"], ["unknown demo model 'digit'", "did you mean 'digits'"]),
        (["export", "demo:digits", "-o", "{out}", "--target", "openvno"], ["'openvno'", "did you mean 'openvino'"]),
        (["export", "demo:digits", "-o", "{out}", "--compress", "tone:keep=0.5"], ["'tone'", "did you mean 'tome'"]),
        (["export", "demo:digits", "-o", "{out}", "--compress", "tome:kep=0.5"], ["'kep'", "did you mean 'keep'"]),
        (["export", "demo:digits", "-o", "{out}", "--compress", ""], ["an empty compression spec"]),
        (["export", "demo:digits", "-o", "{out}", "--compress", "tome:keep=half"], ["keep=half is not a number"]),
        (["export", "demo:digits", "-o", "{out}", "--compress", "tome:keep=1,r=2"], ["give keep or r, not both"]),
        (["export", "demo:digits", "-o", "{out}", "--precision", "fp61"], ["'fp61'", "did you mean 'fp16'"]),
        (["export", "demo:digits", "-o", "{out}", "--calib", "demo:digits"], ["takes no calibration data"]),
        (["export", "demo:digits", "-o", "{out}", "--input-shapes", "pixel_values=1xA"], ["NAME=AxBxC"]),
        (["export", "./nowhere", "-o", "{out}"], ["./nowhere does not exist"]),
        (["export", "nowhere.pt2", "-o", "{out}"], ["nowhere.pt2 does not exist"]),
        (["export", "py:nowhere", "-o", "{out}"], ["py:package.module:factory"]),
        (["export", "py:nowhere:make", "-o", "{out}"], ["cannot import 'nowhere'"]),
        (["export", "{tiny}:mak", "-o", "{out}"], ["'mak'", "did you mean 'make'"]),
        (["export", "py::", "-o", "{out}"], ["of names as Python has them"]),
        (["export", "py:.:x", "-o", "{out}"], ["of names as Python has them"]),
        (["export", "{tiny}:make", "-o", "{out}", "--precision", ""], ["precision"]),
        (["export", "{tiny}:make", "-o", "{out}", "--input-shapes", "pixels=1x3x16x1６"], ["NAME=AxBxC"]),
        (["export", "{tiny}:make", "-o", "{out}", "--input-shapes", "pixels=1x3x999999x9999999"], ["too much memory"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk:keep=1_0"], ["ASCII digits"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "tome:r=[1,٣]"], ["ASCII digits"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "tofu:keep=0.5,switch=nan"], ["switch=nan is no finite number"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "divprune:ratio=0"], ["ratio=0 is out of range"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "text-topk:keep=4,text_tokens=99999999"], ["out of range"]),
        (["export", "{tiny}:make_failing", "-o", "{out}"], ["the factory has a fault"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk@encoder.blok[0]:keep=4"], ["site", "block[0]"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk@encoder.block[2]:keep=4"], ["unknown site"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk:keep=0"], ["keep=0 is out of range", "1 and 16"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk:keep=1.5"], ["keep=1.5 is out of range"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk:keep=17"], ["keep=17 is out of range", "16"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk:keep=-3"], ["keep=-3 is out of range"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "topk:keep=nan"], ["keep"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "tome:r=9"], ["r=9 is too large", "at most 8"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "tome:r=0"], ["r=0 is out of range"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "tome:keep=1"], ["half of the unprotected tokens"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress", "tome"], ["give keep=", "or r="]),
        (["export", "{tiny}:make_mlp", "-o", "{out}", "--compress", "tome:keep=0.5"], ["the model has no attention"]),
        (["export", "{tiny}:make_branching", "-o", "{out}"], ["cannot be captured", "depends on the values"]),
        (["export", "{tiny}:make_nan", "-o", "{out}"], ["head.weight", "NaN"]),
        (["export", "{tiny}:make", "-o", "{out}", "--input-shapes", "pixels=1x4x16x16"], ["cannot run", "1x4x16x16"]),
        (["export", "{tiny}:make", "-o", "{out}", "--input-shapes", "pixel=1x3x16x16"], ["cannot run", "pixels"]),
        (["export", "demo:digits", "-o", "{out}", "--input-shapes", "pixels=1x2"], ["unknown input", "'pixels'", "pixel_values"]),
        (["bench", "any", "--ssh-config", "any"], ["--ssh-config", "--on ssh:HOST"]),
        (["export", "{tiny}:make", "-o", "{out}", "--batch", "2"], ["--batch 2", "give --input-shapes"]),
        (["export", "any.pt2", "-o", "{out}", "--input-shapes", "x=1x3"], ["any.pt2", "leave out --input-shapes"]),
        (["export", "{tiny}:make", "-o", "{out}", "--batch", "0"], ["--batch"]),
        (["export", "{tiny}:make", "-o", "{out}", "--seed", "-1"], ["--seed", "0"]),
        (["export", "{tiny}:make", "-o", "{out}", "--compress-variant", "nope"], ["unknown variant 'nope'"]),
        (["export", "-o", "{out}"], ["no model"]),
        (["export", "demo:digits"], ["give -o BUNDLE"]),
        (["exprot", "demo:digits"], ["unknown verb 'exprot'", "did you mean 'export'"]),
        (["export", "demo:digits", "--comprss", "tome"], ["unknown flag '--comprss'", "did you mean '--compress'"]),
        (["export", "demo:digits", "--input_shapes", "x=1"], ["did you mean '--input-shapes'"]),
        (["verify"], ["BUNDLE"]),
        (["bench", "x", "--samples", "many"], ["--samples"]),
        (["methods", "tone"], ["did you mean 'tome'"]),
        (["targets", "onnx-runtime"], ["did you mean 'onnxruntime'"]),
        (["inspect", "demo:digit"], ["did you mean 'digits'"]),
        (["inspect", "nowhere/"], ["nowhere"]),
    ],
)
def test_bad_input(cli: Cli, tiny: str, out: Path, args: list[str], words: list[str]) -> None:
    filled = [arg.replace("{out}", str(out)).replace("{tiny}", tiny) for arg in args]
    said = cli(*filled)
    message = said.refused(*words)
    nothing_written(out)
    document = cli(*filled, "--json").document
    assert document["error"]["exit_code"] == 2
    assert document["error"]["message"] in message.replace("error: ", "", 1) + "\n"
    nothing_written(out)


def test_an_unknown_hugging_face_id_is_named(shell: Cli, out: Path) -> None:
    said = shell("export", "nobody/no-such-model", "-o", out, env={"HF_HUB_OFFLINE": "1"})
    said.refused("unknown model 'nobody/no-such-model'", "demo:")
    nothing_written(out)


def test_a_prefix_that_nobody_knows_is_explained(shell: Cli, out: Path) -> None:
    shell("export", "dmo:digits", "-o", out, env={"HF_HUB_OFFLINE": "1"}).refused("dmo:digits", "demo:")
    nothing_written(out)


def test_where_a_record_cannot_go_is_said_before_it_is_measured(cli: Cli, digits: Path, tmp_path: Path) -> None:
    for out, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "r.json", "there is no folder")):
        cli("bench", digits, "--seconds", "1000", "-o", out).refused("cannot write", words)
    cli("report", "/proc/self/mem", "-o", tmp_path / "r.html").refused("cannot read /proc/self/mem")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_utf8(cli: Cli, tiny: str, tmp_path: Path) -> None:
    bad = tmp_path / os.fsdecode(b"im\xff")
    bad.mkdir()
    assert "im\ufffd" in cli("inspect", bad, "--json").document["error"]["message"]
    cli("inspect", bad).refused("im\\udcff")
    cli("export", tiny + ":make", "-o", bad / "b", "--target", "onnxruntime").refused("is not UTF-8")
    assert not list(bad.iterdir())


def test_a_name_that_is_too_long(cli: Cli, tmp_path: Path) -> None:
    long = "a" * 300
    for args in (["verify", long], ["inspect", long], ["export", f"{long}.pt2", "-o", tmp_path / "b"],
                 ["export", "demo:digits", "-o", tmp_path / long], ["export", "--recipe", long, "-o", tmp_path / "b"],
                 ["tune", "demo:digits", "--calib", long, "--budget", "tokens=0.5", "-o", tmp_path / "t.yaml"]):
        cli(*args).refused(long)
    assert not list(tmp_path.iterdir())


# Recipes.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: demo:digits\ntargets: [openvino]\ncompres: [tome]\n", ["'compres'", "did you mean 'compress'"]),
        ("model: demo:digits\ntargets: 3\n", ["targets"]),
        ("- a list\n", ["is no recipe"]),
        ("model: [unclosed\n", ["is not YAML"]),
        ('model: demo:digits\ntargets: ["\\ud800"]\n', [":2", "holds half of a character"]),
        ("model: demo:digits\n", ["targets"]),
    ],
)
def test_bad_recipe(cli: Cli, tmp_path: Path, out: Path, text: str, words: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    cli("export", "--recipe", recipe, "-o", out).refused(*words, str(recipe))
    nothing_written(out)


def test_a_recipe_that_is_not_there(cli: Cli, tmp_path: Path, out: Path) -> None:
    cli("export", "--recipe", tmp_path / "no.yaml", "-o", out).refused("cannot read", "no.yaml")


# Places.


def test_a_folder_that_is_no_bundle_is_never_touched(cli: Cli, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    cli("export", f"{tiny}:make", "-o", out).refused("is not a bundle", str(out))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "ten years of work"


def test_a_file_in_the_place_is_never_touched(cli: Cli, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.write_text("ten years of work")
    cli("export", f"{tiny}:make", "-o", out).refused("is not a bundle")
    assert out.read_text() == "ten years of work"


TARGETS = ("openvino", "onnxruntime")


@pytest.mark.parametrize("target", TARGETS)
def test_no_room_on_the_disk(cli: Cli, tiny: str, tmp_path: Path, target: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system needs root")
    try:
        said = cli("export", f"{tiny}:make", "-o", disk / "bundle", "--target", target, "--no-cache")
        said.refused("cannot write", "No space left on device", "make room")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_limit_on_file_size(cli: Cli, tiny: str, out: Path, target: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        said = cli("export", f"{tiny}:make", "-o", out, "--target", target, "--no-cache", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said.refused("cannot write", "File too large")
    nothing_written(out)


# Weights.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Hugging Face model, with its weights in both formats."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    model = ViTForImageClassification(config)
    place = tmp_path / "vit"
    model.save_pretrained(place)
    torch.save(model.state_dict(), place / "pytorch_model.bin")
    return place


def test_pickled_weights_need_a_flag(cli: Cli, folder: Path, out: Path) -> None:
    (folder / "model.safetensors").unlink()
    cli("export", folder, "-o", out).refused("no .safetensors weights", "--weights-only")
    nothing_written(out)
    said = cli("inspect", folder, "--weights-only", "--json")
    assert said.code == 0, said.err
    assert said.document["streams"][0]["tokens"] == 17


def test_pickled_weights_never_run_code(cli: Cli, folder: Path, tmp_path: Path, out: Path) -> None:
    import torch

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    cli("export", folder, "-o", out, "--weights-only").refused("cannot load the weights")
    assert not (tmp_path / "ran").exists()
    nothing_written(out)


def test_nan_weights(cli: Cli, folder: Path, out: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][1, 2] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    cli("export", folder, "-o", out).refused("classifier.weight", "NaN or infinite")
    nothing_written(out)


def test_damaged_weights(cli: Cli, folder: Path, out: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    cli("export", folder, "-o", out).refused("cannot load the weights", str(folder))
    nothing_written(out)


def test_a_folder_without_a_model(cli: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    cli("export", tmp_path / "empty", "-o", out).refused("holds no config.json")


# Bundles.


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "copy"))


def largest(bundle: Path) -> Path:
    return max((path for path in bundle.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def everywhere(cli: Cli, bundle: Path, *words: str) -> None:
    """Every verb that reads a bundle refuses this one."""
    for verb in (["verify"], ["bench"], ["inspect"], ["run", "--inputs", "demo:digits[0]"]):
        cli(verb[0], bundle, *verb[1:]).refused(*words)


def test_truncated_bundle(cli: Cli, copy: Path) -> None:
    path = largest(copy)
    path.write_bytes(path.read_bytes()[:-100])
    everywhere(cli, copy, path.name, "is truncated")


def test_altered_bundle(cli: Cli, copy: Path) -> None:
    path = largest(copy)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    everywhere(cli, copy, path.name, "was altered")


def test_bundle_with_a_missing_file(cli: Cli, copy: Path) -> None:
    (copy / "recipe.yaml").unlink()
    everywhere(cli, copy, "recipe.yaml", "is missing")


def test_corrupt_manifest(cli: Cli, copy: Path) -> None:
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes()[:500])
    everywhere(cli, copy, "is not a manifest")


def test_manifest_that_leaves_the_bundle(cli: Cli, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.xml").write_text("secret")
    edit(copy, lambda document: document["targets"][0].update(files=["../secret.xml"]))
    everywhere(cli, copy, "../secret.xml", "is not allowed in a bundle")


def test_unknown_key_in_a_manifest(cli: Cli, copy: Path) -> None:
    edit(copy, lambda document: document.update(extra=1))
    everywhere(cli, copy, "extra")


def test_no_bundle(cli: Cli, tmp_path: Path) -> None:
    for verb in ("verify", "bench"):
        cli(verb, tmp_path / "nowhere").refused("does not exist")
        cli(verb, tmp_path).refused("is not a bundle")


def test_target_that_the_bundle_lacks(cli: Cli, digits: Path) -> None:
    cli("verify", digits, "--target", "openvno").refused("'openvno'", "did you mean 'openvino'")


# Data.


def test_bad_data(cli: Cli, digits: Path, tmp_path: Path) -> None:
    pixels = np.zeros((3, 1, 56, 56), np.float32)
    good = {"pixel_values": pixels, "labels": np.zeros(3, np.int64)}
    for change, words in (
        ({"labels": None}, ["has no labels", "'labels'"]),
        ({"labels": np.zeros(2, np.int64)}, ["different numbers of samples", "'labels': 2"]),
        ({"labels": np.zeros(3)}, ["whole numbers"]),
        ({"pixel_values": None}, ["no array for the input 'pixel_values'"]),
        ({"pixel_values": pixels[..., :8]}, ["takes (1, 56, 56)"]),
    ):
        arrays = {name: array for name, array in {**good, **change}.items() if array is not None}
        np.savez(tmp_path / "data.npz", **arrays)
        cli("verify", digits, "--data", tmp_path / "data.npz").refused(*words)
    (tmp_path / "data.npz").write_bytes(b"PK\3\4 no zip")
    cli("verify", digits, "--data", tmp_path / "data.npz").refused("cannot read")
    np.savez(tmp_path / "data.npz", labels=np.array([{"an": "object"}], dtype=object))
    cli("verify", digits, "--data", tmp_path / "data.npz").refused("cannot read")
    cli("verify", digits, "--data", "demo:digit").refused("did you mean 'digits'")
    cli("verify", digits, "--data", tmp_path).refused("holds no image files")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("demo:digits", ["demo:digits[0]"]),
        ("demo:digits[360]", ["from 0 to 359"]),
        ("demo:digits[-1]", ["names no sample"]),
        ("demo:digit[0]", ["did you mean 'digits'"]),
        ("nowhere.npz", ["does not exist"]),
    ],
)
def test_bad_inputs_of_run(cli: Cli, digits: Path, source: str, words: list[str]) -> None:
    cli("run", digits, "--inputs", source).refused(*words)


def test_run_refuses_wrong_arrays(cli: Cli, digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, pixel_value=np.zeros((1, 1, 56, 56), np.float32))
    cli("run", digits, "--inputs", path).refused("did you mean 'pixel_values'")
    np.savez(path, pixel_values=np.zeros((1, 1, 8, 8), np.float32))
    cli("run", digits, "--inputs", path).refused("static shape (1, 1, 56, 56)")
    np.savez(path, pixel_values=np.zeros((1, 1, 56, 56), np.float64))
    cli("run", digits, "--inputs", path).refused("must be float32")


# What is not installed.

HIDE = """
import importlib.abc, importlib.metadata, sys
hidden = {names!r}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
real = importlib.metadata.version

def version(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.version = version
"""


def without(shell: Cli, names: set[str], *args: object) -> Said:
    return shell(*args, before=HIDE.format(names=names))


def test_missing_runtime(shell: Cli, digits: Path, out: Path) -> None:
    said = without(shell, {"openvino"}, "verify", digits, "--target", "openvino")
    said.refused("openvino is not installed", 'pip install "edgewise[openvino]"')
    said = without(shell, {"openvino"}, "verify", digits, "--json")
    assert said.code == 0, said.err
    assert [one["passed"] for one in said.document["verification"]] == [None, True]
    said = without(shell, {"openvino"}, "export", "demo:digits", "-o", out, "--target", "openvino")
    said.refused("openvino is not installed", 'pip install "edgewise[openvino]"')
    nothing_written(out)
    said = without(shell, {"openvino", "onnxruntime"}, "bench", digits)
    said.refused("no artifact of this bundle can run here")


def test_missing_exporter(shell: Cli, out: Path) -> None:
    heavy = {"torch", "transformers", "yaml", "onnx", "onnxscript"}
    for args in (["export", "demo:digits", "-o", out], ["inspect", "demo:digits"], ["methods"]):
        without(shell, heavy, *args).refused('pip install "edgewise[export]"')
    nothing_written(out)


# The unexpected.


def test_an_unexpected_error_is_one_line(shell: Cli, digits: Path) -> None:
    fault = "def fail(*_): raise ZeroDivisionError('a fault\\nof ours')\n"
    fault = f"import edgewise.bundle\n{fault}edgewise.bundle.Bundle.open = fail"
    said = shell("verify", digits, before=fault)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ZeroDivisionError: a fault of ours (") and "--debug" in said.err
    assert len(said.err.splitlines()) == 1
    said = shell("verify", digits, "--debug", before=fault)
    assert said.code == 2
    assert "Traceback" in said.err and said.err.splitlines()[-1].startswith("error: ZeroDivisionError")
    said = shell("verify", digits, "--json", before=fault)
    assert json.loads(said.out)["error"]["kind"] == "ZeroDivisionError"


def test_interrupted(shell: Cli, digits: Path) -> None:
    fault = "import edgewise.bundle\ndef fail(*_): raise KeyboardInterrupt\nedgewise.bundle.Bundle.open = fail"
    said = shell("verify", digits, before=fault)
    assert said.code == 130 and "Traceback" not in said.err


def test_a_failed_check_is_exit_code_1(cli: Cli, copy: Path) -> None:
    def tighten(document: dict[str, object]) -> None:
        for rung in document["verification"]:  # type: ignore[attr-defined]
            if rung["kind"] == "lowering":
                rung["threshold"] = 1e-12

    edit(copy, tighten)
    said = cli("verify", copy)
    assert said.code == 1 and "FAILED" in said.out
    said = cli("verify", copy, "--json")
    assert said.code == 1 and said.document["passed"] is False
    said = cli("bench", copy, "--samples", 1, "--seconds", 0, "--json")
    assert said.code == 1
    assert {one["validity"] for one in said.document["measurements"]} == {"invalid"}
