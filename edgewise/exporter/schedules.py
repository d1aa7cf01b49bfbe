"""What can be tuned of a method: its sites in one encoder, and how a schedule of tokens is written as compression specs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgewise.calibration.schedule import Counts, Sites
from edgewise.errors import InputError, Refused
from edgewise.exporter.compare import media_stream
from edgewise.ops.budget import spread_removal
from edgewise.passes.analysis import Place, Stream
from edgewise.passes.plan import Spec, make_plan, parse_spec, place_protected, places_of
from edgewise.passes.program import Program

SHAPES = ("constant", "decreasing", "increasing")


@dataclass(frozen=True)
class Space:
    """The schedules of one method over the blocks of one stream."""

    spec: Spec
    stream: Stream
    places: tuple[Place, ...]
    sites: Sites
    extra: int

    @staticmethod
    def of(program: Program, text: str) -> Space:
        """From a spec without counts. Raises `InputError` if its method cannot keep a number of its own at every site."""
        spec = parse_spec(text)
        method, given = spec.method, spec.parameters
        if counted := sorted({"keep", "r", "schedule", "stages"} & set(given)):
            raise InputError(f"{text!r}: leave {counted[0]} out: that is what is tuned")
        if "block" not in method.sites or all(p.name != "keep" for p in method.parameters) or method.legal_counts is not None:
            raise InputError(f"{method.name} has no number of tokens of its own at every block of an encoder, so there is no "
                             "schedule to tune: use one that has, such as tome, topk or dpcknn")
        if "weights" in method.needs:
            raise InputError(f"{method.name} needs weights of its own for every site and number of tokens, which are not there to "
                             "be tried: tune a method without weights")
        if spec.site is None:
            stream = media_stream(program)
            places = [place for place in stream.blocks if not place.refused]
        else:
            stream, places = places_of(program.analysis, spec)
        if any(place.kind != "block" for place in places) or not places:
            raise InputError(f"{text!r}: a schedule is tuned over the blocks of an encoder: {method.name}@{stream.name}.block[*]")
        protected = max(place_protected(stream, place) for place in places)
        extra = method.extra({**{p.name: p.default for p in method.parameters}, **given, "frames": stream.frames})
        sites = Sites(len(places), stream.tokens - stream.protected, method.halves, 1 + extra)
        if sites.free < 2 + extra:
            raise InputError(f"{stream.name} has {stream.tokens} tokens, {protected} of them protected: there is nothing to tune")
        return Space(spec, stream, tuple(places), sites, extra)

    @property
    def lists(self) -> bool:
        """Whether one spec says what every block removes."""
        return any(p.name == "r" for p in self.spec.method.parameters)

    def specs(self, counts: Sequence[int]) -> tuple[str, ...]:
        """A schedule as compression specs, the same that `--compress` takes."""
        removed = self.sites.removed(counts)
        if not any(removed):
            return ()
        name, options = self.spec.method.name, [f"{k}={_text(v)}" for k, v in self.spec.parameters.items()]
        if self.lists:
            numbers = ",".join(map(str, removed))
            whole = self.spec.site is None and len(self.places) == len(self.stream.blocks)
            at = "" if whole else f"@{self.stream.name}.block[{','.join(str(self._block(p)) for p in self.places)}]"
            return (f"{name}{at}:" + ",".join([f"r=[{numbers}]", *options]),)
        return tuple(
            f"{name}@{place.name}:" + ",".join([f"keep={left - self.extra}", *options])
            for place, left, number in zip(self.places, counts, removed, strict=True)
            if number
        )

    def _block(self, place: Place) -> int:
        return next(i for i, other in enumerate(self.stream.blocks) if other is place)

    def check(self, program: Program, counts: Sequence[int]) -> None:
        """Raise `InputError` if the specs of a schedule do not do what it says."""
        plan, _ = make_plan(program.analysis, [parse_spec(text) for text in self.specs(counts)])
        left = {step.place.name: step.tokens_out + step.place.lost - self.stream.protected for _, steps in plan for step in steps}
        for place, count, number in zip(self.places, counts, self.sites.removed(counts), strict=True):
            if number and left.get(place.name) != count:
                raise Refused(f"{place.name} keeps {left.get(place.name)} tokens where the schedule says {count}",
                              method=self.spec.method.name)

    def shaped(self, shape: str, total: int) -> Counts:
        """One of the usual schedules, that removes so many tokens in all."""
        return self.sites.clipped(spread_removal(total, self.sites.free, 0, self.sites.count, shape))

    @property
    def most(self) -> int:
        """Tokens that the usual schedules can remove at most: each site half of what comes, and no more than the method can."""
        left = self.sites.free
        for _ in range(self.sites.count):
            left = max(self.sites.floor(left), (left + 1) // 2)
        return self.sites.free - left


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
