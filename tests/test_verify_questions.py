"""Answers about images: a model as a new user exports it, asks it, and measures the exact match of its answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli
from PIL import Image

from edgewise.demos import scenes
from edgewise.errors import InputError
from edgewise.verify.questions import read_questions

ASKED = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as files, with a table of questions whose last answer is wrong."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["file,question,answer"]
    for number, example in enumerate(scenes.examples("test", 4)):
        Image.fromarray(example.image).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{example.question},{'Nothing' if number == 3 else example.answer.upper()}.")
    (folder / "asked.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_from_the_demo_to_its_exact_match(cli: Cli, pictures: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    specs = ["--compress", "divprune@encoder.out:keep=98"]
    said = cli("export", "demo:vqa", *specs, "--target", "openvino", "--prompt-tokens", 32, "--new-tokens", 4, "-o", out)
    assert said.code == 0, said.err
    first = next(scenes.examples("test", 1))
    asked = ["run", out, "--image", pictures / "0.png", "--prompt", first.question]
    assert cli(*asked).out.strip() == first.answer
    # A file, and the picture that is drawn, are the same.
    whole = cli("verify", out, "--data", "demo:vqa", "--data-samples", ASKED, "--json").document
    (drawn,) = whole["exact_match"]
    assert drawn["artifact"] == "openvino/fp32" and drawn["samples"] == len(drawn["answers"]) == ASKED
    known = [example.answer for example in scenes.examples("test", ASKED)]
    right = sum(a == b for a, b in zip(drawn["answers"], known, strict=True))
    assert drawn["correct"] == right >= 0.8 * ASKED and drawn["exact_match"] == right / ASKED
    assert whole["accuracy"] is None and whole["wer"] is None and whole["passed"]
    (read,) = cli("verify", out, "--data", pictures / "asked.csv", "--json").document["exact_match"]
    assert read["answers"] == drawn["answers"][:4]
    assert read["correct"] == sum(a == b for a, b in zip(read["answers"][:3], known[:3], strict=True))
    assert "3 of 3 artifacts passed" in cli("verify", out, "--data", pictures / "asked.csv", "--data-samples", 1).out
    cli("verify", out, "--data", "demo:digits").refused("demo:digits has no questions", "demo:vqa", "answer")
    cli("verify", digits, "--data", "demo:vqa").refused("demo:vqa", "questions")
    cli("verify", out, "--data-samples", 3).refused("--data-samples goes with --data")
    cli("run", out, "--prompt", first.question).refused("no image", "--image FILE")
    cli("run", out, "--image", pictures / "0.png", "--prompt", "how " * 40).refused("this bundle takes 32")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("file,question\nx.png,what?\n", "no column answer"),
        ("file,text\nx.png,what?\n", "no column question and no column answer"),
        ("file,question,answer\nx.png,what?,red\ny.png,what?,\n", "row 2 has no answer"),
        ("", "no column file"),
    ],
)
def test_tables_that_are_none(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "asked.csv").write_text(text)
    with pytest.raises(InputError, match=fault):
        read_questions(str(tmp_path / "asked.csv"))
    with pytest.raises(InputError, match="cannot read"):
        read_questions(str(tmp_path / "absent.csv"))
