"""The benchmark record: one JSON document for one run of the runner. What is unknown is null, never 0."""

from __future__ import annotations

from typing import Any, Literal

from edgewise.bundle.manifest import Site
from edgewise.schema import Strict
from edgewise.verify.ladder import Rung

SCHEMA_VERSION = 1

Validity = Literal["valid", "semivalid", "invalid"]


class Host(Strict):
    """The machine that the benchmark ran on. Memory is in bytes, load is the average over the last minute."""

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


class Protocol(Strict):
    """How the times were taken. `seconds` is the least duration of the samples of each artifact."""

    warmup: int
    samples: int
    seconds: float
    threads: int | None = None
    interleaved: bool
    input_digest: str | None = None


class Latency(Strict):
    """Times of one inference in milliseconds. `cv`: standard deviation / mean; null with one sample.

    `samples_ms` are the raw samples in the order in which they were taken.
    """

    n: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    cv: float | None
    samples_ms: tuple[float, ...]


class Measurement(Strict):
    """What was measured of one artifact.

    - `artifact`: its label; `artifact_digest`: SHA-256 over the digests of its files in order.
    - `placement`: number of graph nodes by unit.
    - `cold_load_ms`: the first load in this process; `warm_load_ms`: a second one.
    - `stages`: latency per stage of a pipeline (vision, splice, prefill, decode).
    - `peak_memory_bytes`: peak resident memory of the whole process up to the end of this artifact's load and
      warm-up, so that later artifacts include earlier ones.
    - `power_watts`, `temperature_celsius`: means over the samples.
    - `speedup`: mean time of the baseline (the first artifact of the same role) / own mean time, from
      interleaved samples; null for the baseline.
    - `accuracy`: the artifact against the bundle's golden outputs.
    """

    artifact: str
    artifact_digest: str
    target: str
    role: str
    precision: str
    runtime_versions: dict[str, str] = {}
    placement: dict[str, int] | None = None
    cold_load_ms: float | None = None
    warm_load_ms: float | None = None
    latency: Latency | None = None
    stages: dict[str, Latency] | None = None
    peak_memory_bytes: int | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    sites: tuple[Site, ...] = ()
    speedup: float | None = None
    accuracy: Rung | None = None
    validity: Validity
    reasons: tuple[str, ...] = ()


class Record(Strict):
    """One run of the runner over the artifacts of one bundle."""

    format: Literal["edgewise-benchmark"] = "edgewise-benchmark"
    schema_version: Literal[1] = 1
    edgewise_version: str
    bundle_digest: str
    model: str
    compress: tuple[str, ...] = ()
    host: Host
    protocol: Protocol
    measurements: tuple[Measurement, ...]
    skipped: dict[str, str] = {}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a record."""
    schema = Record.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
