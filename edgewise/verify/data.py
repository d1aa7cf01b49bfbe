"""Data to run artifacts on, and their accuracy on labelled data: arrays from a file or a demo's test split, in batches of a static
shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewise import demos
from edgewise.bundle import Bundle, Component
from edgewise.calibration import Port, Samples, metric, open_source, survey
from edgewise.calibration.data import arrays_of
from edgewise.calibration.pixels import as_pixels
from edgewise.calibration.samples import spread
from edgewise.errors import InputError, unknown
from edgewise.targets import Session, choose, load, runnable


@dataclass(frozen=True)
class Data:
    """Arrays by name, `(samples, *shape)`; `labels (samples,)` where there are some. `name` is what the user wrote."""

    name: str
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None


def load_data(src: str) -> Data:
    """Load `demo:NAME`, an `.npz` or a `.safetensors` file. Raises InputError."""
    if src.startswith("demo:"):
        name = src.removeprefix("demo:")
        if name not in demos.names():
            raise unknown("demo data", name, demos.names())
        split = demos.split(name)
        if split is None:
            raise InputError(f"{src} has images and questions, and no arrays: see edgewise.demos.scenes.examples")
        return Data(src, dict(split.inputs), split.labels)
    path = Path(src)
    if path.is_dir() or path.suffix not in (".npz", ".safetensors"):
        raise InputError(f"{path}: inputs are given as demo:NAME[index], an .npz or a .safetensors file")
    return Data(src, arrays_of(path), None)


def load_feeds(src: str, component: Component, preprocessing: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Inputs for one run: the arrays of a file, or the samples of `demo:NAME[index]` from `index` on, as many as the
    batch holds, in pixels where the `preprocessing` of the bundle says so. Raises InputError."""
    match = re.fullmatch(r"(demo:[^\[\]]*)\[(\d+)\]", src)
    if not src.startswith("demo:"):
        return load_data(src).inputs
    if match is None:
        raise InputError(f"--inputs {src!r} names no sample: give {src.split('[')[0]}[0], for example")
    data, index = load_data(match.group(1)), int(match.group(2))
    _check_inputs(data, component)
    assert data.labels is not None
    if index >= len(data.labels):
        raise InputError(f"{src}: the index goes from 0 to {len(data.labels) - 1}")
    return as_pixels(_batch(data, component, index), preprocessing, src)


Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Called with a text and a total; gives what is called with how many of them are done."""


def uncounted(text: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A counter that tells nobody."""
    return nullcontext(lambda done: None)


def accuracy(
    bundle: Bundle,
    src: str,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    counter: Counter = uncounted,
    say: Callable[[str], None] = lambda text: None,
    most: int | None = None,
    function: str | None = None,
) -> list[dict[str, Any]]:
    """Top-1 accuracy of every artifact that can run here, over all of the labelled data, or `most` samples spread evenly over it;
    what was odd about it is said as notes."""
    known: dict[str, Samples] = {}
    scores = []
    for artifact in runnable(choose(bundle, targets, function))[0]:
        component = bundle.manifest.component(artifact.role)
        if artifact.role not in known:
            ports = {info.name: Port(info.shape, info.dtype) for info in component.inputs}
            source = open_source(src, ports, bundle.manifest.preprocessing, dict(enumerate(bundle.manifest.classes)))
            if not source.labelled:
                raise InputError(f"{src} has no labels: {source.unlabelled}")
            known[artifact.role] = survey(source, ports, spread(len(source), len(source) if most is None else most))
            for note in known[artifact.role].notes:
                say(f"note: {note}")
        samples = known[artifact.role]
        with (
            load(bundle, artifact, threads=threads) as session,
            counter(f"accuracy of {artifact.label}", samples.count) as count,
        ):
            top1 = metric.accuracy(_counted(session, samples, count), samples)
        correct = round(top1 * samples.count)
        scores.append({"artifact": artifact.label, "samples": samples.count, "correct": correct, "top1": top1})
    return scores


def _counted(session: Session, samples: Samples, count: Any) -> metric.Run:
    """Run a session, and tell how many samples are done."""
    done = 0

    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal done
        done = min(samples.count, done + samples.batch)
        count(done)
        return session.run_anew(feed)

    return run


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
