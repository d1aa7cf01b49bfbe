"""Data for a program: a source opened for its inputs, and samples of it as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgewise import demos
from edgewise.calibration.data import Port, Ports, open_source
from edgewise.calibration.data import Source as DataSource
from edgewise.calibration.samples import Samples, spread, survey
from edgewise.errors import InputError, unknown
from edgewise.exporter.sources import Source
from edgewise.passes.program import Program


def check_named(src: str) -> None:
    """Raise `InputError` if there is no data of this name: before a model is loaded for it."""
    if src.startswith("demo:"):
        name = src.removeprefix("demo:")
        if name not in demos.names():
            raise unknown("demo data", name, demos.names())
    elif not Path(src).exists():
        raise InputError(f"{src} does not exist: give demo:NAME, a folder of files, a manifest, an .npz or a .safetensors file")


def ports_of(program: Program) -> Ports:
    """The inputs that the data of a program has to give: not those that compression added."""
    known = {k: v for k, v in program.inputs.items() if k not in program.added}
    return {k: Port(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in known.items()}


def open_for(src: Any, program: Program, source: Source) -> DataSource:
    """Open data (see `open_source`) for a program of this model."""
    return open_source(src, ports_of(program), source.preprocessing, dict(enumerate(class_names(source))))


def class_names(source: Source) -> tuple[str, ...]:
    """The names of a model's classes by number; none where its configuration holds no more than numbers."""
    known = getattr(getattr(source.module, "config", None), "id2label", None) or {}
    named = {int(number): str(name) for number, name in known.items()}
    numbered = all(name == f"LABEL_{number}" for number, name in named.items())
    return () if numbered or sorted(named) != list(range(len(named))) else tuple(named[i] for i in range(len(named)))


def collected(src: Any, program: Program, source: Source, samples: int) -> tuple[Samples, dict[str, np.ndarray]]:
    """At most so many samples, spread evenly over the data, and their inputs `(samples, *shape)` by name."""
    opened = open_for(src, program, source)
    chosen = survey(opened, ports_of(program), spread(len(opened), samples))
    rows = [opened.read(index).inputs for index in chosen.indices]
    return chosen, {name: np.stack([row[name] for row in rows]) for name in chosen.ports}
