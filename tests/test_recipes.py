"""Recipe files: a matrix is expanded as it says, and what is wrong is named with its line and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.errors import InputError
from edgewise.exporter.matrix import RecipeFile, read_recipe, read_recipes
from edgewise.exporter.recipe import Recipe

MATRIX = """
targets: [openvino, onnxruntime]
seed: 1
gates: {size: 2 MiB, tokens: 60}
matrix:
  model:
    - demo:digits
    - {model: demo:speech, name: said, seed: 3, targets: openvino, gates: {tokens: 90}}
  compress: [null, "tome:keep=0.5", [pool, "topk@encoder.block[0]:keep=4"]]
  precision: [fp32, fp16]
exclude:
  - {model: demo:speech, precision: fp16}
  - {compress: [pool, "topk@encoder.block[0]:keep=4"], precision: fp16}
"""


@pytest.fixture
def read(tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(text: str) -> RecipeFile:
        (tmp_path / "recipe.yaml").write_text(text)
        return read_recipes(tmp_path / "recipe.yaml")

    return run


def test_a_matrix_is_expanded(read) -> None:  # type: ignore[no-untyped-def]
    entries = read(MATRIX).entries
    pair = "pool-topk-encoder.block-0-keep=4"
    assert [entry.name for entry in entries] == [
        *("digits-plain-fp32", "digits-plain-fp16", "digits-tome-keep=0.5-fp32", "digits-tome-keep=0.5-fp16"),
        *(f"digits-{pair}-fp32", "said-plain-fp32", "said-tome-keep=0.5-fp32", f"said-{pair}-fp32"),
    ]
    first, last = entries[0], entries[-1]
    assert first.recipe == Recipe(model="demo:digits", targets=("openvino", "onnxruntime"), seed=1)
    pair_of_specs = ("pool", "topk@encoder.block[0]:keep=4")
    assert last.recipe == Recipe(model="demo:speech", targets=("openvino",), seed=3, compress=pair_of_specs)
    assert (first.gates.size, first.gates.tokens) == (2 * 2**20, 60)
    assert (last.gates.size, last.gates.tokens) == (2 * 2**20, 90)


def test_a_recipe_without_a_matrix_is_one_entry(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    entries = read("model: org/some-model\ntargets: onnxruntime\ncompress: pool\n").entries
    assert [(e.name, e.recipe.compress, e.recipe.targets) for e in entries] == [("some-model", ("pool",), ("onnxruntime",))]
    # What a bundle holds is read again as what was written.
    (tmp_path / "recipe.yaml").write_text(entries[0].recipe.to_yaml())
    assert read_recipe(tmp_path) == entries[0].recipe
    read(MATRIX)
    with pytest.raises(InputError, match="matrix of 8 recipes"):
        read_recipe(tmp_path)


ONE = "model: a\ntargets: b\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (ONE + "batch: two\n", 3, ["batch", "valid integer", "'two'"]),
        (ONE + "batch: 0\n", 3, ["batch", "greater than or equal to 1"]),
        (ONE + "input_shapes:\n  x:\n    - 1\n    - many\n", 6, ["input_shapes.x.1"]),
        (ONE + "matrix:\n  precison: [fp32]\n", 4, ["'precison'", "did you mean 'precision'"]),
        (ONE + "matrix:\n  batch:\n  - 1\n  - 0\n", 6, ["batch", "greater than"]),
        (ONE + "matrix:\n  batch:\n  - batch: 2\n    sed: 3\n", 6, ["'sed'", "did you mean 'seed'"]),
        (ONE + "matrix:\n  batch:\n  - seed: 3\n", 5, ["must have the key 'batch'"]),
        (ONE + "matrix:\n  seed: [1]\n  batch:\n  - {batch: 1, seed: 3}\n", 6, ["seed is an axis"]),
        (ONE + "matrix:\n  seed: [{seed: 1, batch: 3}]\n  precision: [{precision: fp32, batch: 2}]\n", 5, ["also set by"]),
        (ONE + "matrix:\n  seed: 3\n", 4, ["a list of one value or more"]),
        (ONE + "matrix: [1]\n", 3, ["the matrix is a mapping"]),
        (ONE + "model: c\n", 3, ["'model' is there already, on line 1"]),
        (ONE + "3: c\n", 3, ["a key must be a word"]),
        (ONE + "gates:\n  sise: 3\n", 4, ["'sise'", "did you mean 'size'"]),
        (ONE + "gates:\n  size: 3 Mbit\n", 4, ["'Mbit' is no unit"]),
        (ONE + "gates: [1]\n", 3, ["gates is a mapping"]),
        (ONE + "gates: {latency_ratio: 1}\n", 3, ["need a `baseline`"]),
        (ONE + "gates: {latency_ratio: 1, baseline: c}\n", 3, ["baseline", "'c'", "known: a"]),
        (ONE + "gates: {accuracy: 0.5}\n", 3, ["need `data`"]),
        (ONE + "regressions:\n  size: 1\n", 3, ["'record' is missing"]),
        (ONE + "exclude:\n- model: z\n", 4, ["excludes nothing"]),
        (ONE + "name: ../up\n", 3, ["no name of a folder"]),
        ("model: [a]\ntargets: b\n", 1, ["model", "valid string"]),
        ("model: a\ntargets: []\n", 2, ["targets", "at least 1"]),
        ("model: a\ntargets: b\nmatrix:\n  compress: [topk@encoder.block[0]]\n", 4, ["is not YAML", "needs quotes"]),
    ],
)
def test_faults_are_named_with_their_line(read, tmp_path: Path, text: str, line: int, words: list[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as caught:
        read(text)
    for word in (f"recipe.yaml:{line}", *words):
        assert word in str(caught.value), (word, str(caught.value))


NESTED = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)
MANY = ", ".join(map(str, range(1, 200)))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "is no recipe"),
        ("x: &a [*a]\n", "more than 20000"),
        (NESTED, "more than"),
        (ONE + f"matrix: {{seed: [{MANY}], batch: [{MANY}]}}", "39601 entries"),
        ("targets: b\nmatrix: {model: [a/c, b/c]}\n", "two entries have the name 'c'"),
        (ONE + "matrix: {seed: [1]}\nexclude: [{seed: 1}]\n", "nothing is left"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_hostile_and_empty_files(read, text: str, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"recipe\.yaml") as caught:
        read(text)
    assert word in str(caught.value)
