"""Quantise the lowered artifacts of an export: data for it, accuracy control, and what of it goes into the manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bundle.manifest import Calibration, Floating, Quantisation
from edgewise.calibration.control import PROBES, Candidate, Controlled, Sensitivity, Tell, keep_metric
from edgewise.calibration.metric import accuracy
from edgewise.calibration.samples import DEFAULT_SAMPLES, Samples, calibration_and_held_out
from edgewise.errors import InputError
from edgewise.exporter.data import open_for, ports_of
from edgewise.exporter.sources import Source
from edgewise.passes.program import Program
from edgewise.targets import Target
from edgewise.targets.base import Feeds, Lowering, Quantiser

NEED_DATA = ("w8a8",)
"""Precisions that need statistics of activations."""
NOTHING_LEFT = -200.0
"""Signal to noise in dB that stands for outputs that are not finite: JSON knows no infinity."""
HELD_OUT = 512
"""The most samples that accuracy control measures a metric on."""


@dataclass(frozen=True)
class Wish:
    """What was asked of the quantisation: the data, its samples, patterns of layers to leave out, the largest drop of the
    metric."""

    data: Any = None
    samples: int = DEFAULT_SAMPLES
    skip: tuple[str, ...] = ()
    max_drop: float | None = None


def needs_data(precision: str, targets: Sequence[Target]) -> bool:
    """Whether one of the targets gathers statistics for a precision."""
    return precision in NEED_DATA and any(precision in target.quantises for target in targets)


def check(wish: Wish, precisions: Sequence[str], targets: Sequence[Target], model: object) -> Wish:
    """The wish, with the data of a demo where it has none and needs some. Raises `InputError` if it does not fit the precisions."""
    unable = [target.name for target in targets if not set(precisions) & set(target.quantises)]
    precision = next((one for one in precisions if needs_data(one, targets)), precisions[0])
    needed = needs_data(precision, targets) or (wish.max_drop is not None and len(unable) < len(targets))
    for given, name in ((wish.skip, "layers to skip"), (wish.max_drop is not None, "a largest drop")):
        if given and unable:
            raise InputError(f"{name}: target {unable[0]} quantises no layers one by one at precision {' and '.join(precisions)}")
    if wish.data is not None and not needed:
        raise InputError(f"precision {' and '.join(precisions)} takes no calibration data: it has no statistics to gather")
    if wish.samples < 1:
        raise InputError(f"{wish.samples} calibration samples: give 1 or more")
    if needed and wish.data is None:
        if not (isinstance(model, str) and model.startswith("demo:")):
            why = f"precision {precision}" if precision in NEED_DATA else "accuracy control"
            raise InputError(
                f"{why} needs calibration data: give --calib SRC (calibration= in Python), a folder of images, recordings or "
                "videos, a manifest, an .npz, or demo:NAME"
            )
        return Wish(model, wish.samples, wish.skip, wish.max_drop)
    return wish


@dataclass(frozen=True)
class Data:
    """Samples for statistics, and others for a metric."""

    samples: Samples
    held_out: Samples | None
    added: Mapping[str, np.ndarray]
    """Values of the inputs that compression added to the program, which no data has."""

    @property
    def described(self) -> Calibration:
        return Calibration(data=self.samples.source.name, samples=self.samples.count, digest=self.samples.digest)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.samples.notes, *(self.held_out.notes if self.held_out is not None else ()))

    def feeds(self, samples: Samples) -> Feeds:
        return _Fed(samples, self.added)


@dataclass(frozen=True)
class _Fed:
    samples: Samples
    added: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return ({**feed, **self.added} for feed in self.samples)


Check = Callable[[Samples, Samples | None], Samples | None]
"""Raises `InputError` if samples for statistics, and others for a metric, lack what they are for; gives of the others those that
the metric can be measured on."""


def with_classes(samples: Samples, held_out: Samples | None) -> Samples | None:
    """What an accuracy is measured on."""
    if held_out is not None and held_out.labels is None:
        raise InputError(
            f"{samples.source.name} has no labels, and accuracy control measures an accuracy: give "
            f"labelled data ({samples.source.unlabelled})"
        )
    return held_out


def gather(wish: Wish, source: Source, program: Program, check: Check = with_classes) -> Data | None:
    """Open and look at the data; None if none is wanted. Raises `InputError`."""
    if wish.data is None:
        return None
    opened, ports = open_for(wish.data, program, source), ports_of(program)
    wanted = 0 if wish.max_drop is None else HELD_OUT
    samples, held_out = calibration_and_held_out(opened, ports, wish.samples, wanted)
    added = {k: program.inputs[k].numpy() for k in program.added}
    return Data(samples, check(samples, held_out), added)


def skipped(layers: Sequence[str], patterns: Sequence[str], target: str) -> list[str]:
    """The layers whose names match a pattern. Raises `InputError` for one that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            near = get_close_matches(pattern, layers, n=1, cutoff=0.3)
            text = f": did you mean {near[0]!r}?" if near else ""
            raise InputError(f"no layer of the {target} artifact matches {pattern!r}{text} There are {len(layers)} layers")
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def quantise(
    target: Target,
    files: Sequence[Path],
    made_of: Lowering,
    precision: str,
    wish: Wish,
    data: Data | None,
    folder: Path,
    stem: str,
    tell: Tell,
    leaders: dict[str, Quantiser],
) -> tuple[list[Path], Quantisation, tuple[str, ...]]:
    """Quantise a lowered artifact into `folder`; gives the files, what was done, and what was odd. `leaders`: by target, what the
    quantiser follows (see `Quantiser.follow`); the first one is kept there."""
    tell(f"quantise for {target.name}")
    feeds = data.feeds(data.samples) if data is not None and precision in NEED_DATA else None
    quantiser = target.quantiser(files, precision, feeds, made_of=made_of)
    if target.name in leaders:
        quantiser.follow(leaders[target.name])
    leaders.setdefault(target.name, quantiser)
    kept = skipped(quantiser.layers, wish.skip, target.name)
    controlled = None
    if wish.max_drop is not None:
        assert data is not None and data.held_out is not None
        controlled = _control(target, quantiser, kept, data, wish.max_drop, tell)
    floating = [one.layer for one in controlled.floating] if controlled is not None else []
    written = target.finish(quantiser.write(folder, stem, [*kept, *floating]))
    return written, record_of(quantiser, kept, data, controlled), tuple(f"{target.name}: {note}" for note in quantiser.notes)


