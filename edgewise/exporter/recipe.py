"""Recipes: all that is needed to make a bundle again, and what its figures are held to."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from edgewise.schema import Strict

FILE = "recipe.yaml"


def _several(value: Any) -> Any:
    """One word stands for a list of one; nothing for an empty list."""
    return () if value is None else (value,) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Recipe(Strict):
    """What is asked of an export: one bundle. `compress_variants` are other compressions, which become further functions of its
    artifacts; `image_input`: they take images; `input_shapes` by input name; `devices` that artifacts are built for ahead of time;
    `images` of a prompt, `prompt_tokens`, `new_tokens` of a generative model (None: the default); `calibration` (data by name),
    `calibration_samples`, `skip_quant` (patterns of layers) and `max_drop` of the quantisation.

    The fields have the names of the arguments of `edgewise.export`, and `recipe.yaml` in a bundle holds all of them.
    """

    model: str
    compress: Words = ()
    compress_variants: Words = ()
    targets: Annotated[Words, Field(min_length=1)]
    precision: str = "fp32"
    image_input: bool = False
    devices: Words = ()
    input_shapes: dict[str, tuple[int, ...]] = {}
    batch: Annotated[int, Field(ge=1)] = 1
    images: Annotated[int, Field(ge=1)] = 1
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    new_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    calibration: str | None = None
    calibration_samples: Annotated[int, Field(ge=1)] = 128
    skip_quant: Words = ()
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None

    def to_yaml(self) -> str:
        """The recipe as YAML, with sorted keys: the same recipe gives the same text."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=True, allow_unicode=True))


_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def bytes_of(value: Any) -> Any:
    """Bytes, of a text that has a unit (`2 MiB`); anything else as it is. Raises ValueError for an unknown unit."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]+)\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    if match is None:
        return value
    if match[2].lower() not in _UNITS:
        raise ValueError(f"{match[2]!r} is no unit of bytes: give one of B, kB, MB, GB, KiB, MiB, GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Limit = Annotated[float, Field(ge=0)]


class Gates(Strict):
    """The limits of the figures of every artifact. None: there is no limit, and what nothing else needs is not measured.

    - `size`: most bytes of an artifact's files (`2 MiB` is read too). `tokens`: most tokens behind the last site.
    - `lowering_error`: greatest relative error of the artifact against its program.
    - `accuracy`: least top-1 accuracy (or exact match, of a model that answers questions) on `data`, and `accuracy_drop`: most
      that may be lost of the baseline's, both as shares.
    - `latency_ratio`: greatest median time / the baseline's, both measured here in turns.
    - `baseline`: the name of a bundle of the same build. `data`: `demo:NAME`, or an `.npz` of inputs and `labels`. `data_samples`:
      how many of it, spread evenly; None: all.
    - `samples`, `seconds`: least runs, and least time of the runs, of each artifact whose latency is measured. `threads`: of the
      runtime.
    """

    size: Annotated[int | None, BeforeValidator(bytes_of), Field(ge=0)] = None
    tokens: Annotated[int | None, Field(ge=0)] = None
    lowering_error: Limit | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    accuracy_drop: Annotated[float, Field(ge=-1, le=1)] | None = None
    latency_ratio: Limit | None = None
    baseline: str | None = None
    data: str | None = None
    data_samples: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=1)] = 30
    seconds: Annotated[float, Field(ge=0)] = 1.0
    threads: Annotated[int, Field(ge=1)] | None = None


class Regressions(Strict):
    """How much worse than in the earlier `record` the figures of an artifact may be.

    `size`, `tokens`, `lowering_error` and `latency_ratio` are factors: 1.1 allows a tenth more. `accuracy_drop` is a share that
    may be lost. None: that figure is not compared.
    """

    record: str
    size: Limit | None = None
    tokens: Limit | None = None
    lowering_error: Limit | None = None
    latency_ratio: Limit | None = None
    accuracy_drop: Annotated[float, Field(ge=-1, le=1)] | None = None
