"""Data sources: one way to read samples for a model, whatever they are kept in.

A source knows how many samples it has and reads one at a time, so that memory does not grow with their number. Files are
decoded and made into inputs when they are read.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgewise import demos
from edgewise.calibration.pixels import as_pixels
from edgewise.errors import InputError, unknown

MOST_ITEMS = 1024
"""Of an iterable that can be gone through once, which is kept in memory, the most items that are taken."""


@dataclass(frozen=True)
class Port:
    """What one input takes: its static shape, whose first dimension is the batch, and its dtype (a NumPy name)."""

    shape: tuple[int, ...]
    dtype: str


MOST_CLASSES = 1 << 31
"""Far more than any model has."""


Ports = Mapping[str, Port]


@dataclass(frozen=True)
class Sample:
    """One sample: inputs without the batch dimension, its class or text where it has one (of a `question` the answer), where it is
    from, and what was done to make it fit."""

    inputs: dict[str, np.ndarray]
    label: int | None = None
    text: str | None = None
    where: str = ""
    notes: tuple[str, ...] = ()
    question: str | None = None


class Source(ABC):
    """Samples by number. `name` is what the user wrote; `labelled`, `texts` and `questions` say whether every sample has a class,
    a text, or a question."""

    name: str
    labelled: bool = False
    texts: bool = False
    questions: bool = False
    apart: Source | None = None
    """Where metrics are measured, if not on other samples of this one."""
    unlabelled = "an array 'labels', a column 'label', or a folder for each class"
    """What data of this kind that has no labels lacks, for messages."""
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """The place of a sample, for messages."""

    @abstractmethod
    def _read(self, index: int) -> Sample: ...

    def read(self, index: int) -> Sample:
        """A sample. Raises `InputError` if it cannot be read, holds NaN or infinity, or is of no class that can be."""
        sample = self._read(index)
        for name, array in sample.inputs.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise InputError(f"{self.where(index)}: {name} holds NaN or infinity")
        if sample.label is not None:
            class_number(sample.label, self.where(index))
        return sample


@dataclass
class Arrays(Source):
    """Arrays by input name, `(samples, *shape)`, with `labels (samples,)` or texts, and questions."""

    name: str
    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None
    text: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    asked: tuple[str, ...] | None = None
    labelled: bool = field(init=False)
    texts: bool = field(init=False)
    questions: bool = field(init=False)

    def __post_init__(self) -> None:
        self.labelled, self.texts, self.questions = self.labels is not None, self.text is not None, self.asked is not None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def where(self, index: int) -> str:
        return f"sample {index} of {self.name}"

    def _read(self, index: int) -> Sample:
        label = None if self.labels is None else int(self.labels[index])
        text = None if self.text is None else self.text[index]
        question = None if self.asked is None else self.asked[index]
        return Sample({k: v[index] for k, v in self.arrays.items()}, label, text, self.where(index), question=question)


@dataclass
class Items(Source):
    """Items of Python: each a mapping of arrays by input name (with or without a batch dimension of 1), an array, a pair of one of
    these and a label or a text, or one of these with a question and its answer."""

    name: str
    items: tuple[Any, ...]
    ports: Ports
    notes: tuple[str, ...] = ()
    labelled: bool = field(init=False)
    texts: bool = field(init=False)
    questions: bool = field(init=False)

    def __post_init__(self) -> None:
        parts = [self._parts(item) for item in self.items]
        kinds = {type(target) for _, target, _ in parts}
        self.labelled, self.texts = kinds == {int}, kinds == {str}
        self.questions = all(question is not None for _, _, question in parts)

    def __len__(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        return f"item {index} of {self.name}"

    def _parts(self, item: Any) -> tuple[Any, int | str | None, str | None]:
        """Inputs, a label or a text, and a question."""
        if isinstance(item, list) and len(item) == 2 and hasattr(item[0], "__len__"):  # as loaders of batches give pairs
            item = tuple(item) if _target(item[1]) is not None else item
        if not isinstance(item, tuple):
            return item, None, None
        if len(item) == 3 and all(isinstance(one, str) for one in item[1:]):
            return item[0], item[2], item[1]
        target = _target(item[1]) if len(item) == 2 else None
        if target is None:
            raise InputError(
                f"an item of {self.name} is a tuple, and so has to be of inputs and a label or a text, or of inputs, a question "
                "and its answer"
            )
        return item[0], target, None

    def _read(self, index: int) -> Sample:
        value, target, question = self._parts(self.items[index])
        if not isinstance(value, Mapping):
            if len(self.ports) != 1:
                raise InputError(f"{self.where(index)} is no mapping, and the model has inputs {', '.join(self.ports)}")
            value = {next(iter(self.ports)): value}
        inputs = {}
        for name, port in self.ports.items():
            if name not in value:
                raise InputError(f"{self.where(index)} has no input '{name}'; it has: {', '.join(value) or 'nothing'}")
            array = _array(value[name], f"{self.where(index)}: {name}")
            if array.shape == (1, *port.shape[1:]):
                array = array[0]
            inputs[name] = fitted(array, name, port, self.where(index))
        text = target if isinstance(target, str) else None
        return Sample(inputs, target if isinstance(target, int) else None, text, self.where(index), question=question)


def _target(value: Any) -> int | str | None:
    """A label, which may be an array or tensor of no dimensions, or a text; None for anything else."""
    if isinstance(value, str):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return int(value) if isinstance(value, int) else None


def _array(value: Any, what: str) -> np.ndarray:
    """Of an array, a tensor or nested lists."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value  # which NumPy lacks
        return np.asarray(value)
    except Exception as error:
        raise InputError(f"{what} is no array: {' '.join(str(error).split())}") from error


