"""From a compression spec to a plan: which method keeps how many tokens at which site. Numbers only, no graph."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from edgewise.errors import InputError, Refused, unknown
from edgewise.ops import METHODS, Method, Parameter
from edgewise.ops.budget import count_to_keep, kept_count, merge_schedule, spread_removal
from edgewise.ops.match import max_merges
from edgewise.ops.methods import read_span
from edgewise.ops.record import Record, read_record
from edgewise.ops.weights import read_tensors
from edgewise.passes.analysis import DECODER, PROJECTOR, Analysis, Place, Stream
from edgewise.passes.graph import describe, source_line


@dataclass(frozen=True)
class Spec:
    """One `METHOD[@SITE][:key=value,...]`, parsed. `site` is the text behind the `@`, or None."""

    text: str
    method: Method
    site: str | None
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One method at one site: of `tokens_in` tokens, `tokens_out` are left (the protected ones, and what the method makes
    itself, are counted); `keep` are those that it chose."""

    place: Place
    method: Method
    tokens_in: int
    tokens_out: int
    parameters: tuple[tuple[str, Any], ...]
    protected: int
    keep: int
    tail: int = 0
    text: Tensor | int | None = field(default=None, compare=False)
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False)
    padded: bool = False
    fitted: Record | None = None
    """What the file of the weights says of itself."""


def parse_spec(text: str) -> Spec:
    """Parse the `--compress` grammar, for example `tome:keep=0.5,schedule=decreasing` or `topk@encoder.block[3]:keep=64`.

    Raises InputError naming what is wrong, with the nearest known method or parameter.
    """
    if not isinstance(text, str):
        raise InputError(f"a compression spec is text (METHOD[@SITE][:key=value,...]), and this is {type(text).__name__}")
    if not text.strip():
        raise InputError("an empty compression spec: give METHOD[@SITE][:key=value,...], for example tome:keep=0.5")
    # The colon between method and parameters is the first one outside of brackets: a site may be block[2:6].
    head, tail = (*re.split(r":(?![^\[]*\])", text.strip(), maxsplit=1), "")[:2]
    name, at, site = head.partition("@")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    if at and not site:
        raise InputError(f"{text!r}: no site behind the @; for example {name}@encoder.block[3]")
    method = METHODS[name]
    known = {p.name: p for p in method.options}
    given: dict[str, Any] = {}
    for pair in re.split(r",(?![^\[]*\])", tail) if tail else []:
        key, equals, value = pair.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not value:
            raise InputError(f"{text!r}: {pair!r} is not key=value")
        if key not in known:
            raise unknown(f"parameter of {name}", key, known)
        if key in given:
            raise InputError(f"{text!r}: {key} is given twice")
        given[key] = _value(text, known[key], value)
    if "keep" in given and ({"r", "stride"} & set(given)):
        raise InputError(f"{text!r}: give keep or {'r' if 'r' in given else 'stride'}, not both")
    return Spec(text.strip(), method, site or None, given)


def _value(text: str, parameter: Parameter, value: str) -> Any:
    if parameter.choices:
        if value not in parameter.choices:
            raise unknown(f"value of {parameter.name} in {text!r}", value, parameter.choices)
        return value
    if parameter.type is not str and (not value.isascii() or "_" in value):  # Python reads these as numbers
        raise InputError(f"{text!r}: {parameter.name}={value} is not a number in ASCII digits")
    if parameter.name == "r" and value.startswith("["):
        if not re.fullmatch(r"\[\s*\d+(\s*,\s*\d+)*\s*\]", value):
            raise InputError(f"{text!r}: r={value} is not a list of whole numbers such as [16,8,0]")
        return [int(n) for n in value[1:-1].split(",")]
    if parameter.type is tuple:
        if not re.fullmatch(r"\[[^\[\]]+\]", value):
            raise InputError(f"{text!r}: {parameter.name}={value} is not a list such as [0.5,0.25]")
        try:
            return tuple(float(n) for n in value[1:-1].split(","))
        except ValueError:
            raise InputError(f"{text!r}: {parameter.name}={value} is not a list of numbers") from None
    try:
        number = _parse(parameter, value)
        parameter.check(number)
    except ValueError as error:
        raise InputError(f"{text!r}: {error}") from None
    return number


