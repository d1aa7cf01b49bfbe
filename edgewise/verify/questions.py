"""Exact match of answers about images and recordings, and the questions with known answers that it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bundle import Bundle
from edgewise.demos import scenes
from edgewise.errors import InputError
from edgewise.runtime import GenerativePipeline, load_pipeline
from edgewise.targets import choose, joined_labels, runnable
from edgewise.verify.data import Counter, uncounted
from edgewise.verify.texts import plain, read_rows

DEMO = "demo:vqa"


@dataclass(frozen=True)
class Question:
    """A question about an image or a recording (a file, or a picture `(H, W, 3)` in uint8), and its answer."""

    media: Path | np.ndarray
    text: str
    answer: str


def answers_questions(bundle: Bundle) -> bool:
    """Whether a bundle answers questions about images or recordings. Raises InputError for one that answers about videos."""
    about = bundle.manifest.pipeline
    if about is None or about.kind not in ("vision-language", "audio-language"):
        return False
    if any(one.name == "pixel_values_videos" for one in bundle.manifest.component(about.order[0]).inputs):
        raise InputError(
            f"{bundle.path} answers about videos, and answers are measured about images and recordings only: leave --data out, and "
            "ask it with `edgewise run BUNDLE --video FILE --prompt TEXT`"
        )
    return True


def read_questions(src: str, most: int | None = None) -> list[Question]:
    """The questions of `demo:vqa`, or of a table (`.tsv`, or `.csv`) with the columns `file`, from its folder on, `question` and
    `answer`; at most `most`, the first ones. Raises InputError."""
    if src == DEMO:
        asked = scenes.examples("test", scenes.TEST if most is None else min(most, scenes.TEST))
        return [Question(one.image, one.question, one.answer) for one in asked]
    path = Path(src)
    if src.startswith("demo:") or path.is_dir() or path.suffix in (".npz", ".safetensors"):
        raise InputError(
            f"{src} has no questions: a vision-language model is measured on {DEMO}, or a table (.tsv or .csv) with the columns "
            "file, question and answer"
        )
    rows = read_rows(path, ("file", "question", "answer"), "questions with known answers")
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            if not value.strip():
                raise InputError(f"{path}: row {number} has no {column}")
    return [Question(path.parent / row["file"], row["question"], row["answer"]) for row in rows[:most]]


def exact_match(
    bundle: Bundle,
    src: str,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    counter: Counter = uncounted,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """The share of questions that every target that can run here answers rightly: with the known answer, compared as `plain`.
    Raises InputError where the data is not of such questions, and as `answers_questions` does."""
    answers_questions(bundle)
    about = bundle.manifest.pipeline
    if src == DEMO and about is not None and about.kind == "audio-language":
        raise InputError(
            f"{DEMO} asks about images, and this model about recordings: give a table (.tsv or .csv) with the columns file, "
            "question and answer"
        )
    asked = read_questions(src, most)
    scores = []
    for target, label in joined_labels(runnable(choose(bundle, targets))[0]).items():
        with (
            load_pipeline(bundle, target, threads=threads) as pipeline,
            counter(f"answers of {label}", len(asked)) as count,
        ):
            said = []
            for one in asked:
                said.append(_answer(pipeline, one))
                count(len(said))
        right = sum(plain(a) == plain(one.answer) for a, one in zip(said, asked, strict=True))
        scores.append(
            {
                "artifact": label,
                "samples": len(asked),
                "correct": right,
                "exact_match": right / len(asked),
                "answers": said,
            }
        )
    return scores


def _answer(pipeline: GenerativePipeline, asked: Question) -> str:
    return pipeline.generate(asked.text, asked.media).text
