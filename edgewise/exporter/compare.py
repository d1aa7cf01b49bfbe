"""Compression methods side by side on one model and its data, at equal numbers of tokens."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from edgewise import targets as target_registry
from edgewise.errors import CheckFailed, InputError, MissingExtra, Refused
from edgewise.exporter import smaller_input as smaller
from edgewise.exporter.capture import capture, from_exported, quiet
from edgewise.exporter.data import collected
from edgewise.exporter.run import Runner
from edgewise.exporter.sources import Source
from edgewise.ops import METHODS
from edgewise.ops.budget import kept_count
from edgewise.passes.analysis import Stream
from edgewise.passes.flops import total_flops
from edgewise.passes.legalise import Legalise
from edgewise.passes.plan import Spec, make_plan, parse_spec
from edgewise.passes.program import Program
from edgewise.passes.program import compress as insert
from edgewise.targets import Session, Target
from edgewise.verify.metrics import compare as errors_of

BASELINES = ("random", "pool")
WARMUP, LEAST_RUNS, LEAST_SECONDS = 3, 30, 0.5
"""Of a latency ratio: runs of each artifact that are not counted, and the least that are."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Data:
    """Arrays `(samples, *shape)` by the model's input names, and class `labels (samples,)` where there are some."""

    name: str
    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Latency:
    """Seconds of interleaved runs, one thread: of the artifact, and of the uncompressed one in turn with it."""

    median: float
    minimum: float
    base_median: float
    base_minimum: float
    runs: int

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return self.median / self.base_median

    @property
    def ratio_of_minimums(self) -> float:
        return self.minimum / self.base_minimum


@dataclass(frozen=True)
class Row:
    """One method at one count. What is unknown is None.

    `tokens` are all that are left, `wanted` those that were asked for; `cosine` and `relative` are means over the samples,
    against the uncompressed model; `agreement` is the share of samples with its top-1 class. `over_flops` is the latency
    ratio less the FLOPs ratio: the op's own cost and whatever else does not shrink with the FLOPs, in units of the
    uncompressed latency.
    """

    method: str
    spec: str
    keep: float | int | None
    sites: tuple[str, ...]
    wanted: int
    tokens: int
    flops_ratio: float
    accuracy: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    relative: float | None = None
    latency: Latency | None = None
    over_flops: float | None = None