def _parse(parameter: Parameter, value: str) -> Any:
    if parameter.type is str:
        return value
    if parameter.type is bool:
        if value.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise ValueError(f"{parameter.name}={value} is not true or false")
        return value.lower() in ("true", "on", "1")
    try:
        return int(value)  # the count, of what may also be a fraction
    except ValueError:
        if parameter.type is int and parameter.name != "keep":
            raise ValueError(f"{parameter.name}={value} is not a whole number") from None
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{parameter.name}={value} is not a number") from None


def make_plan(analysis: Analysis, specs: Sequence[Spec]) -> tuple[list[tuple[Stream, list[Step]]], list[str]]:
    """Steps for every stream that is compressed, in graph order, and notes on what was adjusted.

    Raises InputError for an impossible count or an unknown site, and Refused where a site exists but its graph does not
    allow compression.
    """
    notes: list[str] = []
    chosen = [(spec, *places_of(analysis, spec)) for spec in specs]
    notes += [f"{spec.text} is at {places[0].name}: the number of tokens cannot change before it" for spec, stream, places in chosen
              if spec.site is None and stream.role == PROJECTOR]
    plan: list[tuple[Stream, list[Step]]] = []
    for stream in analysis.streams:
        rank = {place.name: i for i, place in enumerate(stream.places)}
        entries = sorted(((rank[p.name], n, spec) for n, (spec, s, places) in enumerate(chosen) if s is stream
                          for p in places), key=lambda e: e[:2])
        if entries:
            plan.append((stream, _steps(stream, [(stream.places[r], spec) for r, _, spec in entries], plan, notes)))
    return plan, notes


def tokens_left(stream: Stream, steps: Sequence[Step]) -> int:
    """How many tokens of a stream are left after those of `steps` that are its own (places of a stream are its alone)."""
    own = [s for s in steps if any(s.place is place for place in stream.places)]
    return own[-1].tokens_out + own[-1].place.lost if own else tokens_at_start(stream, steps)


def tokens_at_start(stream: Stream, steps: Sequence[Step]) -> int:
    """How many tokens come into a stream when the encoders that feed it are compressed by `steps`."""
    return stream.tokens - sum(s.stream.tokens - tokens_left(s.stream, steps) for s in stream.sources)


SITES = {"block": "encoder.block[i]", "out": "encoder.out", "projector": "projector.in or projector.out",
         "decoder": "decoder.block[i]"}


