"""Measure the artifacts of one or several bundles on this machine.

All artifacts are loaded first and then timed in turn (A, B, A, B, ...), so that a machine that becomes slower
for a while slows all of them and the ratios between them stay true.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np

from edgewise.bench import host, sensors
from edgewise.bench.judge import judge_validity
from edgewise.bench.probe import NOT_PROBED, Probed, probe
from edgewise.bench.ratios import match
from edgewise.bench.record import Comparison, Latency, Measurement, Protocol, Record
from edgewise.bench.statistics import ratio_of_medians, summarise
from edgewise.bundle.manifest import Artifact, dump
from edgewise.bundle.reader import Bundle, Golden
from edgewise.errors import InputError
from edgewise.targets import Session, choose, get, load, runnable
from edgewise.verify.bundle import batched, check, run_all, threshold
from edgewise.verify.ladder import Rung
from edgewise.verify.ladder import judge as judge_outputs
from edgewise.version import __version__

Tell = Callable[[str], None]
_TELL_EVERY = 2.0
"""Seconds."""
_COMPANION = 100
"""How many times the least duration an artifact runs beside others that need longer for their samples."""


@dataclass(frozen=True)
class _Plan:
    """How to measure."""

    samples: int
    seconds: float
    warmup: int
    threads: int | None
    cold: bool
    units: str | None
    tell: Tell

    def units_of(self, artifact: Artifact) -> str | None:
        """The compute units that an artifact may use, where its target lets one choose."""
        return self.units if get(artifact.target).has_units else None


@dataclass
class _Run:
    """One artifact that is being measured."""

    bundle: Bundle
    artifact: Artifact
    session: Session
    golden: Golden
    warm: float
    power: sensors.Power
    times: list[float] = field(default_factory=list)
    spent: float = 0.0
    """The sum of the times, kept, so that a sample costs the same however many there are."""
    stages: dict[str, list[float]] | None = None
    accuracy: Rung | None = None
    quality: Rung | None = None
    probed: Probed = NOT_PROBED

    def __post_init__(self) -> None:
        self._calls = [self.session.bound(self.golden.feeds(sample)) for sample in range(self.golden.samples)]

    def once(self) -> None:
        """Run one golden sample, each in its turn, and keep the time."""
        call = self._calls[len(self.times) % len(self._calls)]
        self.power.before()
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        self.times.append(took)
        self.spent += took
        self.power.after()
        stages = self.session.stages()
        if stages is not None:
            self.stages = self.stages or {}
            for name, seconds in stages.items():
                self.stages.setdefault(name, []).extend(seconds)

    def done(self, plan: _Plan) -> bool:
        return len(self.times) >= plan.samples and self.spent >= plan.seconds

    def leaves(self, plan: _Plan) -> bool:
        """Whether it is done, and no companion of the others any more: it is slower by orders, or a stand-in, whose times say
        nothing of a device. It keeps nobody waiting."""
        return self.done(plan) and (self.session.stand_in is not None or self.spent >= _COMPANION * plan.seconds)


@dataclass(frozen=True)
class _Seen:
    """What the system showed while all was measured."""

    started: str
    load_before: float | None
    busy_cores: float | None
    throttling: tuple[str, ...] | None
    temperature: float | None
    temperature_sensor: str | None
    power_sensor: str | None
    no_power: str | None


def bench(
    bundle: Bundle,
    targets: Sequence[str] | None = None,
    *,
    samples: int = 30,
    seconds: float = 2.0,
    warmup: int = 3,
    threads: int | None = None,
    cold: bool = True,
    function: str | None = None,
    units: str | None = None,
    progress: Tell | None = None,
) -> Record:
    """Measure every artifact of `bundle` whose runtime is installed, on the golden inputs.

    Each artifact gets `warmup` runs, and then at least `samples` runs and at least `seconds` seconds of runs,
    interleaved with the others. `threads` None leaves the number to the manifest, and then to the runtime. `cold`: load and run
    each in a process of its own, too, for the cold load and the peak memory.
    `function`: only this one, of artifacts that hold several. `units`: compute units that artifacts may use where the target lets
    one choose, see `Target.for_units`.
    `progress` is called with a line at each step. An artifact that cannot run here is listed in `skipped`
    with the reason. Raises `MissingExtra` if none can run, and `InputError` for bad arguments.
    """
    plan = _plan(samples, seconds, warmup, threads, cold, units, progress)
    artifacts, skipped = runnable(choose(bundle, targets, function))
    with _measured([(bundle, one) for one in artifacts], plan) as (runs, seen):
        return _record(bundle, runs, skipped, plan, seen, interleaved=len(runs) > 1)


def compare(
    bundles: Sequence[Bundle],
    targets: Sequence[str] | None = None,
    *,
    samples: int = 30,
    seconds: float = 2.0,
    warmup: int = 3,
    threads: int | None = None,
    cold: bool = True,
    function: str | None = None,
    units: str | None = None,
    progress: Tell | None = None,
) -> Comparison:
    """Measure several bundles in one run, all artifacts of all of them in turn, and compare with the first bundle.

    Arguments and errors are those of `bench`; of a bundle without some of the targets the others are taken. Artifacts are
    compared with what is nearest to them in the first bundle, see `match`.
    """
    plan = _plan(samples, seconds, warmup, threads, cold, units, progress)
    if len(bundles) < 2:
        raise InputError("a comparison needs two bundles or more")
    chosen = [runnable(choose(bundle, targets, function)) for bundle in bundles]
    pairs = [(bundle, one) for bundle, (able, _) in zip(bundles, chosen, strict=True) for one in able]
    with _measured(pairs, plan) as (runs, seen):
        # The same bundle may be there twice, so that a run's bundle is known by its place.
        left = iter(runs)
        groups = [[next(left) for _ in able] for able, _ in chosen]
        times = {(number, run.artifact.label): run.times for number, group in enumerate(groups) for run in group}
        ratios, unmatched = match([able for able, _ in chosen], times)
        records = [
            _record(bundle, group, skipped, plan, seen, interleaved=True)
            for bundle, group, (_, skipped) in zip(bundles, groups, chosen, strict=True)
        ]
    return Comparison(
        bundles=tuple(str(bundle.path) for bundle in bundles),
        records=tuple(records),
        ratios=ratios,
        unmatched=unmatched,
    )


def _plan(
    samples: int, seconds: float, warmup: int, threads: int | None, cold: bool, units: str | None, progress: Tell | None
) -> _Plan:
    if samples < 1 or warmup < 0 or not 0 <= seconds < math.inf:
        raise InputError("bench needs samples of 1 or more, warmup of 0 or more, and finite seconds of 0 or more")
    return _Plan(samples, seconds, warmup, threads, cold, units, progress or (lambda line: None))


@contextmanager
def _measured(pairs: Sequence[tuple[Bundle, Artifact]], plan: _Plan) -> Iterator[tuple[list[_Run], _Seen]]:
    """Load all artifacts and time them in turn; they are closed afterwards."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if plan.units is not None:
        choosing = [target for target in {artifact.target for _, artifact in pairs} if get(target).has_units]
        if not choosing:
            raise InputError("compute units are chosen for Core ML artifacts alone, and there is none here: leave out --units")
        for name in choosing:
            get(name).for_units(plan.units)  # which says what is wrong before anything is loaded
    load_before = host.load_average()
    sensor, no_power = sensors.power()
    with ExitStack() as stack:
        if sensor is not None:
            stack.callback(sensor.close)
        runs = []
        for bundle, artifact in pairs:
            plan.tell(f"load {artifact.label}")
            run = _prepared(bundle, artifact, sensors.Power(sensor), plan)
            stack.callback(run.session.close)
            runs.append(run)
        plan.tell("measure")
        heat = [sensors.temperature()]
        counts = sensors.throttle_counts()
        with _quiet(), _others() as others:
            _take_turns(runs, plan, heat)
        heat.append(sensors.temperature())
        known = [one for one in heat if one is not None]
        yield (
            runs,
            _Seen(
                started=started,
                load_before=load_before,
                busy_cores=others[0] if others else None,
                throttling=sensors.throttling(counts, sensors.throttle_counts()),
                temperature=float(np.mean([degrees for degrees, _ in known])) if known else None,
                temperature_sensor=known[-1][1] if known else None,
                power_sensor=sensor.source if sensor else None,
                no_power=no_power,
            ),
        )


