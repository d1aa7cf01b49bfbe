"""Data to run artifacts on, and their accuracy on labelled data: arrays from a file or a demo's test split, in batches of a static
shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewise import demos
from edgewise.bundle import Bundle, Component
from edgewise.errors import InputError, unknown
from edgewise.targets import Session, choose, load, runnable


@dataclass(frozen=True)
class Data:
    """Arrays by name, `(samples, *shape)`; `labels (samples,)` where there are some. `name` is what the user wrote."""

    name: str
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None


def load_data(src: str, *, labels: bool) -> Data:
    """Load `demo:NAME`, an `.npz` or a `.safetensors` file.

    With `labels`, an array `labels` is taken out of the inputs and must be there. Raises InputError.
    """
    if src.startswith("demo:"):
        name = src.removeprefix("demo:")
        if name not in demos.names():
            raise unknown("demo data", name, demos.names())
        split = demos.split(name)
        if split is None:
            raise InputError(f"{src} has images and questions, and no arrays: see edgewise.demos.scenes.examples")
        return Data(src, dict(split.inputs), split.labels)
    arrays = _arrays(Path(src))
    found = arrays.pop("labels", None) if labels else None
    if labels:
        if found is None:
            raise InputError(f"{src} has no array 'labels'; it has: {', '.join(sorted(arrays)) or 'nothing'}")
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise InputError(f"{src}: labels must be whole numbers (samples,), not {found.dtype} {found.shape}")
        for name, array in arrays.items():
            if array.ndim == 0 or len(array) != len(found):
                raise InputError(f"{src}: {name} has shape {array.shape}, and there are {len(found)} labels")
        if len(found) == 0:
            raise InputError(f"{src} has no samples")
    return Data(src, arrays, found)


def load_feeds(src: str, component: Component) -> dict[str, np.ndarray]:
    """Inputs for one run: the arrays of a file, or the samples of `demo:NAME[index]` from `index` on, as many as the
    batch holds. Raises InputError."""
    match = re.fullmatch(r"(demo:[^\[\]]*)\[(\d+)\]", src)
    if not src.startswith("demo:"):
        return load_data(src, labels=False).inputs
    if match is None:
        raise InputError(f"--inputs {src!r} names no sample: give {src.split('[')[0]}[0], for example")
    data, index = load_data(match.group(1), labels=False), int(match.group(2))
    _check_inputs(data, component)
    assert data.labels is not None
    if index >= len(data.labels):
        raise InputError(f"{src}: the index goes from 0 to {len(data.labels) - 1}")
    return _batch(data, component, index)


Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Called with a text and a total; gives what is called with how many of them are done."""


def _uncounted(text: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def accuracy(
    bundle: Bundle,
    data: Data,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    counter: Counter = _uncounted,
) -> list[dict[str, Any]]:
    """Top-1 accuracy of every artifact that can run here, over all of the labelled data."""
    assert data.labels is not None
    scores = []
    for artifact in runnable(choose(bundle, targets))[0]:
        component = bundle.manifest.component(artifact.role)
        _check_inputs(data, component)
        with (
            load(bundle, artifact, threads=threads) as session,
            counter(f"accuracy of {artifact.label}", len(data.labels)) as count,
        ):
            predicted = predict(session, component, data, count)
        correct = int((predicted == data.labels).sum())
        total = len(data.labels)
        scores.append({"artifact": artifact.label, "samples": total, "correct": correct, "top1": correct / total})
    return scores


def predict(session: Session, component: Component, data: Data, count: Any = None) -> np.ndarray:
    """The class with the highest score for every sample, `(samples,)`; the last sample fills the last batch up."""
    assert data.labels is not None
    batch, total = _batch_size(component), len(data.labels)
    scores = _class_scores(component, batch)
    predicted = np.empty(total, np.int64)
    for start in range(0, total, batch):
        outputs = session.run(_batch(data, component, start))
        left = min(batch, total - start)
        predicted[start : start + left] = outputs[scores].argmax(-1)[:left]
        if count is not None:
            count(start + left)
    return predicted


def _batch(data: Data, component: Component, start: int) -> dict[str, np.ndarray]:
    feeds = {}
    for info in component.inputs:
        array = data.inputs[info.name]
        rows = np.minimum(np.arange(start, start + info.shape[0]), len(array) - 1)
        feeds[info.name] = array[rows].astype(info.dtype, casting="same_kind")
    return feeds


def _check_inputs(data: Data, component: Component) -> None:
    for info in component.inputs:
        if info.name not in data.inputs:
            has = ", ".join(sorted(data.inputs)) or "nothing"
            raise InputError(f"{data.name} has no array for the input '{info.name}'; it has: {has}")
        array = data.inputs[info.name]
        given, wanted = array.shape[1:], info.shape[1:]
        if given != wanted:
            raise InputError(f"{data.name}: {info.name} has samples of shape {given}, and the bundle takes {wanted}")
        if not np.can_cast(array.dtype, info.dtype, "same_kind"):
            raise InputError(f"{data.name}: {info.name} is {array.dtype}, and the bundle takes {info.dtype}")


def _batch_size(component: Component) -> int:
    sizes = {info.shape[0] if info.shape else 0 for info in component.inputs}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"the inputs of {component.role} have no common batch dimension: {sorted(sizes)}")
    return sizes.pop()


def _class_scores(component: Component, batch: int) -> str:
    """The output that holds class scores `(batch, classes)`: `logits`, or the only one of that form."""
    matrices = [info for info in component.outputs if len(info.shape) == 2 and info.shape[0] == batch]
    fits = [info.name for info in matrices if "float" in info.dtype]
    if "logits" in fits:
        return "logits"
    if len(fits) != 1:
        shapes = ", ".join(f"{info.name} {info.shape}" for info in component.outputs)
        raise InputError(f"accuracy needs one output of class scores (batch, classes), not: {shapes}")
    return fits[0]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: give demo:NAME, an .npz or a .safetensors file")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give demo:NAME, an .npz or a .safetensors file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
    except Exception as error:
        # Damaged files raise nearly anything: zlib and zip errors, KeyError, EOFError, SafetensorError.
        raise InputError(f"cannot read {path}: {str(error) or type(error).__name__}") from error
    raise InputError(f"{path}: arrays are read from .npz and .safetensors files")