def places_of(analysis: Analysis, spec: Spec) -> tuple[Stream, list[Place]]:
    """The stream and places that a spec names, or those that are its method's default."""
    name = spec.method.name
    behind = _behind_projector(analysis, spec) if spec.site is None else None
    if behind is not None:
        return behind, list(behind.projector)
    if not analysis.streams or (spec.site is None and all(s.role == PROJECTOR for s in analysis.streams)):
        raise _no_streams(analysis, name)
    by_name = {p.name: (s, p) for s in analysis.streams for p in s.places}
    if spec.site is None:
        stream = _default_stream(analysis, spec)
        if stream.role == DECODER:
            places = _decoder_places(stream, spec)
        elif spec.method.every_block:
            places = stream.blocks
        elif stream.out is not None and stream.out_is_read:
            places = [stream.out]
        elif "block" in spec.method.sites:
            places = [stream.blocks[(len(stream.blocks) - 1) // 2]]
        else:
            raise Refused("nothing after the encoder's output reads any token but the protected ones, so compressing "
                          "there changes nothing", method=name)
    else:
        names = _expand_site(spec.site, analysis)
        for site in names:
            if site not in by_name:
                raise unknown("site", site, by_name)
        stream = by_name[names[0]][0]
        if any(by_name[n][0] is not stream for n in names):
            raise InputError(f"{spec.text!r} names sites of several encoders: give one spec for each")
        places = [by_name[n][1] for n in names]
    for place in places:
        if place.kind == "decoder" and "decoder" not in spec.method.sites:
            softmax = (place.behind or place.anchor).softmax
            raise Refused(f"the attention at {place.name} is causal: merging would mix what may see each other and what may not, "
                          "and early tokens receive more attention whatever they hold. In a decoder use "
                          + ", ".join(sorted(m.name for m in METHODS.values() if "decoder" in m.sites)),
                          node=softmax.name, source=source_line(softmax) or None, method=name)
        if place.kind not in spec.method.sites:
            raise InputError(f"{name} has no meaning at {place.name}: it goes to "
                             f"{' or '.join(SITES[kind] for kind in spec.method.sites)}")
        if place.kind == "decoder" and place is stream.blocks[0] and spec.method.scored_by == "last":
            raise InputError(f"{name} at {place.name}: no attention comes before the first block; use decoder.block[1] or later")
        if place is stream.out and not stream.out_is_read:
            raise Refused(f"nothing after {place.name} reads any token but the protected ones, so compressing there "
                          f"changes nothing: use {name}@{stream.name}.block[i]", method=name,
                          node=place.node.name)
        if place.refused:
            raise Refused(f"the token count cannot change at {place.name}, because of {place.refused}", method=name)
    return stream, places


def _behind_projector(analysis: Analysis, spec: Spec) -> Stream | None:
    """The tokens behind a projector, for a method that says no site: where the count of those before it cannot change."""
    streams = [s for s in analysis.streams if s.role == PROJECTOR]
    if not streams or "projector" not in spec.method.sites:
        return None
    ahead = [place for s in analysis.streams if s.of_media for place in s.places]
    return None if any(place.refused is None for place in ahead) else streams[0]


def _default_stream(analysis: Analysis, spec: Spec) -> Stream:
    decoders = [s for s in analysis.streams if s.role == DECODER]
    if spec.method.sites == ("decoder",):
        if not decoders:
            raise Refused("it prunes inside a decoder, and no causal attention over embedded tokens was found",
                          method=spec.method.name)
        return decoders[0]
    media = [s for s in analysis.streams if s.of_media] or analysis.streams
    if any(s.piece for s in media):
        raise Refused("its attention blocks do not form one stream of tokens, which breaks at "
                      f"{next(s.broken for s in media if s.broken)}", method=spec.method.name)
    if len(media) > 1:
        names = ", ".join(f"{spec.method.name}@{s.name}.block[*]" for s in media)
        raise InputError(f"the model has several encoders: say which one {spec.text!r} is for, as in {names}")
    return media[0]


def _decoder_places(stream: Stream, spec: Spec) -> list[Place]:
    """Where a method goes in a decoder that is not told: before the third block, as published for FastV, or before those blocks
    that divide the decoder into as many equal stages as it has ratios, and one more."""
    blocks = len(stream.blocks)
    stages = None if "keep" in spec.parameters else spec.parameters.get("stages") or _defaults(spec.method).get("stages")
    if stages is None:
        return [stream.blocks[min(2, blocks - 1)]]
    return [stream.blocks[blocks * (i + 1) // (len(stages) + 1)] for i in range(len(stages))]


def _defaults(method: Method) -> dict[str, Any]:
    return {p.name: p.default for p in method.parameters}


def _expand_site(site: str, analysis: Analysis) -> list[str]:
    """`encoder.block[3,6]`, `encoder.block[*]` and `encoder.block[2:6]` as a list of names."""
    match = re.fullmatch(r"(.+)\.block\[([\d,:* ]+)\]", site)
    if not match:
        return [site]
    stream, inside = match.groups()
    blocks = next((len(s.blocks) for s in analysis.streams if s.name == stream), 0)
    numbers: list[int] = []
    for part in inside.replace(" ", "").split(","):
        if part == "*":
            numbers += range(blocks)
        elif ":" in part:
            first, last = part.split(":", 1)
            numbers += range(int(first or 0), min(int(last), blocks) if last else blocks)
        elif part.isdigit():
            numbers.append(int(part))
    if not numbers:
        raise InputError(f"site {site!r} names no block: give block[i], block[i,j], block[i:j] or block[*]")
    return [f"{stream}.block[{n}]" for n in sorted(set(numbers))]


def _no_streams(analysis: Analysis, method: str) -> Refused:
    if not analysis.anchors:
        return Refused("the model has no attention: nothing in its graph is a token stream", method=method)
    index, reason = next(iter(analysis.unplaced.items()))
    anchor = analysis.anchors[index]
    return Refused(f"none of its {len(analysis.anchors)} attentions runs over a stream of tokens that could be compressed. "
                   f"The first is {describe(anchor.softmax)}: {reason}", method=method, node=anchor.softmax.name)


def _steps(stream: Stream, entries: list[tuple[Place, Spec]], plan: Sequence[tuple[Stream, list[Step]]],
           notes: list[str]) -> list[Step]:
    fed = [step for _, planned in plan for step in planned]
    count = tokens_at_start(stream, fed)
    steps: list[Step] = []
    schedules: dict[int, list[int]] = {}
    position: dict[int, int] = {}
    for place, spec in entries:
        method, given = spec.method, spec.parameters
        parameters = {k: v for k, v in _defaults(method).items() if k not in ("keep", "r", "schedule")}
        parameters |= {k: v for k, v in given.items() if k in parameters}
        here = count - place.lost
        try:
            start, stop = _span(stream, place, spec, count, steps, fed)
            protected, tail, free = start, here - stop, stop - start
            if tail < stream.trailing:
                raise ValueError(f"the model reads the last {stream.trailing} of the tokens by position: end the span at "
                                 f"{here - stream.trailing} or before")
            _check_needs(method, stream, steps)
            if method.every_block:
                if id(spec) not in schedules:
                    sites = sum(s is spec for _, s in entries)
                    schedules[id(spec)] = _schedule(spec, count, protected, sites)
                wanted = schedules[id(spec)][position.setdefault(id(spec), 0)]
                position[id(spec)] += 1
                merged = min(wanted, max_merges(count, protected))
                if merged < wanted:
                    notes.append(f"{spec.text} at {place.name}: r={wanted} clipped to {merged}, half of the {free} "
                                 "unprotected tokens")
                keep = free - merged
            elif "stages" in parameters and "keep" not in given:
                ratios, stage = parameters["stages"], position.setdefault(id(spec), 0)
                position[id(spec)] += 1
                keep = _stage(spec, ratios, stage, free, steps)
            else:
                keep = count_to_keep(method, given.get("keep"), None, here - tail, protected, stream.grid, stream.frames,
                                     parameters)
            source = given.get("text", "input")
            text = None if "text" not in method.needs else given.get("text_tokens", 1) if source == "input" \
                else _one(read_tensors(source), source)
            weights, fitted = None, None
            if "weights" in given:
                weights, fitted = read_tensors(given["weights"]), read_record(given["weights"])
            if fitted is not None:
                fitted.check(method.name, place.name, parameters)
        except ValueError as error:
            raise InputError(f"{spec.text!r} at {place.name} ({here} tokens, {place_protected(stream, place)} of them protected): "
                             f"{error}") from error
        extra = method.extra({**parameters, "frames": stream.frames})
        if keep < free or extra or method.widens(parameters) > 1:
            after = protected + keep + extra + tail
            steps.append(Step(place, method, here, after, tuple(sorted(parameters.items(), key=lambda kv: kv[0])), protected, keep,
                              tail, text, weights, bool(given.get("length", False)), fitted))
            count = after + place.lost
    return steps


def place_protected(stream: Stream, place: Place) -> int:
    """How many leading tokens may not be touched at a site."""
    return stream.protected - place.lost


def _span(stream: Stream, place: Place, spec: Spec, count: int, before: list[Step], fed: list[Step]) -> tuple[int, int]:
    """The first token that the method may look at, and the one behind the last."""
    protected = place_protected(stream, place)
    if place.kind != "decoder":
        return protected, count - place.lost
    if before:  # the span is that of the first step, less what has been taken out of it
        first = before[0].protected, before[0].tokens_in - before[0].tail
        if "span" in spec.parameters and read_span(spec.parameters["span"], protected, tokens_at_start(stream, fed)) != first:
            raise ValueError(f"span={spec.parameters['span']} is not the span of {before[0].method.name} before it, "
                             f"{first[0]}:{first[1]}: methods of one decoder share their span")
        return before[-1].protected, count - before[-1].tail
    if "span" not in spec.parameters and len(stream.sources) == 1:  # the graph says where the encoder's tokens are
        source = stream.sources[0]
        return source.lead, source.lead + tokens_left(source.stream, fed) - source.lost
    if "span" not in spec.parameters:
        raise ValueError("say which tokens are the image's, the video's or the audio's: span=START:STOP")
    return read_span(spec.parameters["span"], protected, count)


def _stage(spec: Spec, ratios: Sequence[float], stage: int, free: int, before: list[Step]) -> int:
    """Tokens that stay at one stage of several: a ratio of the tokens that were there at first, or a count above 1."""
    if stage >= len(ratios):
        raise ValueError(f"it has {len(ratios)} stages, and is placed at more sites than those")
    if not 0 < ratios[stage] < float("inf"):
        raise ValueError(f"stage {stage} is {ratios[stage]:g}: give a share above 0 and up to 1, or a number of tokens above 1")
    first = next((s for s in before if s.method is spec.method), None)
    original = free if first is None else first.tokens_in - first.protected - first.tail
    keep = max(1, int(original * ratios[stage] + 1e-9) if ratios[stage] <= 1 else int(ratios[stage]))
    if keep > free:
        raise ValueError(f"stage {stage} keeps {keep} tokens, and {free} are left: ratios may not rise")
    return keep


def _one(tensors: dict[str, Tensor], path: str) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(f"{path} holds {len(tensors)} tensors: {', '.join(tensors)}; a text embedding is one")
    text = next(iter(tensors.values()))
    if text.ndim != 2 or not text.is_floating_point() or not bool(text.isfinite().all()):
        raise ValueError(f"{path} holds {str(text.dtype).removeprefix('torch.')} {list(text.shape)}: a text embedding is a finite "
                         "floating-point matrix (tokens, features)")
    return text


def _check_needs(method: Method, stream: Stream, before: list[Step]) -> None:
    scored = {"attention", "keys", "queries"} & set(method.needs)
    if stream.origin is not None and scored and stream.origin.refused:
        free = sorted(m.name for m in METHODS.values() if "projector" in m.sites and not m.needs)
        raise ValueError(f"{method.name} needs {' and '.join(sorted(scored))} of each token, and {stream.origin.refused}: use "
                         + ", ".join(free))
    if "frames" in method.needs and (stream.frames is None or before):
        raise ValueError(f"{method.name} needs the tokens of all frames of a video, frame after frame, and "
                         + (f"{before[-1].method.name} before it has taken some" if stream.frames else
                            "the tokens of this graph do not come in frames"))
    if "grid" in method.needs:
        if stream.grid is None:
            raise ValueError(f"{method.name} needs tokens on a grid, and none was found in this graph")
        if before:
            raise ValueError(f"{method.name} needs tokens on a grid, and {before[-1].method.name} before it breaks the grid")


def _schedule(spec: Spec, count: int, protected: int, blocks: int) -> list[int]:
    given, free = spec.parameters, count - protected
    shape = given.get("schedule", "constant")
    if "r" in given:
        r = given["r"]
        if isinstance(r, list) and "schedule" in given:
            raise ValueError("a list of r is a schedule of its own: leave schedule out")
        most = max_merges(count, protected)
        if max([r] if isinstance(r, int) else r, default=0) > most:
            raise ValueError(f"r={r} is too large: at most {most} tokens can merge at one block here")
        return merge_schedule(r, blocks, shape)
    if "keep" not in given:
        raise ValueError("give keep=... (what stays at the end) or r=... (what is merged at every block)")
    return spread_removal(free - kept_count(given["keep"], free), count, protected, blocks, shape)