def _take_turns(runs: Sequence[_Run], plan: _Plan, heat: list[tuple[float, str] | None]) -> None:
    told = time.perf_counter()
    turns = list(runs)
    while not all(run.done(plan) for run in runs):
        # Those that have enough samples go on, for as long as others need them as their companions.
        for run in turns:
            run.once()
        turns = [run for run in turns if not run.leaves(plan)]
        if time.perf_counter() - told > _TELL_EVERY:
            left = [one for one in runs if not one.done(plan)]
            if left:
                slowest = min(left, key=lambda run: run.spent)
                plan.tell(f"measure: {len(slowest.times)} samples of each, {slowest.spent:.1f} s")
            heat.append(sensors.temperature())
            told = time.perf_counter()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Python's collector of cycles, which stops the process at moments of its own."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _others() -> Iterator[list[float]]:
    """Afterwards the list holds the number of cores that other processes kept busy meanwhile, if the system tells."""
    found: list[float] = []
    busy, own, start = host.busy_seconds(), time.process_time(), time.perf_counter()
    yield found
    now, spent = host.busy_seconds(), time.perf_counter() - start
    # The system counts in ticks of 10 ms, and the counters of its cores are not read at one moment.
    if busy is not None and now is not None and spent >= 0.5:
        found.append(max(0.0, (now - busy - (time.process_time() - own)) / spent))


