"""Word error rates: the metric on texts counted by hand, and `verify` on a speech bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli
from tiny_speech import tiny_speech_folder

import edgewise
from edgewise.errors import InputError
from edgewise.verify.texts import plain
from edgewise.verify.wer import read_spoken, word_errors


def test_errors_are_counted() -> None:
    made = word_errors(["a b c d", "one two"], ["a x c", "one two three four"])
    assert (made.words, made.substitutions, made.deletions, made.insertions) == (6, 1, 1, 2)
    assert made.rate == pytest.approx(4 / 6)
    # Replaced where its arguments were swapped: a reference that is longer than the transcript has no insertions.
    assert word_errors(["a b c"], ["a"]).deletions == 2 and word_errors(["a"], ["a b c"]).rate == 2
    assert word_errors(["It's here."], ["it’s HERE"]).rate == 0 and word_errors(["a"], [""]).rate == 1


def test_texts_are_compared_without_marks() -> None:
    assert plain(" The  'forty-two line' Bible; of_1450,\n don't! ") == "the forty two line bible of 1450 don't"
    assert plain("Ça va? — Où") == "ça va où" and plain("...") == ""


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('file\tuse\ttext\nx.wav\twer\tsaid, "so"\ny.wav\tcalib\t\n')
    (tmp_path / "b.csv").write_text('file,text\nsub/x.wav,"said, so"\n')
    assert [(one.file, one.text) for one in read_spoken(tmp_path / "a.tsv")] == [(tmp_path / "x.wav", 'said, "so"')]
    assert [(one.file, one.text) for one in read_spoken(tmp_path / "b.csv")] == [
        (tmp_path / "sub" / "x.wav", "said, so")
    ]
    (tmp_path / "h.tsv").write_text('file\ttext\nx.wav\t"So\ny.wav\t"Yes" she\u2028said\n')
    assert [one.text for one in read_spoken(tmp_path / "h.tsv")] == ['"So', '"Yes" she\u2028said']
    (tmp_path / "c.tsv").write_text("name\ttext\nx\ty\n")
    (tmp_path / "d.tsv").write_text("file\ttext\nx.wav\t...\n")
    (tmp_path / "g.CSV").write_text("file,text\nx.wav,said, so\n")
    for name, fault in {
        "c.tsv": "no column file",
        "d.tsv": "no row with a text",
        "e.tsv": "cannot read",
        "f.npz": "cannot",
        "g.CSV": "line 2: it has 3 columns, and the first line 2",
    }.items():
        with pytest.raises(InputError, match=fault):
            read_spoken(tmp_path / name)


def test_verify_measures_it(cli: Cli, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    bundle = edgewise.export(
        str(tiny_speech_folder(tmp_path / "model")), tmp_path / "b", targets=["onnxruntime"], new_tokens=8
    )
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.normal(size=9000), 16000)
    with edgewise.load(bundle) as speech:
        texts = [speech.generate(tmp_path / f"{name}.wav").text for name in ("x", "y")]
    assert len(texts[0].split()) > 2
    rows = [f"{name}.wav\t{text} again" for name, text in zip(("x", "y"), texts, strict=True)]
    (tmp_path / "said.tsv").write_text("\n".join(["file\ttext", *rows]) + "\n")
    said = cli("verify", bundle.path, "--data", tmp_path / "said.tsv", "--json")
    assert said.code == 0, said.err
    (found,) = said.document["wer"]
    words = sum(len(text.split()) + 1 for text in texts)
    assert found["artifact"] == "onnxruntime/fp32" and found["words"] == words and found["transcripts"] == texts
    assert (found["deletions"], found["substitutions"], found["insertions"]) == (2, 0, 0) and found["wer"] == 2 / words
    assert said.document["accuracy"] is None and json.loads(said.out)["passed"]
    shown = cli("verify", bundle.path, "--data", tmp_path / "said.tsv")
    assert f"{2 / words:.2%}" in shown.out
    cli("verify", bundle.path, "--data", "demo:speech").refused("a table (.tsv or .csv)")
