"""Tuned schedules: within the budget, no worse than the usual ones where they were tuned, the same every time, and never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from tiny_encoder import factory

import edgewise
from edgewise.cli.screen import Screen
from edgewise.cli.tune import _show
from edgewise.exporter.divergence import Divergence
from edgewise.exporter.matrix import read_recipe
from edgewise.exporter.recipe import Recipe
from edgewise.exporter.tune import Budget, Row, Tuned
from edgewise.passes.flops import total_flops
from edgewise.passes.program import Program

MODEL = "py:tiny_encoder:factory"
LABELS = np.arange(40) % 10


@pytest.fixture(scope="module")
def program() -> Program:
    module, example = factory()
    return edgewise.capture(module, example)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and labels, most of which are what the model itself says."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).normal(size=(40, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        labels = factory()[0](torch.from_numpy(images)).argmax(-1).numpy()
    labels[::8] = LABELS[::8]
    np.savez(folder / "labelled.npz", image=images, labels=labels)
    np.savez(folder / "plain.npz", image=images)
    np.savez(folder / "one.npz", image=images[:1])
    (folder / "empty").mkdir()
    return folder


def tuned(cli: Cli, data: Path, out: Path, *more: object, source: str = "labelled.npz") -> Any:
    said = cli("tune", MODEL, "--calib", data / source, "-o", out, "--samples", 6, "--held-out", 20, "--trials", 8,
               "--json", *more)
    assert said.code == 0, said.err
    return said.document


def losses(out: Path) -> dict[str, float]:
    known = json.loads(Path(f"{out}.trials.json").read_text())["measured"]
    return {name.removeprefix("loss "): value for name, value in known.items() if name.startswith("loss ")}


def test_a_recipe_of_tokens_is_what_export_takes(cli: Cli, data: Path, tmp_path: Path, program: Program) -> None:
    out = tmp_path / "tuned.yaml"
    document = tuned(cli, data, out, "--budget", "tokens=0.5", "--target", "onnxruntime")
    recipe = read_recipe(out)
    assert recipe.model == MODEL and recipe.targets == ("onnxruntime",) and list(recipe.compress) == document["compress"]
    made = edgewise.compress(program, *recipe.compress)
    left = [site.tokens_out - 1 for site in made.sites if site.name.startswith("encoder.block")]
    rows = {row["name"]: row for row in document["schedules"]}
    assert list(rows) == ["tuned", "constant", "decreasing", "increasing", "uncompressed"]
    whole = rows.pop("uncompressed")
    assert whole["divergence"] == 0 and whole["flops"] == 1 and whole["counts"] == [64, 64, 64] and whole["specs"] == []
    assert left == rows["tuned"]["counts"] and sum(left) <= 0.5 * 64 * 3
    for row in rows.values():
        assert 0.45 <= row["tokens"] <= 0.5 and row["latency"] is None
        assert 0 <= row["accuracy"] <= 1 and row["divergence"] > 0
    known = losses(out)
    ours = known[",".join(map(str, left))]
    assert all(ours <= known[",".join(map(str, row["counts"]))] for row in rows.values())
    assert document["evaluated_now"] == len(known) == 6 + 8 == document["trials"]
    bundle = cli("export", "--recipe", out, "-o", tmp_path / "bundle", "--json")
    assert bundle.code == 0, bundle.err
    assert bundle.document["compress"] == list(recipe.compress)


def test_the_table_is_of_the_data_that_was_held_out(cli: Cli, data: Path, tmp_path: Path, program: Program) -> None:
    document = tuned(cli, data, tmp_path / "a.yaml", "--budget", "tokens=0.5")
    arrays = np.load(data / "labelled.npz")
    seen = {round(i * 39 / 5) for i in range(6)}
    rest = [i for i in range(40) if i not in seen]
    others = [rest[round(i * (len(rest) - 1) / 19)] for i in range(20)]
    row = document["schedules"][0]
    module, base = edgewise.compress(program, *row["specs"]).module(), program.uncompressed().module()
    right, lost = [], []
    with torch.no_grad():
        for i in others:
            image = torch.from_numpy(arrays["image"][i : i + 1])
            wanted, found = base(image).double().softmax(-1), module(image).double().softmax(-1)
            right.append(int(found.argmax()) == arrays["labels"][i])
            lost.append(float((wanted * (wanted / found).log()).sum()))
    assert document["held_out"] == 20
    assert row["accuracy"] == pytest.approx(np.mean(right))
    assert row["divergence"] == pytest.approx(np.mean(lost), rel=1e-3)


def test_flops_are_not_exceeded(cli: Cli, data: Path, tmp_path: Path, program: Program) -> None:
    out = tmp_path / "tuned.yaml"
    document = tuned(cli, data, out, "--budget", "flops=0.7", "--compress", "topk", source="plain.npz")
    base = total_flops(program.base)
    for row in document["schedules"][:-1]:
        made = edgewise.compress(program, *row["specs"])
        share = total_flops(made.exported) / base
        assert share == pytest.approx(row["flops"]) and 0.6 < share <= 0.7
        assert row["accuracy"] is None
        assert [step.keep for step in made.steps] == [c for c, r in zip(row["counts"], [64, *row["counts"]], strict=False) if c < r]
    assert all(spec.startswith("topk@encoder.block[") for spec in read_recipe(out).compress)


def test_the_first_trials_are_all_there_are_of_few(cli: Cli, data: Path, tmp_path: Path) -> None:
    document = tuned(cli, data, tmp_path / "tuned.yaml", "--budget", "tokens=0.5", "--trials", 2, source="plain.npz")
    sites = len(document["sensitivity"])
    assert document["trials"] == len(losses(tmp_path / "tuned.yaml")) == 2 * sites + 2


def test_a_divergence_of_rounding_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("constant", (8,), (), 0.5, 0.5, None, 1e-11, None)
    recipe = Recipe(model="demo:digits", targets=("openvino",))
    for divergence, shown in ((1e-11, False), (1e-3, True)):
        rows = (replace(row, name="tuned", divergence=divergence / 2), replace(row, divergence=divergence))
        _show(Screen(False, False), Tuned(recipe, Budget("tokens", 0.5), rows, (), 16, 4, 4, 2, 2, ()))
        assert ("50%" in capsys.readouterr().out) == shown


def test_class_scores_that_are_equal_but_for_rounding() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).numpy() * 5
    near = logits * (1 + 1e-7)
    found = Divergence.of([{"logits": logits}], {"logits": near}, 0, True, 64)({"logits": near}, {"logits": logits})
    assert 0 <= found < 1e-9


def test_latency_is_measured_on_the_target(cli: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.yaml"
    document = tuned(cli, data, out, "--budget", "latency=0.95", "--target", "onnxruntime",
                     "--compress", "random@encoder.block[0,1]", "--trials", 5)
    rows = {row["name"]: row for row in document["schedules"]}
    known = json.loads(Path(f"{out}.trials.json").read_text())["measured"]
    assert rows["tuned"]["latency"] == known["onnxruntime " + ",".join(map(str, rows["tuned"]["counts"]))]
    assert all(0 < row["latency"] <= 0.97 for name, row in rows.items() if name != "uncompressed")


def test_a_killed_tune_goes_on_and_ends_in_the_same_recipe(cli: Cli, data: Path, tmp_path: Path) -> None:
    arguments = ["tune", MODEL, "--calib", data / "plain.npz", "--budget", "tokens=0.4", "--samples", "4", "--held-out", "4",
                 "--trials", "7", "--json"]  # fmt: skip
    whole, part = tmp_path / "whole.yaml", tmp_path / "part.yaml"
    assert cli(*arguments, "-o", whole).code == 0
    path = os.pathsep.join([str(Path(edgewise.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "edgewise.cli", *map(str, arguments), "-o", str(part)]
    quiet = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process: Any = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **quiet)  # type: ignore[call-overload]
    begun = 0
    for line in process.stderr:  # a line for each trial as it begins
        begun += line.startswith("[")
        if begun == 8:
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    process.wait()
    assert not part.exists()
    before = losses(part)
    assert 7 <= len(before) < len(losses(whole))
    said = cli(*arguments, "-o", part)
    assert said.code == 0, said.err
    assert said.document["evaluated_now"] == len(losses(whole)) - len(before)
    assert part.read_text() == whole.read_text() and losses(part) == losses(whole)
    changed = time.time_ns()
    again = cli(*arguments, "-o", part)
    assert again.document["evaluated_now"] == 0 and Path(f"{part}.trials.json").stat().st_mtime_ns < changed
    other = cli(*arguments, "-o", part, "--samples", "3")  # numbers of other data are not used
    assert other.code == 0 and other.document["evaluated_now"] > 0


def test_outputs_of_fewer_tokens_are_held_to_the_nearest() -> None:
    generator = np.random.default_rng(0)
    full = [generator.normal(size=(2, 9, 5)).astype(np.float32) for _ in range(3)]
    found = {"tokens": full[0][:, :6]}
    distance = Divergence.of([{"tokens": one} for one in full], found, 1, False, 2)
    assert distance({"tokens": full[0]}, {"tokens": full[0]}) == pytest.approx(0, abs=1e-6)
    scale = np.concatenate(full)[:, 1:].reshape(-1, 5).std(0)
    rest, left = full[0][:, 1:] / scale, full[0][:, 1:6] / scale
    wanted = np.square(rest[:, :, None] - left[:, None]).sum(-1).min(-1).mean() / 5 / 2  # the protected one is where it was
    assert distance(found, {"tokens": full[0]}) == pytest.approx(wanted, rel=1e-3)
    losses = [distance({"tokens": full[0][:, :n]}, {"tokens": full[0]}) for n in (2, 4, 6, 8, 9)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "tokens=1.5"], ["out of range", "above 0 and below 1"]),
        (["--budget", "tokens=nan"], ["out of range"]),
        (["--budget", "tokens"], ["KIND=SHARE"]),
        (["--budget", "token=0.5"], ["did you mean", "tokens"]),
        (["--budget", "tokens=half"], ["not a number"]),
        (["--budget", "tokens=0.2"], ["cannot be reached", "0.292"]),
        (["--budget", "flops=0.1"], ["cannot be reached"]),
        (["--budget", "tokens=0.5", "--compress", "pool"], ["pool", "no schedule to tune"]),
        (["--budget", "tokens=0.5", "--compress", "fastv"], ["fastv", "no schedule to tune"]),
        (["--budget", "tokens=0.5", "--compress", "token-learner"], ["weights"]),
        (["--budget", "tokens=0.5", "--compress", "tome:keep=0.5"], ["leave keep out"]),
        (["--budget", "tokens=0.5", "--compress", "text-topk"], ["text"]),
        (["--budget", "tokens=0.5", "--calib", "empty"], ["empty"]),
        (["--budget", "tokens=0.5", "--calib", "one.npz"], ["one sample"]),
        (["--budget", "tokens=0.5", "--calib", "none.npz"], ["does not exist"]),
        (["--budget", "tokens=0.5", "-o", "no/folder.yaml"], ["there is no folder"]),
        (["--budget", "tokens=0.5", "-o", "recipe.json"], [".yaml"]),
        (["--budget", "tokens=0.5", "--seed", "-1"], ["seed"]),
    ],
)
def test_what_cannot_be_is_said(cli: Cli, data: Path, tmp_path: Path, arguments: list[str], words: list[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    given = [*arguments]
    if "--calib" not in given:
        given += ["--calib", "plain.npz"]
    if "-o" not in given:
        given += ["-o", str(tmp_path / "tuned.yaml")]
    cli("tune", MODEL, "--samples", 4, "--trials", 5, *given).refused(*words)
    assert not list(tmp_path.glob("*.yaml"))
