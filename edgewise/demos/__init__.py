"""Small models that are shipped with the package, really trained, each with its test split. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Split:
    """A labelled test split: model-ready `inputs` by name, `(samples, *shape)`, and `labels (samples,)`."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray


def names() -> list[str]:
    """The names behind `demo:`."""
    return sorted(p.parent.name for p in _HERE.glob("*/config.json"))


def folder(name: str) -> Path:
    """The Hugging Face folder of a demo model."""
    return _HERE / name


@cache
def split(name: str) -> Split:
    """The whole test split of a demo model, in fp32."""
    with np.load(_HERE / name / "split.npz", allow_pickle=False) as data:
        inputs = {key: data[key].astype(np.float32) for key in data.files if key != "labels"}
        return Split(inputs, data["labels"].astype(np.int64))
