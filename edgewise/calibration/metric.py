"""Metrics on labelled samples: a number of 0 to 1, the higher the better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from edgewise.calibration.samples import Samples
from edgewise.errors import InputError

_FEATURES = re.compile("embed|hidden|pooler|feature|attention|tokens")
"""What Hugging Face calls outputs that are no scores."""
Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""What a session does: outputs by name from inputs by name."""


def accuracy(run: Run, samples: Samples) -> float:
    """Share of samples whose class has the highest score. Raises `InputError` if the outputs hold no scores, or the labels do not
    fit them."""
    labels = samples.labels
    if labels is None:
        raise InputError(f"{samples.source.name} has no labels, and an accuracy cannot be computed without them")
    correct, start = 0, 0
    for feed in samples:
        outputs = run(feed)
        scores = outputs[class_scores({k: (v.shape, str(v.dtype)) for k, v in outputs.items()}, samples.batch)]
        if not start:
            check_labels(samples, scores.shape[1])
        here = labels[start : start + samples.batch]
        correct += int((scores.argmax(-1)[: len(here)] == here).sum())
        start += len(here)
    return correct / samples.count


def check_labels(samples: Samples, classes: int) -> None:
    """Raises `InputError` for the first sample whose label is none of the model's classes."""
    for index, label in zip(samples.indices, () if samples.labels is None else samples.labels.tolist(), strict=False):
        if not 0 <= label < classes:
            raise InputError(
                f"{samples.source.where(index)} has the label {label}, and the model has classes 0 to {classes - 1}"
            )


def class_scores(outputs: Mapping[str, tuple[tuple[int, ...], str]], batch: int) -> str:
    """The output that holds class scores `(batch, classes)`, of shapes and dtypes by name: `logits`, or the only one of that
    form whose name does not say that it holds features. Raises `InputError`."""
    fits = [k for k, (shape, dtype) in outputs.items() if len(shape) == 2 and shape[0] == batch and "float" in dtype]
    if "logits" in fits:
        return "logits"
    scores = [name for name in fits if not _FEATURES.search(name)]
    if len(scores) != 1:
        shapes = ", ".join(f"{name} {shape}" for name, (shape, _) in outputs.items())
        why = f" ({', '.join(fits)} holds features, and no scores)" if fits and not scores else ""
        raise InputError(f"accuracy needs one output of class scores (batch, classes), best named logits, not: {shapes}{why}")
    return scores[0]
