"""What every verb prints and gives back when all is well."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli

import edgewise
from edgewise.cli.screen import Screen, flops, size


def test_export_of_a_python_factory(cli: Cli, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "made" / "bundle"
    said = cli("export", f"{tiny}:make", "-o", out, "--compress", "tome:r=2", "--target", "onnxruntime")
    assert said.code == 0, said.err
    assert "encoder.block[0]" in said.out and "passed" in said.out
    assert f"next: edgewise bench {out}" in said.out
    # A package of another version than the tested one is warned of.
    lines = [line for line in said.err.splitlines() if not line.startswith("warning: ")]
    stages = [re.fullmatch(r"\[(\d+)/(\d+)\] (.+)", line) for line in lines]
    assert stages and all(stages), said.err
    assert [int(stage[1]) for stage in stages if stage] == list(range(1, len(stages) + 1))
    assert {int(stage[2]) for stage in stages if stage} == {len(stages)}
    assert "lower to onnxruntime" in said.err
    bundle = edgewise.Bundle.open(out)
    assert [(site.tokens_in, site.tokens_out) for site in bundle.manifest.components[0].sites] == [(17, 15), (15, 13)]


def test_export_as_json(cli: Cli, tiny: str, tmp_path: Path) -> None:
    # The factory prints, which must not end up in the document.
    said = cli("export", f"{tiny}:make_chatty", "-o", tmp_path / "b", "--target", "onnxruntime", "--json", "--quiet")
    document = said.document
    assert said.err == "a factory that prints\n"
    assert document["bundle"] == str(tmp_path / "b")
    assert document["components"][0]["sites"] == []
    assert [artifact["target"] for artifact in document["artifacts"]] == ["onnxruntime"]
    assert all(rung["passed"] for rung in document["verification"])
    assert document["artifacts"][0]["bytes"] > 1000


def test_export_from_a_recipe(cli: Cli, tiny: str, tmp_path: Path) -> None:
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    common = ("--target", "onnxruntime", "--quiet", "--json")
    cli("export", f"{tiny}:make", "-o", first, "--compress", "topk@encoder.block[0]:keep=4", *common)
    assert cli("export", "--recipe", first, "-o", second, "--quiet", "--json").code == 0
    assert files(first) == files(second)
    said = cli("export", "--recipe", first / "recipe.yaml", "-o", third, "--compress", "tome:r=1", *common)
    assert said.document["compress"] == ["tome:r=1"]


def test_export_replaces_a_bundle(cli: Cli, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    for spec in ("tome:r=1", "tome:r=2"):
        said = cli("export", f"{tiny}:make", "-o", out, "--compress", spec, "--target", "onnxruntime", "--json")
        assert said.document["compress"] == [spec]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_export_in_half_precision(cli: Cli, tiny: str, tmp_path: Path) -> None:
    args = ("--target", "onnxruntime", "--target", "openvino", "--precision", "fp16", "--json")
    said = cli("export", f"{tiny}:make", "-o", tmp_path / "b", "--compress", "tome:r=2", *args)
    assert {artifact["precision"] for artifact in said.document["artifacts"]} == {"fp16"}
    assert [rung["name"] for rung in said.document["verification"] if rung["kind"] == "precision"] == ["fp16 weights"]


def test_what_an_export_adjusts_is_noted(cli: Cli, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "b"
    said = cli("export", f"{tiny}:make", "-o", out, "--compress", "tome:r=8", "--target", "onnxruntime")
    (note,) = edgewise.Bundle.open(out).manifest.notes
    assert note.startswith("tome:r=8 at encoder.block[1]: r=8 clipped to 4")
    assert f"note: {note}" in said.out.splitlines()
    assert f"note: {note}" in cli("inspect", out).out.splitlines()
    assert note in (out / "report.html").read_text("utf-8")
    said = cli("export", f"{tiny}:make", "-o", out, "--compress", "tome:r=8", "--target", "onnxruntime", "--json")
    assert said.document["notes"] == [note]


def test_inspect_a_model(cli: Cli, tiny: str) -> None:
    document = cli("inspect", f"{tiny}:make", "--json").document
    assert document["streams"] == [
        {
            "name": "encoder",
            "role": "vision_encoder",
            "tokens": 17,
            "constant_tokens": 1,
            "protected_tokens": 1,
            "grid": [4, 4],
            "blocks": 2,
            "output_is_read": False,
        }
    ]
    assert [site["name"] for site in document["sites"]] == ["encoder.block[0]", "encoder.block[1]", "encoder.out"]
    assert sum(document["flops_by_part"].values()) == document["flops"]["before"] == document["flops"]["after"]
    assert document["attentions_without_site"] == []


def test_inspect_with_compression(cli: Cli, tiny: str) -> None:
    document = cli("inspect", f"{tiny}:make", "--compress", "tome:r=2", "--json").document
    assert [(site["tokens_in"], site["tokens_out"]) for site in document["sites"]] == [(17, 15), (15, 13), (13, 13)]
    assert document["flops"]["after"] < document["flops"]["before"]
    text = cli("inspect", f"{tiny}:make", "--compress", "tome:r=2").out
    assert "17" in text and "13" in text and "after compression" in text


def test_inspect_says_what_has_no_site(cli: Cli, tiny: str) -> None:
    said = cli("inspect", f"{tiny}:make_mlp", "--json")
    assert said.document["streams"] == [] and said.document["sites"] == []


def test_inspect_a_bundle(cli: Cli, digits: Path) -> None:
    said = cli("inspect", digits)
    for word in ("demo:digits", "ViTForImageClassification", "tome:keep=0.5", "pixel_values", "1x1x56x56", "openvino"):
        assert word in said.out
    document = cli("inspect", digits, "--json").document
    assert document["manifest"] == edgewise.Bundle.open(digits).manifest.model_dump(mode="json")


def test_verify(cli: Cli, digits: Path) -> None:
    said = cli("verify", digits)
    assert said.code == 0 and "2 of 2 artifacts passed" in said.out
    document = cli("verify", digits, "--target", "openvino", "--threads", 1, "--json").document
    assert document["passed"] is True and document["accuracy"] is None
    assert [rung["name"] for rung in document["verification"]] == ["openvino/vision_encoder/fp32"]


def test_verify_on_labelled_data(cli: Cli, digits: Path, tmp_path: Path) -> None:
    from edgewise import demos

    split = demos.split("digits")
    # Half of the labels are wrong on purpose.
    wrong = np.where(np.arange(20) % 2, split.labels[:20], (split.labels[:20] + 1) % 10)
    np.savez(tmp_path / "half.npz", pixel_values=split.inputs["pixel_values"][:20], labels=wrong)
    scores = cli("verify", digits, "--data", tmp_path / "half.npz", "--json").document["accuracy"]
    assert [(score["samples"], score["correct"], score["top1"]) for score in scores] == [(20, 10, 0.5)] * 2


def test_accuracy_of_a_batch_that_does_not_divide_the_data(cli: Cli, tmp_path: Path) -> None:
    from edgewise import demos

    args = ("--batch", 7, "--target", "onnxruntime", "--quiet", "--json")
    assert cli("export", "demo:digits", "-o", tmp_path / "b", *args).code == 0
    split = demos.split("digits")
    np.savez(tmp_path / "d.npz", pixel_values=split.inputs["pixel_values"][:30], labels=split.labels[:30])
    (score,) = cli("verify", tmp_path / "b", "--data", tmp_path / "d.npz", "--json").document["accuracy"]
    assert (score["samples"], score["correct"]) == (30, 30)


def test_run(cli: Cli, digits: Path, tmp_path: Path) -> None:
    from edgewise import demos

    split = demos.split("digits")
    document = cli("run", digits, "--inputs", "demo:digits[42]", "-o", tmp_path / "y.npz", "--json").document
    logits = document["outputs"]["logits"]
    assert logits["shape"] == [1, 10] and logits["dtype"] == "float32"
    assert logits["top"][0][0]["index"] == split.labels[42]
    with np.load(tmp_path / "y.npz") as saved:
        assert saved["logits"].max() == pytest.approx(logits["max"])
    np.savez(tmp_path / "x.npz", pixel_values=split.inputs["pixel_values"][42:43])
    again = cli("run", digits, "-i", tmp_path / "x.npz", "--json").document
    assert again["outputs"] == document["outputs"]
    assert "top 5 classes" in cli("run", digits, "-i", tmp_path / "x.npz", "--target", "onnxruntime").out


def test_run_cannot_write(cli: Cli, digits: Path, tmp_path: Path) -> None:
    cli("run", digits, "-i", "demo:digits[0]", "-o", tmp_path / "no" / "y.npz").refused("cannot write", "y.npz")
    cli("run", digits, "-i", "demo:digits[0]", "-o", tmp_path / "y.txt").refused("written as .npz")


def test_bench(cli: Cli, digits: Path, tmp_path: Path) -> None:
    from edgewise.bench import Record

    record = tmp_path / "record.json"
    said = cli("bench", digits, "--samples", 3, "--seconds", 0, "-o", record)
    assert said.code == 0 and "onnxruntime" in said.out
    assert Record.model_validate_json(record.read_text()).model == "demo:digits"
    document = cli("bench", digits, "--target", "openvino", "--samples", 2, "--seconds", 0, "--json").document
    assert [one["target"] for one in document["measurements"]] == ["openvino"]


def test_listings(cli: Cli) -> None:
    from edgewise.ops import METHODS

    assert {one["name"] for one in cli("methods", "--json").document["methods"]} == set(METHODS)
    (tome,) = cli("methods", "tome", "--json").document["methods"]
    assert {"keep", "r", "schedule"} <= {one["name"] for one in tome["parameters"]}
    assert all(name in cli("methods").out for name in METHODS)
    assert {one["name"] for one in cli("targets", "--json").document["targets"]} >= {"openvino", "onnxruntime", "tensorrt"}
    assert "realisations" in cli("targets", "openvino").out
    models = {one["model"]: one for one in cli("models", "--json").document["models"]}
    assert models["demo:digits"]["tokens"] == 197 and models["demo:digits"]["parameters"] == 469_162
    system = cli("sys", "--json").document
    assert system["edgewise"] == edgewise.__version__ and system["packages"]["numpy"] == np.__version__
    assert system["targets"]["openvino"] == {"exports": True, "runs": True}


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version").out == f"edgewise {edgewise.__version__}\n"
    assert cli("--version", "--json").document == {"edgewise": edgewise.__version__}
    said = cli()
    assert said.code == 0 and said.err == ""
    verbs = ("export", "inspect", "explain", "compare", "tune", "verify", "run", "bench", "methods", "targets", "models", "sys")
    for verb in verbs:
        assert verb in said.out
        told = cli(verb, "--help")
        assert told.code == 0
        for flag in ("--json", "--quiet", "--debug", "--help"):
            assert flag in told.out
        assert "_" not in "".join(word for word in told.out.split() if word.startswith("--"))


def test_json_is_one_document_in_a_process_of_its_own(shell: Cli, digits: Path) -> None:
    said = shell("verify", digits, "--json")
    assert json.loads(said.out)["passed"] is True
    assert "\r" not in said.err and "\x1b" not in said.err
    said = shell("verify", digits, "--json", "--quiet")
    assert json.loads(said.out)["passed"] is True and said.err == ""


def test_a_reader_that_leaves_early_is_no_error(shell: Cli) -> None:
    close = "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)"
    said = shell("methods", before=close)
    assert said.code == 0 and "Traceback" not in said.err and "BrokenPipe" not in said.err


def test_progress_is_a_bar_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Screen(False, False).progress() as step:
        step(0, 2, "one")
        step(1, 2, "two")
    assert capsys.readouterr().err == "[1/2] one\n[2/2] two\n"
    with Screen(False, True).progress() as step:
        step(0, 2, "one")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Screen(False, False).progress() as step:
        step(0, 2, "one")
    assert "\x1b[" in capsys.readouterr().err


def test_numbers_for_people() -> None:
    assert [flops(n) for n in (12, 1500, 234_507_648, 10**15, None)] == [
        "12 FLOPs",
        "1.5 kFLOPs",
        "234.5 MFLOPs",
        "1000 TFLOPs",
        "-",
    ]
    assert [size(n) for n in (512, 2**21)] == ["0.5 KiB", "2.0 MiB"]


def test_verbs_are_thin() -> None:
    """A verb parses, calls the library and prints: no module of the command line knows torch."""
    import edgewise.cli

    for path in Path(edgewise.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in names), path


def files(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}