@dataclass(frozen=True)
class Left:
    """A method that is not in the table, at one `keep` (None: at any), and why."""

    method: str
    keep: float | int | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All rows, the uncompressed model first, and what was left out."""

    model: str
    data: str
    samples: int
    labelled: bool
    output: str
    stream: str
    tokens: int
    protected: int
    target: str | None
    rows: tuple[Row, ...]
    left_out: tuple[Left, ...]
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        made = asdict(self)
        for row, one in zip(made["rows"], self.rows, strict=True):
            if one.latency is not None:
                row["latency"] |= {"ratio": one.latency.ratio, "ratio_of_minimums": one.latency.ratio_of_minimums}
        return made


def parse_keeps(text: str) -> list[float | int]:
    """`0.5,0.25,64` as shares and counts. Raises InputError for what can be no `keep` of any model."""
    keeps: list[float | int] = []
    for part in text.split(","):
        try:
            value = int(part) if part.strip().lstrip("+-").isdigit() else float(part)
        except ValueError:
            raise InputError(f"--keep {text}: {part.strip()!r} is not a number; for example 0.5,0.25,0.1") from None
        if not isfinite(value) or value <= 0 or (value > 1 and value != int(value)):
            raise InputError(f"--keep {text}: {part.strip()} is out of range: a share above 0 and up to 1.0, or a count")
        keeps.append(value)
    return list(dict.fromkeys(keeps))


def parse_methods(methods: Sequence[str]) -> list[Spec]:
    """Specs without a count, with the baselines. Raises InputError for what is unknown, or has a count of its own."""
    specs = [parse_spec(text) for text in methods]
    for spec in specs:
        if counted := sorted({"keep", "r", "stages"} & set(spec.parameters)):
            raise InputError(f"--method {spec.text}: leave {counted[0]} out; --keep gives the counts")
    named = {spec.method.name for spec in specs}
    return [*(parse_spec(name) for name in BASELINES if name not in named), *specs]


def choose_target(name: str | None) -> Target:
    """The target of this name, or the first that can lower and run here."""
    if name is not None:
        target = target_registry.get(name)
        target.check()
        return target
    lacks = []
    for known in target_registry.names():
        target = target_registry.get(known)
        try:
            target.check()
        except MissingExtra as missing:
            lacks.append(str(missing))
        else:
            return target
    raise MissingExtra(f"no target can run here: {lacks[0]}; or leave the latency out: --no-latency")


def compare(
    source: Source,
    data: Data | str,
    keeps: Sequence[float | int],
    methods: Sequence[str] = (),
    *,
    samples: int = 64,
    target: Target | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare methods (default: all) on a model, at the counts that `keeps` gives. `target` None: no latency. `data`: arrays,
    or what
    `edgewise.calibration.open_source` takes by name.

    A method that does not apply is left out with its reason. Raises InputError for a bad count, or data that does not fit.
    """
    tell = progress or (lambda done, total, text: None)
    tell(0, 0, "capture")
    program = (
        from_exported(source.exported) if source.exported is not None
        else capture(source.module, source.args, source.kwargs)  # type: ignore[arg-type]
    )
    notes: tuple[str, ...] = ()
    if isinstance(data, str):
        chosen, arrays = collected(data, program, source, samples)
        data, notes = Data(data, arrays, chosen.labels), chosen.notes
    stream = media_stream(program)
    counts = [_count(keep, stream) for keep in keeps]
    feeds = Feeds(program, data, samples)
    tell(0, 0, f"run the uncompressed model on {feeds.count} samples")
    reference = feeds.run(program.base, program)
    output, scores = _output(reference, feeds, data)
    base_flops = total_flops(program.base)
    specs, left = _applicable(stream, methods)
    trials = [(spec, keep, count) for count, keep in zip(counts, keeps, strict=True) for spec in (None, *specs)]
    rows = [_measured(Row("uncompressed", "", None, (), stream.tokens, stream.tokens, 1.0), reference[output],
                      reference[output], scores, feeds.labels)]
    refused: set[str] = set()
    with tempfile.TemporaryDirectory() as place:
        base = None if target is None else lowered(program, program.base, target, Path(place) / "base")
        try:
            for done, (spec, keep, count) in enumerate(trials):
                name = smaller.NAME if spec is None else spec.text
                if name in refused:
                    continue
                tell(done, len(trials), f"{name}, {count} tokens")
                try:
                    if spec is None:
                        made, fed, row = _at_smaller_input(source, program, stream, feeds, keep, count)
                    else:
                        made, row = _compressed(program, spec, count, stream, keep)
                        fed = feeds
                    row = replace(row, flops_ratio=total_flops(made.exported) / base_flops if base_flops else 1.0)
                    row = _measured(row, reference[output], fed.run(made.exported, made).get(output), scores, feeds.labels)
                    if target is not None and base is not None:
                        with lowered(made, made.exported, target, Path(place) / f"{done}") as session:
                            latency = interleaved(base, session, feeds.feed(0), fed.feed(0))
                        row = replace(row, latency=latency, over_flops=latency.ratio - row.flops_ratio)
                except (InputError, CheckFailed) as error:
                    always = isinstance(error, Refused)
                    left.append(Left(name, None if always else keep, _reason(error)))
                    if always:
                        refused.add(name)
                    continue
                rows.append(row)
        finally:
            if base is not None:
                base.close()
    return Comparison(
        source.name, data.name, feeds.count, feeds.labels is not None, output, stream.name, stream.tokens,
        stream.protected, None if target is None else target.name, tuple(rows), tuple(left),
        (*source.notes, *program.notes, *notes),
    )


def media_stream(program: Program) -> Stream:
    streams = program.analysis.streams
    if not streams:
        raise InputError("no stream of tokens was found in this model: see edgewise inspect")
    return next((s for s in streams if s.of_media), streams[0])


def _count(keep: float | int, stream: Stream) -> int:
    try:
        return stream.protected + kept_count(keep, stream.tokens - stream.protected)
    except ValueError as error:
        raise InputError(f"--keep: {error}") from None


def _applicable(stream: Stream, methods: Sequence[str]) -> tuple[list[Spec], list[Left]]:
    """Specs of the methods to try, and those that need no trial. What was asked for by name is always tried."""
    if methods:
        asked = {parse_spec(text).text for text in methods}
        specs = parse_methods(methods)
    else:
        asked, specs = set(), [parse_spec(name) for name in METHODS]
    specs = sorted(specs, key=lambda spec: [*BASELINES, spec.method.name].index(spec.method.name))
    kinds = {"audio"} if "audio" in stream.role else {"image"} if "vision" in stream.role else None
    if kinds and stream.frames is not None:
        kinds |= {"video"}
    kept: list[Spec] = []
    left: list[Left] = []
    seen: dict[Any, str] = {}
    for spec in specs:
        entry, reason = spec.method, None
        if spec.text not in asked:
            if entry.reduce in seen:
                reason = f"another name of {seen[entry.reduce]}"
            elif kinds and not kinds & set(entry.modalities):
                reason = f"it is for {' and '.join(entry.modalities)}, and the stream is of {' and '.join(sorted(kinds))}"
            seen.setdefault(entry.reduce, entry.name)
        if reason is None and "weights" in entry.needs and "weights" not in spec.parameters:
            reason = f"it needs trained weights: --method {entry.name}:weights=FILE, which edgewise fit makes"
        if reason is None and all(p.name != "keep" for p in entry.parameters):
            reason = "it has no keep: its count follows from its other parameters"
        if reason is None:
            kept.append(spec)
        else:
            left.append(Left(spec.text, None, reason))
    return kept, left


