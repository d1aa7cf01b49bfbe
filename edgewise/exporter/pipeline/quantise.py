"""Quantise the components of a pipeline together: statistics of the decoder are gathered as the pipeline runs, components that
share weights share what these become, and accuracy control measures what the whole says."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from edgewise.bundle.manifest import Artifact
from edgewise.bundle.reader import Bundle
from edgewise.calibration.control import PROBES, Candidate, Controlled, Sensitivity, Tell, keep_metric
from edgewise.exporter.component import described
from edgewise.exporter.job import Later
from edgewise.exporter.pipeline.asking import Fed, Probe, Task, answers, asked
from edgewise.exporter.quantise import NEED_DATA, Data, Wish, record_of, skipped
from edgewise.runtime import GenerativePipeline, load_pipeline
from edgewise.runtime.generate import Decoder
from edgewise.targets import Session, Target
from edgewise.targets.base import Feeds, Quantiser
from edgewise.targets.scales import joined
from edgewise.verify.ladder import Rung


@dataclass(frozen=True)
class Part:
    """A component as one target lowered it: its files, the precision that it shall have, and its quantiser, if it is quantised to
    that; `kept` are layers that are left out as asked."""

    role: str
    target: Target
    files: Sequence[Path]
    precision: str
    quantiser: Quantiser | None = None
    kept: tuple[str, ...] = ()


@dataclass
class Made:
    """What became of the components on all targets, by role."""

    artifacts: dict[str, list[Artifact]] = field(default_factory=dict)
    rungs: dict[str, list[Rung]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quantise_together(
    bundle: Bundle, later: Mapping[str, Later], precisions: Mapping[str, str], wishes: Mapping[str, Wish], task: Task, tell: Tell
) -> Made:
    """Quantise the components of a pipeline into the folder of `bundle`, which holds all else that running them needs. `later`: the
    lowered ones by role, in the order in which they run; the first has the data. `wishes`: layers to skip, and of the first the
    largest drop. Raises `InputError`, and `CheckFailed` for values that are not finite."""
    roles = list(later)
    data, drop, made = later[roles[0]].data, wishes[roles[0]].max_drop, Made()
    assert data is not None
    for turn in range(len(later[roles[0]].lowered)):
        lows = {role: later[role].lowered[turn] for role in roles}
        root = {role: bundle.path if lows[role].artifact.precision == precisions[role] else later[role].place for role in roles}
        parts = {
            role: Part(role, low.target, [root[role] / name for name in low.artifact.files], precisions[role])
            for role, low in lows.items()
        }
        with running(bundle, parts) as pipeline:
            tell(f"gather statistics for {lows[roles[0]].target.name}")
            parts = _quantisers(pipeline, parts, data, {role: wish.skip for role, wish in wishes.items()})
        controlled, bench = None, _Bench(bundle, parts)
        if drop is not None:
            controlled = bench.controlled(task, data, drop, tell)
        floating = bench.by_role(() if controlled is None else [one.layer for one in controlled.floating])
        for role, part in parts.items():
            if part.quantiser is None:
                made.artifacts.setdefault(role, []).append(lows[role].artifact)
                continue
            place = bundle.path / part.target.name
            files = part.target.finish(part.quantiser.write(place, role, [*part.kept, *floating[role]]))
            record = record_of(part.quantiser, part.kept, data, controlled, task.metric, partial(bench.share, role))
            artifact, rung = described(lows[role], files, part.precision, record, later[role].samples, bundle.path)
            made.artifacts.setdefault(role, []).append(artifact)
            made.rungs.setdefault(role, []).append(rung)
            made.notes += tuple(f"{part.target.name}: {role}: {note}" for note in part.quantiser.notes)
    return made


@contextmanager
def running(bundle: Bundle, parts: Mapping[str, Part]) -> Iterator[GenerativePipeline]:
    """The pipeline of components as they are."""
    with ExitStack() as stack:
        sessions = {role: stack.enter_context(part.target.rehearse(part.files)) for role, part in parts.items()}
        yield load_pipeline(bundle, sessions=sessions)


def _quantisers(
    pipeline: GenerativePipeline, parts: Mapping[str, Part], data: Data, skip: Mapping[str, Sequence[str]]
) -> dict[str, Part]:
    """The parts with their quantisers. A decoder is smoothed by the ranges of all its components, which share weights."""
    first = next(iter(parts))
    feeds: dict[str, Feeds] = {
        role: data.feeds(data.samples) if role == first else Fed(pipeline, role, data.samples)
        for role, part in parts.items()
        if part.precision in NEED_DATA and part.precision in part.target.quantises
    }
    sharing = [role for role in feeds if role != first]
    ranges = None
    if sharing:
        ranges = joined(*(parts[role].target.ranges(parts[role].files, feeds[role]) for role in sharing))
    made = {}
    for role, part in parts.items():
        if part.precision not in part.target.quantises:
            made[role] = part
            continue
        own = ranges if role in sharing else None
        quantiser = part.target.quantiser(part.files, part.precision, feeds.get(role), own)
        kept = tuple(skipped(quantiser.layers, skip[role], f"{part.target.name}/{role}"))
        made[role] = replace(part, quantiser=quantiser, kept=kept)
    return made


class _Bench:
    """Tries components with some layers in floating point. A layer that several components have at the same precision is one: it is
    in floating point in all of them, or in none."""

    def __init__(self, bundle: Bundle, parts: Mapping[str, Part]) -> None:
        self._bundle, self._parts = bundle, parts
        self.layers: dict[str, list[tuple[str, str]]] = {}
        """The components and their layers that each name stands for."""
        first = next(iter(parts))
        for role, part in parts.items():
            for layer in part.quantiser.layers if part.quantiser is not None else ():
                if layer not in part.kept:
                    shared = "decoder" if role != first and self._alike(role) else role
                    self.layers.setdefault(f"{shared}/{layer}", []).append((role, layer))
        self._bytes: dict[tuple[str, frozenset[str]], int] = {}

    def _alike(self, role: str) -> bool:
        """Whether another component of the decoder has the same precision."""
        return sum(one.precision == self._parts[role].precision for one in list(self._parts.values())[1:]) > 1

    def by_role(self, names: Collection[str]) -> dict[str, list[str]]:
        """The layers of each component that these names stand for."""
        found: dict[str, list[str]] = {role: [] for role in self._parts}
        for name in names:
            for role, layer in self.layers[name]:
                found[role].append(layer)
        return found

    def share(self, role: str, one: Sensitivity) -> Sensitivity | None:
        """What of a sensitivity is of one component; None: nothing."""
        layer = next((layer for owner, layer in self.layers[one.layer] if owner == role), None)
        if layer is None:
            return None
        every = frozenset(self.by_role(self.layers)[role])
        return Sensitivity(layer, one.sqnr_db, self._bytes[role, every] - self._bytes[role, every - {layer}])

    def controlled(self, task: Task, data: Data, max_drop: float, tell: Tell) -> Controlled:
        """See `keep_metric`."""
        held_out = data.held_out
        assert held_out is not None and held_out.texts is not None
        texts, probes = held_out.texts, [Probe(*one) for one in asked(held_out.first(PROBES))]
        with ExitStack() as last:
            place = last.enter_context(tempfile.TemporaryDirectory(prefix="edgewise-"))
            pipeline = last.enter_context(running(self._bundle, self._parts))
            tried = {role: _Tried(part, Path(place) / role, last) for role, part in self._parts.items() if part.quantiser}

            def make(names: Collection[str]) -> Candidate:
                floating = self.by_role(names)
                for role, one in tried.items():
                    pipeline.sessions[role], self._bytes[role, frozenset(floating[role])] = one.session(floating[role])
                pipeline.decoder = Decoder(pipeline.sessions["prefill"], pipeline.sessions["decode"], pipeline.description)
                size = sum(self._bytes[role, frozenset(floating[role])] for role in tried)
                return Candidate(
                    lambda probe: probe.logits(pipeline), size, lambda: task.score(texts, answers(pipeline, held_out))
                )

            return keep_metric(list(self.layers), make, probes, max_drop, tell, errors=task.errors)


class _Tried:
    """The artifacts of one component that are tried, one after the other; the first, where all is in floating point, is kept."""

    def __init__(self, part: Part, place: Path, stack: ExitStack) -> None:
        self._part, self._place, self._stack = part, place, stack
        self._loaded: dict[bool, tuple[frozenset[str], Session, int]] = {}

    def session(self, floating: Collection[str]) -> tuple[Session, int]:
        """The component with these layers in floating point, and its bytes."""
        wanted, first = frozenset(floating), not self._loaded
        for known, session, size in self._loaded.values():
            if known == wanted:
                return session, size
        if not first and False in self._loaded:
            self._loaded.pop(False)[1].close()
        quantiser = self._part.quantiser
        assert quantiser is not None
        files = quantiser.write(self._place / ("first" if first else "tried"), self._part.role, [*self._part.kept, *wanted])
        session, size = self._part.target.rehearse(files), sum(one.stat().st_size for one in files)
        self._stack.callback(session.close)
        self._loaded[first] = wanted, session, size
        return session, size
