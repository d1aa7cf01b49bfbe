"""Metrics on labelled samples: a number of 0 to 1, the higher the better."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgewise.calibration.samples import Samples
from edgewise.errors import InputError

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
        here = labels[start : start + samples.batch]
        if len(here) and int(here.max()) >= scores.shape[1]:
            raise InputError(
                f"{samples.source.name} has the label {int(here.max())}, and the model has classes 0 to {scores.shape[1] - 1}"
            )
        correct += int((scores.argmax(-1)[: len(here)] == here).sum())
        start += len(here)
    return correct / samples.count


def class_scores(outputs: Mapping[str, tuple[tuple[int, ...], str]], batch: int) -> str:
    """The output that holds class scores `(batch, classes)`, of shapes and dtypes by name: `logits`, or the only one of that
    form."""
    fits = [k for k, (shape, dtype) in outputs.items() if len(shape) == 2 and shape[0] == batch and "float" in dtype]
    if "logits" in fits:
        return "logits"
    if len(fits) != 1:
        shapes = ", ".join(f"{name} {shape}" for name, (shape, _) in outputs.items())
        raise InputError(f"accuracy needs one output of class scores (batch, classes), not: {shapes}")
    return fits[0]
