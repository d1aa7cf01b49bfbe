"""Small models that are shipped with the package, really trained, each with its test split. Needs no torch.

A split of arrays lies beside the model as `split.npz`, or is drawn: `demo:motion`'s. `demo:vqa` is asked questions, and
its test split is `edgewise.demos.scenes.examples("test")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edgewise.demos import clips, scenes

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
def split(name: str) -> Split | None:
    """The whole test split of a demo model, in fp32; None for `vqa`, whose test split are questions, not arrays."""
    if name == "vqa":
        return None
    if name == "motion":
        pixels, labels = clips.whole_test_split()
        return Split({"pixel_values": pixels}, labels)
    with np.load(_HERE / name / "split.npz", allow_pickle=False) as data:
        inputs = {key: data[key].astype(np.float32) for key in data.files if key != "labels"}
        return Split(inputs, data["labels"].astype(np.int64))


def outline(name: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """The shape of one sample by input, and how many samples the test split has; nothing is drawn for it."""
    if name == "vqa":
        return {"pixel_values": (3, scenes.SIZE, scenes.SIZE)}, scenes.TEST
    if name == "motion":
        return {"pixel_values": (clips.FRAMES, 3, clips.SIZE, clips.SIZE)}, clips.TEST
    data = split(name)
    assert data is not None
    return {key: array.shape[1:] for key, array in data.inputs.items()}, len(data.labels)
