"""Measure the artifacts of a bundle on this machine.

All artifacts are loaded first and then timed in turn (A, B, A, B, ...), so that a machine that becomes slower
for a while slows all of them and the ratios between them stay true.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from edgewise.bench import host
from edgewise.bench.record import Latency, Measurement, Protocol, Record, Validity
from edgewise.bench.statistics import summarise
from edgewise.bundle.manifest import Artifact, dump
from edgewise.bundle.reader import Bundle, Golden
from edgewise.errors import InputError
from edgewise.targets import Session, choose, get, load, runnable
from edgewise.verify.bundle import check, threshold
from edgewise.verify.ladder import Rung
from edgewise.version import __version__

GREATEST_CV = 0.025
LEAST_SAMPLES = 30
LEAST_SECONDS = 1.0


class _Run:
    """One artifact that is being measured."""

    def __init__(
        self, artifact: Artifact, session: Session, golden: Golden, cold: float, warm: float
    ) -> None:
        self.artifact = artifact
        self.session = session
        self.golden = golden
        self.cold = cold
        self.warm = warm
        self.times: list[float] = []
        self.memory: int | None = None
        self.accuracy: Rung | None = None

    def once(self) -> None:
        """Run one golden sample, each in its turn, and keep the time."""
        feeds = self.golden.feeds(len(self.times) % self.golden.samples)
        start = time.perf_counter()
        self.session.run(feeds)
        self.times.append(time.perf_counter() - start)

    def done(self, samples: int, seconds: float) -> bool:
        return len(self.times) >= samples and sum(self.times) >= seconds


def bench(
    bundle: Bundle,
    targets: Sequence[str] | None = None,
    *,
    samples: int = 30,
    seconds: float = 2.0,
    warmup: int = 3,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Measure every artifact of `bundle` whose runtime is installed, on the golden inputs.

    Each artifact gets `warmup` runs, and then at least `samples` runs and at least `seconds` seconds of runs,
    interleaved with the others. `threads` None leaves the number to the manifest, and then to the runtime.
    `progress` is called with a line at each step. An artifact that cannot run here is listed in `skipped`
    with the reason. Raises `MissingExtra` if none can run, and `InputError` for bad arguments.
    """
    if samples < 1 or warmup < 0 or not 0 <= seconds < float("inf"):
        raise InputError(
            "bench needs samples of 1 or more, warmup of 0 or more, and finite seconds of 0 or more"
        )
    artifacts, skipped = runnable(choose(bundle, targets))
    tell = progress or (lambda line: None)
    load_before = host.load_average()
    with ExitStack() as stack:
        runs = []
        for artifact in artifacts:
            tell(f"load {artifact.label}")
            run = _prepare(bundle, artifact, threads, warmup)
            stack.callback(run.session.close)
            runs.append(run)
        heat = [host.temperature()]
        tell("measure")
        while not all(run.done(samples, seconds) for run in runs):
            # Those that have enough samples go on, for as long as others need them as their companions.
            for run in runs:
                run.once()
        heat.append(host.temperature())
        measurements = [_measurement(bundle, run, runs, load_before, heat) for run in runs]
    return Record(
        edgewise_version=__version__,
        bundle_digest=hashlib.sha256(dump(bundle.manifest)).hexdigest(),
        model=bundle.manifest.model.source,
        compress=bundle.manifest.compress,
        host=host.describe().model_copy(update={"load_average": load_before}),
        protocol=Protocol(
            warmup=warmup,
            samples=samples,
            seconds=seconds,
            threads=threads,
            interleaved=len(runs) > 1,
            input_digest=_input_digest(runs),
        ),
        measurements=tuple(measurements),
        skipped=skipped,
    )


def _prepare(bundle: Bundle, artifact: Artifact, threads: int | None, warmup: int) -> _Run:
    golden = bundle.golden(artifact.role)
    start = time.perf_counter()
    load(bundle, artifact, threads=threads).close()
    cold = time.perf_counter() - start
    start = time.perf_counter()
    session = load(bundle, artifact, threads=threads)
    run = _Run(artifact, session, golden, cold, time.perf_counter() - start)
    run.accuracy = check(artifact, session, golden, threshold(bundle.manifest, artifact))
    for sample in range(warmup):
        session.run(golden.feeds(sample % golden.samples))
    run.memory = host.peak_memory()
    return run


def _measurement(
    bundle: Bundle, run: _Run, runs: Sequence[_Run], load_before: float | None, heat: Sequence[float | None]
) -> Measurement:
    artifact = run.artifact
    latency = summarise(run.times)
    baseline = next(other for other in runs if other.artifact.role == artifact.role)
    validity, reasons = judge_validity(latency, run.accuracy, load_before)
    known = [degrees for degrees in heat if degrees is not None]
    return Measurement(
        artifact=artifact.label,
        artifact_digest=_artifact_digest(bundle, artifact),
        target=artifact.target,
        role=artifact.role,
        precision=artifact.precision,
        runtime_versions=get(artifact.target).versions(runtime_only=True),
        placement=run.session.placement(),
        cold_load_ms=run.cold * 1e3,
        warm_load_ms=run.warm * 1e3,
        latency=latency,
        peak_memory_bytes=run.memory,
        temperature_celsius=float(np.mean(known)) if known else None,
        sites=bundle.manifest.component(artifact.role).sites,
        speedup=None if baseline is run else float(np.mean(baseline.times) / np.mean(run.times)),
        accuracy=run.accuracy,
        validity=validity,
        reasons=reasons,
    )


def judge_validity(
    latency: Latency, accuracy: Rung | None, load_average: float | None
) -> tuple[Validity, tuple[str, ...]]:
    """Say how far a measurement can be trusted, and why not further.

    `invalid`: the artifact computes something else than its program. `semivalid`: the times are few, or vary,
    or the machine was busy with something else.
    """
    wrong, doubts = [], []
    if accuracy is not None and accuracy.passed is False:
        wrong.append("the outputs differ from the golden outputs by more than the threshold")
    if accuracy is None or accuracy.passed is None:
        doubts.append("the accuracy was not checked against a threshold")
    if latency.n < LEAST_SAMPLES:
        doubts.append(f"{latency.n} samples are fewer than {LEAST_SAMPLES}")
    if sum(latency.samples_ms) < LEAST_SECONDS * 1e3:
        doubts.append(f"the samples took less than {LEAST_SECONDS:g} s in total")
    if latency.cv is not None and latency.cv > GREATEST_CV:
        doubts.append(f"the coefficient of variation is {latency.cv:.1%}, above {GREATEST_CV:.1%}")
    if load_average is not None and load_average > 1.0:
        doubts.append(f"the machine was busy: the load average was {load_average:.1f} before the start")
    return ("invalid" if wrong else "semivalid" if doubts else "valid"), (*wrong, *doubts)


def _artifact_digest(bundle: Bundle, artifact: Artifact) -> str:
    digests = [bundle.manifest.files[name].sha256 for name in artifact.files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _input_digest(runs: Sequence[_Run]) -> str:
    """SHA-256 over all golden inputs: by role, then by name."""
    sha256 = hashlib.sha256()
    for role, golden in sorted({run.artifact.role: run.golden for run in runs}.items()):
        for name, value in sorted(golden.inputs.items()):
            sha256.update(f"{role} {name} {value.dtype} {value.shape}\n".encode())
            sha256.update(np.ascontiguousarray(value).tobytes())
    return sha256.hexdigest()
