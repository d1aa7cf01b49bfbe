"""Word error rates of a speech bundle, for `edgewise verify --data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.runtime import load_pipeline
from edgewise.targets import choose, joined_labels, runnable
from edgewise.verify.wer import read_spoken, word_errors

Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def is_speech(bundle: Bundle) -> bool:
    """Whether a bundle writes down what is said."""
    return bundle.manifest.pipeline is not None and bundle.manifest.pipeline.kind == "speech"


def word_error_rates(
    bundle: Bundle, src: str, targets: Sequence[str] | None, threads: int | None, counter: Counter, most: int | None = None
) -> list[dict[str, Any]]:
    """The word error rate of every target that can run here, on the recordings of a table with known texts: all, or the first
    `most`."""
    if src.startswith("demo:") or Path(src).suffix in (".npz", ".safetensors"):
        raise InputError(
            f"--data {src}: a speech model is measured on a table (.tsv or .csv) with the columns file and text"
        )
    data = read_spoken(Path(src))[:most]
    scores = []
    for target, label in joined_labels(runnable(choose(bundle, targets))[0]).items():
        with (
            load_pipeline(bundle, target, threads=threads) as speech,
            counter(f"word error rate of {label}", len(data)) as count,
        ):
            said = []
            for one in data:
                said.append(speech.generate(one.file).text)
                count(len(said))
        errors = word_errors([one.text for one in data], said)
        scores.append(
            {
                "artifact": label,
                "samples": len(data),
                "words": errors.words,
                "substitutions": errors.substitutions,
                "deletions": errors.deletions,
                "insertions": errors.insertions,
                "wer": errors.rate,
                "transcripts": said,
            }
        )
    return scores