def _control(
    target: Target, quantiser: Quantiser, kept: Sequence[str], data: Data, max_drop: float, tell: Tell
) -> Controlled:
    held_out = data.held_out
    assert held_out is not None
    with tempfile.TemporaryDirectory(prefix="edgewise-") as place, ExitStack() as last:

        def make(floating: Collection[str]) -> Candidate:
            last.close()  # one artifact is loaded at a time
            written = quantiser.write(Path(place), "candidate", [*kept, *floating])
            session = last.enter_context(target.rehearse(written))

            def run(feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
                return session.run({**feed, **data.added})

            return Candidate(run, sum(one.stat().st_size for one in written), lambda: accuracy(run, held_out))

        free = [layer for layer in quantiser.layers if layer not in kept]
        return keep_metric(free, make, list(held_out.first(PROBES)), max_drop, tell)


def record_of(
    quantiser: Quantiser,
    kept: Sequence[str],
    data: Data | None,
    controlled: Controlled | None,
    metric: str = "accuracy",
    own: Callable[[Sensitivity], Sensitivity | None] = lambda one: one,
) -> Quantisation:
    """What the manifest says of it. `own`: what of a sensitivity is of this artifact, where several were controlled together."""
    made = Quantisation(layers=len(quantiser.layers), skipped=tuple(kept))
    if controlled is None or data is None or data.held_out is None:
        return made
    return made.model_copy(
        update={
            "floating": _layers([one for one in map(own, controlled.floating) if one is not None]),
            "sensitivity": _layers([one for one in map(own, controlled.ranked) if one is not None]),
            "metric": metric,
            "held_out": data.held_out.count,
            "unquantised": controlled.reference,
            "all_quantised": controlled.before,
            "result": controlled.after,
        }
    )


def _layers(found: Sequence[Sensitivity]) -> tuple[Floating, ...]:
    noise = {one.layer: None if one.sqnr_db is None else max(one.sqnr_db, NOTHING_LEFT) for one in found}
    return tuple(Floating(layer=one.layer, sqnr_db=noise[one.layer], bytes=max(0, one.bytes)) for one in found)
