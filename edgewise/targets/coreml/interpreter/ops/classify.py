"""The outputs of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import op


@op("classify")
def classify(probabilities: np.ndarray, classes: Sequence[Any]) -> tuple[Any, np.ndarray]:
    """The best class, the first of equal ones, and the probabilities in the order of the classes."""
    flat = probabilities.reshape(-1)
    if len(classes) != flat.size or not flat.size:
        raise InputError(f"{flat.size} probabilities for {len(classes)} classes")
    best = classes[int(np.argmax(flat))]
    return np.array(best, object if isinstance(best, str) else np.int64), flat