def class_number(number: int, where: str) -> int:
    """A label. Raises `InputError` if it is no number that a class can have."""
    if not 0 <= number < MOST_CLASSES:
        raise InputError(f"{where}: the label {str(number)[:40]!r} is no class number of 0 to {MOST_CLASSES - 1}")
    return number


def fitted(array: np.ndarray, name: str, port: Port, where: str) -> np.ndarray:
    """An array of one sample in the dtype of its input. Raises `InputError` if it does not fit."""
    if array.shape != port.shape[1:]:
        raise InputError(f"{where}: {name} has shape {array.shape}, and the model takes {port.shape[1:]}")
    if not np.can_cast(array.dtype, port.dtype, "same_kind"):
        raise InputError(f"{where}: {name} is {array.dtype}, and the model takes {port.dtype}")
    return array.astype(port.dtype, copy=False)


def open_source(
    src: Any, ports: Ports, preprocessing: Mapping[str, Any] | None = None, classes: Mapping[int, str] | None = None
) -> Source:
    """Open data for a model with these inputs.

    `src`: `demo:NAME`; a folder of images, recordings or videos, or of one such folder for each class; a `.csv`, `.tsv` or `.jsonl`
    manifest with a column `file` and one of `label` and `text`, or `question` and `answer`; an `.npz` or `.safetensors` of arrays
    by input name, with `labels` or `texts` of all samples, or `questions` and `answers`; or, in Python, a mapping of such arrays,
    or an iterable (see `Items`).

    `preprocessing`: the constants of the model's processor. `classes`: names of the model's classes by number.

    Raises `InputError` if there is nothing of that name or in it, or what is there does not fit the model.
    """
    if isinstance(src, Source):
        return src
    if isinstance(src, (str, os.PathLike)):
        try:
            return _named(str(src), Path(src), ports, dict(preprocessing or {}), classes)
        except OSError as error:
            raise InputError(f"cannot read {src}: {error.strerror or error}") from error
    if isinstance(src, Mapping):
        return _checked(_split("the data", {k: np.asarray(v) for k, v in src.items()}), ports)
    if not isinstance(src, Iterable):
        raise InputError(f"{type(src).__name__} is no data: give demo:NAME, a folder, a file, arrays by name, or an iterable")
    try:
        items = tuple(src) if isinstance(src, (list, tuple)) else tuple(islice(src, MOST_ITEMS + 1))
    except InputError:
        raise
    except Exception as error:  # of the user's own code
        raise InputError(f"the data cannot be gone through: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not items:
        raise InputError("the data holds no samples")
    if len(items) <= MOST_ITEMS or isinstance(src, (list, tuple)):
        return Items("the data", items, ports)
    note = f"only the first {MOST_ITEMS} items of the data were taken: give a list, or files, for more"
    return Items("the data", items[:MOST_ITEMS], ports, (note,))


def _named(
    name: str, path: Path, ports: Ports, preprocessing: Mapping[str, Any], classes: Mapping[int, str] | None
) -> Source:
    if name.startswith("demo:"):
        return _demo(name, ports, preprocessing)
    if path.suffix.lower() in (".npz", ".safetensors") and not path.is_dir():
        return _checked(_split(name, arrays_of(path)), ports)
    from edgewise.calibration.files import open_files

    return open_files(path, ports, preprocessing, classes)


def _demo(name: str, ports: Ports, preprocessing: Mapping[str, Any]) -> Source:
    short = name.removeprefix("demo:")
    if short not in demos.names():
        raise unknown("demo data", short, demos.names())
    split = demos.split(short)
    if split is not None:
        return _checked(Arrays(name, as_pixels(split.inputs, preprocessing, name), split.labels), ports)
    from edgewise.calibration.drawn import Scenes

    return Scenes(name, ports, preprocessing)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` or `.safetensors` file by name. Raises `InputError`."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give demo:NAME, an .npz or a .safetensors file")
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        from safetensors.numpy import load_file

        return dict(load_file(path))
    except Exception as error:
        # Damaged files raise nearly anything: zlib and zip errors, KeyError, EOFError, SafetensorError.
        raise InputError(f"cannot read {path}: {str(error) or type(error).__name__}") from error


def _split(name: str, arrays: dict[str, np.ndarray]) -> Arrays:
    """Arrays with the labels or texts taken out."""
    labels, texts, asked = arrays.pop("labels", None), arrays.pop("texts", None), arrays.pop("questions", None)
    texts = arrays.pop("answers", texts)
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(f"{name}: labels must be whole numbers (samples,), not {labels.dtype} {labels.shape}")
    for index, label in enumerate(() if labels is None else labels.tolist()):
        class_number(label, f"sample {index} of {name}")
    words = {kind: array for kind, array in (("texts", texts), ("questions", asked)) if array is not None}
    for kind, array in words.items():
        if array.ndim != 1 or array.dtype.kind not in "US":
            raise InputError(f"{name}: {kind} must be strings (samples,), not {array.dtype} {array.shape}")
    known = {**arrays, **({} if labels is None else {"labels": labels}), **words}
    counts = {k: len(v) if v.ndim else 0 for k, v in known.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{name}: the arrays have different numbers of samples: {counts}")
    if 0 in counts.values():
        raise InputError(f"{name} has no samples")
    said = {kind: tuple(str(one) for one in array) for kind, array in words.items()}
    return Arrays(name, arrays, labels, said.get("texts"), asked=said.get("questions"))


def _checked(source: Arrays, ports: Ports) -> Arrays:
    """The source with the inputs of the model alone, in their dtypes."""
    arrays = {}
    for name, port in ports.items():
        if name not in source.arrays:
            has = ", ".join(sorted(source.arrays)) or "nothing"
            raise InputError(f"{source.name} has no array for the input '{name}'; it has: {has}")
        array = source.arrays[name]
        if array.shape[1:] != port.shape[1:]:
            wanted = port.shape[1:]
            raise InputError(f"{source.name}: {name} has samples of shape {array.shape[1:]}, and the model takes {wanted}")
        if not np.can_cast(array.dtype, port.dtype, "same_kind"):
            raise InputError(f"{source.name}: {name} is {array.dtype}, and the model takes {port.dtype}")
        arrays[name] = array.astype(port.dtype, copy=False)
    return Arrays(source.name, arrays, source.labels, source.text, source.notes, source.asked)
