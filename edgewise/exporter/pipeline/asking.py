"""Ask a pipeline that is not shipped yet: what its decoder is fed on samples, what it says to them, and its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.calibration.samples import Samples
from edgewise.errors import InputError, extras_named
from edgewise.runtime.generate import Decoder, Generation
from edgewise.runtime.pipeline import GenerativePipeline
from edgewise.targets import Session
from edgewise.verify.texts import plain
from edgewise.verify.wer import word_errors

STEPS = 16
"""The most new tokens of a sample that statistics of `decode` are gathered of."""
MOST = 64
"""New tokens of a sample behind which none are generated for statistics."""
COMPARED = 16
"""New tokens of a sample whose logits say how sensitive a layer is."""

Feed = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """What a pipeline is asked for: whether a sample is a question about media, or media alone; and the metric of what it says,
    which may count `errors`."""

    asks: bool
    metric: str
    errors: bool
    needed: str
    """What labelled data is, for messages."""

    def check(self, samples: Samples, held_out: Samples | None) -> Samples | None:
        """See `edgewise.exporter.quantise.Check`."""
        name = samples.source.name
        if samples.batch != 1:
            raise InputError(f"{name}: a decoder is calibrated with one image or recording at a time, not {samples.batch}")
        if self.asks and samples.questions is None:
            raise InputError(f"{name} has no prompts, and statistics of the decoder are of answers: give {self.needed}")
        if held_out is None:
            return None
        if held_out.texts is None:
            raise InputError(f"{name} has no known texts, and accuracy control measures {self.metric}: give {self.needed}")
        if self.errors:
            with extras_named():
                import jiwer  # noqa: F401
        known = [row for row, text in enumerate(held_out.texts) if plain(text)]
        if not known:
            raise InputError(
                f"{name}: the texts of all {held_out.count} held-out samples are without words, and {self.metric} needs some"
            )
        return held_out.only(known)

    def score(self, known: Sequence[str], said: Sequence[str]) -> float:
        """The metric of answers, or of transcripts, against the known ones."""
        if self.errors:
            return word_errors(known, said).rate
        return sum(plain(a) == plain(b) for a, b in zip(known, said, strict=True)) / len(known)


TASKS = {
    "speech": Task(False, "word error rate", True, "a table (.tsv, .csv or .jsonl) with the columns file and text"),
    **dict.fromkeys(
        ("vision-language", "audio-language"),
        Task(True, "exact match", False, "a table (.tsv, .csv or .jsonl) with the columns file, question and answer"),
    ),
}
"""By the kind of pipeline."""


def ask(pipeline: GenerativePipeline, feed: Feed, question: str | None, where: str, most: int | None = None) -> Generation:
    """What is said to one sample, greedily. `where` it is from is said with any error."""
    (media,) = feed.values()
    room = pipeline.description.new_tokens
    most = room if most is None else min(most, room)
    try:
        if pipeline.description.kind == "speech":
            return pipeline.generate(media, max_new_tokens=most)
        return pipeline.generate(question, **{_argument(pipeline): media}, max_new_tokens=most)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def answers(pipeline: GenerativePipeline, samples: Samples) -> list[str]:
    """What is said to all samples."""
    return [ask(pipeline, *one).text for one in asked(samples)]


def asked(samples: Samples) -> Iterator[tuple[Feed, str | None, str]]:
    """Media, question, and where it is from, of one sample after the other."""
    for row, feed in enumerate(samples):
        question = None if samples.questions is None else samples.questions[row]
        yield feed, question, samples.source.where(samples.indices[row])


@dataclass
class Fed:
    """What a component of a decoder is fed while the pipeline runs on samples: one at a time, so that memory does not grow with
    their number."""

    pipeline: GenerativePipeline
    role: str
    samples: Samples
    counted: int | None = None

    def __len__(self) -> int:
        """Known exactly when all were gone through; before that, the most there can be."""
        return self.samples.count * (STEPS if self.role == "decode" else 1) if self.counted is None else self.counted

    def __iter__(self) -> Iterator[Feed]:
        count = 0
        for one in asked(self.samples):
            kept = _Spread(STEPS)

            def see(feed: Feed, outputs: Outputs, kept: _Spread = kept) -> Outputs:
                kept.add(feed)
                return outputs

            with watched(self.pipeline, {self.role: see}):
                ask(self.pipeline, *one, most=MOST if self.role == "decode" else 1)
            count += len(kept.feeds)
            yield from kept.feeds
        if not count:
            raise InputError(
                f"{self.samples.source.name}: the model says no more than one token to any sample, so that {self.role} never runs, "
                "and has no statistics: give it a precision without (w8a16)"
            )
        self.counted = count


class _Spread:
    """At most so many of the feeds that come, at equal distances."""

    def __init__(self, most: int) -> None:
        self.feeds: list[Feed] = []
        self._most, self._every, self._seen = most, 1, 0

    def add(self, feed: Feed) -> None:
        if self._seen % self._every == 0:
            if len(self.feeds) == self._most:
                self.feeds, self._every = self.feeds[::2], 2 * self._every
            if self._seen % self._every == 0:
                # Caches are written in place behind the run.
                self.feeds.append({name: array.copy() for name, array in feed.items()})
        self._seen += 1


@dataclass
class Probe:
    """A sample whose logits are compared: the first pipeline that it is put to chooses the tokens, and all others are given these,
    so that they differ by what they compute alone."""

    feed: Feed
    question: str | None
    where: str
    tokens: list[int] | None = None

    def logits(self, pipeline: GenerativePipeline) -> Outputs:
        """Logits of all new tokens, `(tokens, vocabulary)`."""
        found: list[np.ndarray] = []

        def see(feed: Feed, outputs: Outputs) -> Outputs:
            found.append(outputs["logits"].reshape(-1))
            if self.tokens is None:
                return outputs
            given = np.zeros_like(outputs["logits"])
            given.reshape(-1)[self.tokens[len(found) - 1]] = 1
            return {**outputs, "logits": given}

        with watched(pipeline, {"prefill": see, "decode": see}):
            made = ask(pipeline, self.feed, self.question, self.where, COMPARED)
        if self.tokens is None:
            self.tokens = made.ids
        return {"logits": np.stack(found)}


@contextmanager
def watched(pipeline: GenerativePipeline, see: Mapping[str, Callable[[Feed, Outputs], Outputs]]) -> Iterator[None]:
    """While this holds, `see` of a role is shown what that component of the decoder is fed and gives, and may change the latter."""
    whole = pipeline.decoder
    parts: dict[str, Session] = {"prefill": whole.prefill, "decode": whole.decode}
    shown = {role: _Watched(one, see[role]) if role in see else one for role, one in parts.items()}
    pipeline.decoder = Decoder(shown["prefill"], shown["decode"], pipeline.description)
    try:
        yield
    finally:
        pipeline.decoder = whole


class _Watched(Session):
    """A session that shows what it is fed and gives."""

    def __init__(self, session: Session, see: Callable[[Feed, Outputs], Outputs]) -> None:
        self.session, self.see = session, see
        self.inputs, self.outputs, self.kept = session.inputs, session.outputs, session.kept

    def run(self, feeds: Mapping[str, np.ndarray]) -> Outputs:
        return self.see(dict(feeds), self.session.run(feeds))

    def _run(self, feeds: Feed) -> Outputs:
        return self.run(feeds)

    def close(self) -> None:
        self.session.close()


def _argument(pipeline: Any) -> str:
    """How the pipeline calls the media of a question."""
    return {"recording": "audio", "video": "video"}.get(pipeline.noun, "image")