def _at_smaller_input(source: Source, program: Program, stream: Stream, feeds: Feeds, keep: float | int,
                      wanted: int) -> tuple[Program, Feeds, Row]:
    """The model captured at a smaller size, its samples, and what is known of its row."""
    made = smaller.smaller_input(source, program, stream, wanted)
    spec = f"{made.input}={made.size[0]}x{made.size[1]}"
    row = Row(smaller.NAME, spec, keep, (), wanted, made.tokens, 1.0)
    return made.program, feeds.mapped(made.program, {made.input: made.resize}), row


def _compressed(program: Program, spec: Spec, wanted: int, stream: Stream, keep: float | int) -> tuple[Program, Row]:
    """The program with the spec at the `keep` whose real total is nearest to `wanted`, and what is known of its row.

    A method may make context tokens besides the kept, and may not have every count: the first plan that is legal says how
    far its total is from its `keep`, and the second search starts where the total would be right.
    """
    free = stream.tokens - stream.protected
    count, total, text = _nearest(program, spec, wanted - stream.protected, free, stream)
    if total != wanted:
        other = _nearest(program, spec, count + wanted - total, free, stream)
        if abs(other[1] - wanted) < abs(total - wanted):
            count, total, text = other
    made = insert(program, text)
    if made.added:
        raise Refused(f"it takes an input that the data does not give: {', '.join(made.added)}. Give a file: "
                      f"--method {spec.method.name}:text=FILE", method=spec.method.name)
    sites = tuple(step.place.name for step in made.steps)
    return made, Row(spec.method.name, made.specs[0].text, keep, sites, wanted, total, 1.0)


def _nearest(program: Program, spec: Spec, ideal: int, free: int, stream: Stream) -> tuple[int, int, str]:
    """The legal count nearest to `ideal`, with the total that it leaves and its spec."""
    first: InputError | None = None
    ideal = min(max(ideal, 1), free)
    for keep in sorted(range(1, free + 1), key=lambda n: abs(n - ideal)):
        text = f"{spec.text}{',' if spec.parameters else ':'}keep={keep}"
        try:
            plan, _ = make_plan(program.analysis, [parse_spec(text)])
        except Refused:
            raise
        except InputError as error:
            first = first or error
            continue
        steps = [step for _, planned in plan for step in planned]
        return keep, steps[-1].tokens_out + steps[-1].place.lost if steps else stream.tokens, text
    assert first is not None
    raise Refused(_reason(first), method=spec.method.name)  # at no count


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, Refused) else str(error)


class Plain(Runner):
    """A runner that checks nothing, and so is fast."""

    def run_node(self, n: fx.Node) -> Any:
        return fx.Interpreter.run_node(self, n)


