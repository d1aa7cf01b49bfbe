"""The benchmark record: one JSON document for one run of the runner. What is unknown is null, never 0."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, model_validator

from edgewise.bundle.manifest import Count, Site
from edgewise.bundle.reader import read_bytes
from edgewise.document import parse as document_of
from edgewise.document import validate
from edgewise.errors import InputError
from edgewise.schema import Strict
from edgewise.verify.ladder import Rung

SCHEMA_VERSION: Final = 3
"""Goes up with every new key. All lower versions are read: new keys have defaults."""

Validity = Literal["valid", "semivalid", "invalid"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Host(Strict):
    """The machine that the benchmark ran on. Memory is in bytes, load is the average over the last minute.

    `power_sensor`, `temperature_sensor`: what the power and the temperature were read from.
    """

    device: str | None = None
    cpu: str | None = None
    cores_physical: int | None = None
    cores_logical: int | None = None
    memory_bytes: int | None = None
    os: str | None = None
    kernel: str | None = None
    python: str | None = None
    governor: str | None = None
    load_average: float | None = None
    driver: str | None = None
    power_mode: str | None = None
    power_sensor: str | None = None
    temperature_sensor: str | None = None


class Protocol(Strict):
    """How the times were taken. `seconds` is the least duration of the samples of each artifact.

    `busy_cores`: cores that other processes kept busy meanwhile, on average. `throttling`: what the system said of it.
    """

    warmup: int
    samples: int
    seconds: float
    threads: int | None = None
    interleaved: bool
    input_digest: str | None = None
    busy_cores: float | None = None
    throttling: tuple[str, ...] | None = None


class Latency(Strict):
    """Times of one inference in milliseconds. `cv`: standard deviation / mean; null with one sample.

    `samples_ms` are the raw samples in the order in which they were taken. Percentiles are of the nearest rank.
    """

    n: Count
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    cv: float | None
    samples_ms: tuple[float, ...]

    @model_validator(mode="after")
    def _whole(self) -> Latency:
        if self.n != len(self.samples_ms) or self.n == 0:
            raise ValueError(f"n is {self.n}, and there are {len(self.samples_ms)} samples")
        return self


class Interval(Strict):
    """An interval of confidence: the value lies in `low` to `high` in a share `confidence` of such measurements."""

    low: float
    high: float
    confidence: Share


class Measurement(Strict):
    """What was measured of one artifact.

    - `artifact`: its label; `artifact_digest`: SHA-256 over the digests of its files in order; `artifact_bytes`: their size.
    - `flops`: of the component as it is, a multiply and an add counted as two.
    - `stand_in`: what ran the artifact, where it is not the runtime of the target.
    - `units`: the compute units that the runtime was let use, where it lets one choose: `all`, `cpu`, `cpu-gpu` or `cpu-ane`.
    - `placement`: number of graph nodes by unit.
    - `cold_load_ms`: loading, the import of the runtime included, in a process of its own, with the files dropped from the
      system's cache where it allows that; `warm_load_ms`: a second load in the process that measures.
    - `stages`: latency per stage of a pipeline (vision, splice, prefill, decode). A stage may run several times in one inference.
    - `peak_memory_bytes`: peak resident memory of a process that does nothing but load and run this artifact.
    - `power_watts`, `temperature_celsius`: means over the samples.
    - `speedup`: median time of the baseline (the first artifact of the same role) / own median time, from interleaved samples,
      and its interval; null for the baseline.
    - `accuracy`: the artifact against the bundle's golden outputs; `quality`: against those of the uncompressed program.
    - `unknown`: for each of these that is null because it could not be found out, the reason.
    """

    artifact: str
    artifact_digest: str
    artifact_bytes: Count | None = None
    target: str
    role: str
    precision: str
    flops: Count | None = None
    stand_in: str | None = None
    units: str | None = None
    runtime_versions: dict[str, str] = {}
    placement: dict[str, Count] | None = None
    cold_load_ms: float | None = None
    warm_load_ms: float | None = None
    latency: Latency | None = None
    stages: dict[str, Latency] | None = None
    peak_memory_bytes: Count | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    sites: tuple[Site, ...] = ()
    speedup: float | None = None
    speedup_interval: Interval | None = None
    accuracy: Rung | None = None
    quality: Rung | None = None
    validity: Validity
    reasons: tuple[str, ...] = ()
    unknown: dict[str, str] = {}


class Record(Strict):
    """One run of the runner over the artifacts of one bundle.

    `measured_at`: when it began, in UTC (ISO 8601). `verification`: the ladder of the bundle's manifest.
    """

    format: Literal["edgewise-benchmark"] = "edgewise-benchmark"
    schema_version: Literal[1, 2, 3] = SCHEMA_VERSION
    edgewise_version: str
    bundle_digest: str
    model: str
    compress: tuple[str, ...] = ()
    measured_at: str | None = None
    host: Host
    protocol: Protocol
    measurements: tuple[Measurement, ...]
    verification: tuple[Rung, ...] = ()
    skipped: dict[str, str] = {}


class Ratio(Strict):
    """Median time of an artifact of `bundle` / median time of the one in `baseline_bundle` that it is compared with.

    Bundles are numbered from 0, in the order of `Comparison.records`. Below 1: faster than the baseline.
    """

    bundle: Count
    artifact: str
    baseline_bundle: Count
    baseline: str
    ratio: float
    interval: Interval


class Comparison(Strict):
    """Bundles that were measured in one run, each artifact in turn with all the others."""

    format: Literal["edgewise-comparison"] = "edgewise-comparison"
    schema_version: Literal[2, 3] = SCHEMA_VERSION
    bundles: tuple[str, ...]
    records: tuple[Record, ...] = Field(min_length=1)
    ratios: tuple[Ratio, ...]
    unmatched: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _numbered(self) -> Comparison:
        numbers = [number for ratio in self.ratios for number in (ratio.bundle, ratio.baseline_bundle)]
        if len(self.bundles) != len(self.records) or any(number >= len(self.records) for number in numbers):
            raise ValueError("the ratios and names do not fit the records")
        return self


def json_schema(model: type[BaseModel] = Record) -> dict[str, Any]:
    """The JSON Schema of a record, or of a comparison. The package holds both as files: `edgewise/bench/schemas/`."""
    schema = model.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


SCHEMAS: dict[str, type[BaseModel]] = {"record.json": Record, "comparison.json": Comparison}
"""The files in `edgewise/bench/schemas`, and what each describes."""


def write_schemas() -> None:
    """Write the files anew: `python -c "from edgewise.bench.record import write_schemas; write_schemas()"`."""
    for name, model in SCHEMAS.items():
        path = Path(__file__).with_name("schemas") / name
        path.write_text(json.dumps(json_schema(model), indent=1, sort_keys=True) + "\n", "utf-8")


MAX_BYTES = 256 * 2**20
_KINDS: dict[str, type[Record] | type[Comparison]] = {"edgewise-benchmark": Record, "edgewise-comparison": Comparison}
_MEND = "Give a file that `edgewise bench -o` wrote."


def read(path: str | os.PathLike[str]) -> Record | Comparison:
    """Read a record or a comparison, of this schema version or a lower one. Raises `InputError` if the file is none."""
    return parse(read_bytes(Path(path), MAX_BYTES), str(path))


def parse(data: bytes, where: str) -> Record | Comparison:
    """Read a record or a comparison from bytes; `where` names it in messages. Raises `InputError`, as `read` does."""
    document = document_of(data, where, "benchmark record", limit=MAX_BYTES, mend=_MEND)
    kind = document.get("format")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f'{where} is no benchmark record: its "format" is none of {", ".join(_KINDS)}. {_MEND}')
    version = document.get("schema_version")
    if version not in range(1, SCHEMA_VERSION + 1) or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        mend = "Upgrade edgewise to read it." if newer else _MEND
        raise InputError(f"{where} has schema_version {version!r}; this edgewise reads 1 to {SCHEMA_VERSION}. {mend}")
    return validate(_KINDS[kind], data, where, "benchmark record", _MEND)