def _prepared(bundle: Bundle, artifact: Artifact, power: sensors.Power, plan: _Plan) -> _Run:
    golden = bundle.golden(artifact.role)
    units = plan.units_of(artifact)
    probed = probe(bundle, artifact, plan.threads, units) if plan.cold else NOT_PROBED
    load(bundle, artifact, threads=plan.threads, units=units).close()
    start = time.perf_counter()
    session = load(bundle, artifact, threads=plan.threads, units=units)
    run = _Run(bundle, artifact, session, golden, time.perf_counter() - start, power, probed=probed)
    run.accuracy = check(artifact, session, golden, threshold(bundle.manifest, artifact))
    if golden.references:
        outputs, references = batched(run_all(session, golden)), batched(golden.references)
        # Outputs with fewer tokens (an encoder's, caches) have nothing to be compared with.
        same = [name for name in references if outputs[name].shape == references[name].shape]
        if same:
            pair = {name: references[name] for name in same}, {name: outputs[name] for name in same}
            run.quality = judge_outputs(artifact.label, "uncompressed", "compression", *pair)
    for sample in range(plan.warmup):
        session.run(golden.feeds(sample % golden.samples))
    return run


def _record(
    bundle: Bundle, runs: Sequence[_Run], skipped: dict[str, str], plan: _Plan, seen: _Seen, *, interleaved: bool
) -> Record:
    here = {
        "load_average": seen.load_before,
        "power_sensor": seen.power_sensor,
        "temperature_sensor": seen.temperature_sensor,
    }
    return Record(
        edgewise_version=__version__,
        bundle_digest=hashlib.sha256(dump(bundle.manifest)).hexdigest(),
        model=bundle.manifest.model.source,
        compress=bundle.manifest.compress,
        measured_at=seen.started,
        host=host.describe().model_copy(update=here),
        protocol=Protocol(
            warmup=plan.warmup,
            samples=plan.samples,
            seconds=plan.seconds,
            threads=plan.threads,
            interleaved=interleaved,
            input_digest=_input_digest(runs),
            busy_cores=seen.busy_cores,
            throttling=seen.throttling,
        ),
        measurements=tuple(_measurement(run, runs, seen) for run in runs),
        verification=bundle.manifest.verification,
        skipped=skipped,
    )


def _measurement(run: _Run, runs: Sequence[_Run], seen: _Seen) -> Measurement:
    artifact, manifest = run.artifact, run.bundle.manifest
    component = manifest.component(artifact.role)
    latency = summarise(run.times)
    baseline = next(other for other in runs if other.artifact.base_role == artifact.base_role)
    speedup, interval = (None, None) if baseline is run else ratio_of_medians(baseline.times, run.times)
    validity, reasons = judge_validity(
        latency,
        run.accuracy,
        seen.load_before,
        busy_cores=seen.busy_cores,
        throttling=seen.throttling or (),
        stand_in=run.session.stand_in,
    )
    found = Measurement(
        artifact=artifact.label,
        artifact_digest=_artifact_digest(run.bundle, artifact),
        artifact_bytes=sum(manifest.files[name].bytes for name in artifact.files),
        target=artifact.target,
        role=artifact.role,
        precision=artifact.precision,
        flops=component.flops_after,
        stand_in=run.session.stand_in,
        units=run.session.units,
        runtime_versions=get(artifact.target).versions(runtime_only=True),
        placement=run.session.placement(),
        cold_load_ms=run.probed.cold_load_ms,
        warm_load_ms=run.warm * 1e3,
        latency=latency,
        stages=_stages(run),
        peak_memory_bytes=run.probed.peak_memory_bytes,
        power_watts=run.power.watts,
        temperature_celsius=seen.temperature,
        sites=component.sites,
        speedup=speedup,
        speedup_interval=interval,
        accuracy=run.accuracy,
        quality=run.quality,
        validity=validity,
        reasons=reasons,
    )
    probed = run.probed.reason or "this system does not tell it"
    why = {
        "placement": run.session.no_placement,
        "cold_load_ms": probed,
        "peak_memory_bytes": probed,
        "power_watts": seen.no_power or "the sensor was not ready in the time of the runs",
        "temperature_celsius": "the system shows no thermal zone and no monitor of temperature that can be read",
        "quality": "the bundle's golden data holds no outputs of the uncompressed program",
        "stages": "the artifact is a single graph",
    }
    return found.model_copy(update={"unknown": {key: text for key, text in why.items() if getattr(found, key) is None}})


def _stages(run: _Run) -> dict[str, Latency] | None:
    return None if run.stages is None else {name: summarise(seconds) for name, seconds in run.stages.items()}


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