class Feeds:
    """Samples spread evenly over the data, in batches of the program's static shape: in the order of the data, or in a random one
    that a seed gives. Raises InputError if they do not fit."""

    def __init__(self, program: Program, data: Data, samples: int, seed: int | None = None) -> None:
        sizes = {}
        for name, value in program.inputs.items():
            if name not in data.inputs:
                has = ", ".join(sorted(data.inputs)) or "nothing"
                raise InputError(f"{data.name} has no array for the input '{name}'; it has: {has}")
            array, dtype = data.inputs[name], value.numpy().dtype
            if array.ndim == 0 or value.ndim == 0 or array.shape[1:] != tuple(value.shape[1:]):
                wanted = tuple(value.shape[1:])
                raise InputError(f"{data.name}: {name} has samples of shape {array.shape[1:]}, and the model takes {wanted}")
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise InputError(f"{data.name}: {name} is {array.dtype}, and the model takes {dtype}")
            sizes[name] = len(array)
        if data.labels is not None:
            if data.labels.ndim != 1 or not np.issubdtype(data.labels.dtype, np.integer):
                raise InputError(f"{data.name}: labels must be whole numbers (samples,), not {data.labels.dtype} "
                                 f"{data.labels.shape}")
            sizes["labels"] = len(data.labels)
        if len(set(sizes.values())) != 1:
            raise InputError(f"{data.name}: the arrays have different numbers of samples: {sizes}")
        total = next(iter(sizes.values()))
        if total == 0:
            raise InputError(f"{data.name} has no samples")
        batches = {value.shape[0] for value in program.inputs.values()}
        if len(batches) != 1:
            raise InputError(f"the inputs of the model have no common batch dimension: {sorted(batches)}")
        self.batch: int = batches.pop()
        # A split may be sorted by label.
        rows = np.unique(np.linspace(0, total - 1, min(samples, total)).round().astype(int))
        if seed is not None:
            rows = np.random.default_rng(seed).permutation(rows)
        self.count = len(rows)
        self.labels = None if data.labels is None else data.labels[rows]
        self.arrays = {k: data.inputs[k][rows].astype(v.numpy().dtype, casting="same_kind")
                       for k, v in program.inputs.items()}
        for name, array in self.arrays.items():
            if not np.isfinite(array).all():
                raise InputError(f"{data.name}: {name} holds NaN or infinity")

    def mapped(self, program: Program, change: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> Feeds:
        """The same samples for another capture of the model, whose inputs (in the same order) may have other shapes."""
        made = copy(self)
        arrays = [change[k](array) if k in change else array for k, array in self.arrays.items()]
        made.arrays = dict(zip(program.inputs, arrays, strict=True))
        return made

    def feed(self, start: int) -> dict[str, np.ndarray]:
        """The batch from sample `start` on; the last sample fills the last batch up."""
        rows = np.minimum(np.arange(start, start + self.batch), self.count - 1)
        return {k: np.ascontiguousarray(array[rows]) for k, array in self.arrays.items()}

    def run(self, exported: ExportedProgram, program: Program) -> dict[str, np.ndarray]:
        """Outputs with one row for each sample; one whose first dimension is not the batch is left out."""
        runner, parts = Plain(exported, program.output_names), []
        for start in range(0, self.count, self.batch):
            made = runner({k: torch.from_numpy(v) for k, v in self.feed(start).items()})
            left = min(self.batch, self.count - start)
            parts.append({k: v[:left] for k, v in made.items() if v.ndim and v.shape[0] == self.batch})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def _output(reference: Mapping[str, np.ndarray], feeds: Feeds, data: Data) -> tuple[str, bool]:
    """The output that is compared, and whether it holds class scores: `logits`, the only matrix, or else the first."""
    floats = {k: v for k, v in reference.items() if np.issubdtype(v.dtype, np.floating)}
    matrices = [k for k, v in floats.items() if v.ndim == 2 and v.shape[1] > 1]
    if "logits" in matrices:
        return "logits", True
    if len(matrices) == 1 and (len(floats) == 1 or feeds.labels is not None):
        return matrices[0], True
    if feeds.labels is not None:
        shapes = ", ".join(f"{k} {v.shape[1:]}" for k, v in reference.items())
        raise InputError(f"{data.name} has labels, and accuracy needs one output of class scores (batch, classes), not: {shapes}")
    if not floats:
        raise InputError("the model has no floating-point output with one row for each sample: there is nothing to compare")
    return next(iter(floats)), False


def _measured(
    row: Row, reference: np.ndarray, value: np.ndarray | None, scores: bool, labels: np.ndarray | None
) -> Row:
    if value is None or value.shape != reference.shape:
        return row  # fewer tokens come out: there is nothing to hold them against
    errors = [errors_of(a.reshape(1, 1, -1), b.reshape(1, 1, -1)) for a, b in zip(reference, value, strict=True)]
    if not all(one.finite for one in errors):
        raise CheckFailed("the compressed model's output is not finite on this data")
    cosines, relatives = [e.cosine for e in errors], [e.relative for e in errors]
    top = value.argmax(-1) if scores else None
    return replace(
        row,
        cosine=_mean(cosines),
        relative=_mean(relatives),
        agreement=None if top is None else float((top == reference.argmax(-1)).mean()),
        accuracy=None if top is None or labels is None else float((top == labels).mean()),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def lowered(program: Program, exported: ExportedProgram, target: Target, folder: Path) -> Session:
    folder.mkdir(parents=True)
    legal = Legalise(target.realisations)(exported).program
    with quiet():
        files = target.lower(legal, folder, program.role, precision="fp32", input_names=list(program.inputs),
                             output_names=list(program.output_names))
    return target.load(files, threads=1)


def interleaved(base: Session, session: Session, base_feed: dict[str, np.ndarray], feed: dict[str, np.ndarray]) -> Latency:
    """Time two sessions in turn, A, B, A, B, ...: a machine that becomes slower for a while slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARMUP):
        base.run(base_feed)
        session.run(feed)
    while len(times[0]) < LEAST_RUNS or sum(times[1]) < LEAST_SECONDS:
        for one, given, into in zip((base, session), (base_feed, feed), times, strict=True):
            start = time.perf_counter()
            one.run(given)
            into.append(time.perf_counter() - start)
    return Latency(statistics.median(times[1]), min(times[1]), statistics.median(times[0]), min(times[0]), len(times[0]))
