"""A choice of a source's samples, looked at once and fed in batches of a static shape."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgewise.calibration.data import Ports, Source
from edgewise.errors import InputError

DEFAULT_SAMPLES = 128
FEW = 16
"""Samples below which statistics say little."""
MOST_BAD = 0.2
"""The largest share of samples that may be unreadable."""
_NAMED = 3


@dataclass(frozen=True)
class Samples:
    """Good samples of a source, by number, with their labels or texts, and questions. Iterating reads them anew: feeds of the batch
    size, the last of which is filled up with the last sample. `digest`: SHA-256 of all that they hold; `notes`: what was odd."""

    source: Source
    ports: Ports
    indices: tuple[int, ...]
    labels: np.ndarray | None
    texts: tuple[str, ...] | None
    digest: str
    notes: tuple[str, ...] = ()
    questions: tuple[str, ...] | None = None

    @property
    def batch(self) -> int:
        """Samples in a feed."""
        sizes = {port.shape[0] if port.shape else 0 for port in self.ports.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise InputError(f"the inputs of the model have no common batch dimension: {sorted(sizes)}")
        return sizes.pop()

    @property
    def count(self) -> int:
        return len(self.indices)

    def __len__(self) -> int:
        """The number of feeds."""
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, self.count, self.batch):
            rows = [min(row, self.count - 1) for row in range(start, start + self.batch)]
            samples = [self.source.read(self.indices[row]) for row in rows]
            yield {name: np.stack([one.inputs[name] for one in samples]) for name in self.ports}

    def first(self, count: int) -> Samples:
        """Some of the samples, spread evenly."""
        rows = spread(self.count, count)
        return self.only(rows)

    def only(self, rows: Sequence[int]) -> Samples:
        """Some of them, by their places among these."""
        labels = None if self.labels is None else self.labels[list(rows)]
        texts, questions = (None if known is None else tuple(known[row] for row in rows) for known in (self.texts, self.questions))
        indices = tuple(self.indices[row] for row in rows)
        return replace(self, indices=indices, labels=labels, texts=texts, questions=questions)


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `total` numbers, at equal distances: a source may be sorted by class."""
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)} if count < total else range(total))


def survey(source: Source, ports: Ports, indices: Sequence[int]) -> Samples:
    """Look at samples once, and keep those that are good.

    Raises `InputError` if too many cannot be read, or none is left; what is odd with fewer is noted.
    """
    digest = hashlib.sha256()
    good: list[int] = []
    labels: list[int] = []
    texts: list[str] = []
    questions: list[str] = []
    bad: list[str] = []
    odd: Counter[str] = Counter()
    for index in indices:
        try:
            sample = source.read(index)
        except InputError as error:
            bad.append(str(error))
            continue
        good.append(index)
        odd.update(sample.notes)
        for name in sorted(sample.inputs):
            array = sample.inputs[name]
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        asked = "" if sample.question is None else f" {sample.question!r}"
        digest.update(f"{sample.label!r} {sample.text!r}{asked}\n".encode())
        if sample.label is not None:
            labels.append(sample.label)
        if sample.text is not None:
            texts.append(sample.text)
        if sample.question is not None:
            questions.append(sample.question)
    named = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
    if not good:
        raise InputError(f"{source.name}: none of {len(indices)} samples can be used: {named}")
    if len(bad) > MOST_BAD * len(indices):
        raise InputError(
            f"{source.name}: {len(bad)} of {len(indices)} samples cannot be used, more than {MOST_BAD:.0%}: {named}"
        )
    notes = [*source.notes]
    if bad:
        notes.append(f"{source.name}: {len(bad)} of {len(indices)} samples were left out: {named}")
    notes += [f"{source.name}: {count} of {len(good)} samples were {text}" for text, count in sorted(odd.items())]
    return Samples(
        source,
        ports,
        tuple(good),
        np.array(labels, np.int64) if source.labelled else None,
        tuple(texts) if source.texts else None,
        digest.hexdigest(),
        tuple(notes),
        tuple(questions) if source.questions else None,
    )


def calibration_and_held_out(
    source: Source, ports: Ports, samples: int, held_out: int = 0
) -> tuple[Samples, Samples | None]:
    """Samples for statistics, and `held_out` others for a metric (0: none; fewer where there are fewer).

    Both are spread evenly over the source, or the others over the one that it has for them. Raises `InputError` if there are too
    few for both.
    """
    total, apart = len(source), source.apart
    if held_out and total < 2 and apart is None:
        raise InputError(f"{source.name} has one sample, and an accuracy needs others than those of the calibration")
    chosen = spread(total, min(samples, total // 2) if held_out and apart is None else samples)
    made = survey(source, ports, chosen)
    if made.count < FEW:
        note = f"{source.name}: statistics of {made.count} samples are rough; {FEW} or more are better"
        made = replace(made, notes=(*made.notes, note))
    if not held_out:
        return made, None
    if apart is not None:
        return made, survey(apart, ports, spread(len(apart), held_out))
    rest = _others(total, chosen)
    return made, survey(source, ports, [rest[i] for i in spread(len(rest), held_out)])


def _others(total: int, taken: Collection[int]) -> list[int]:
    known = set(taken)
    return [index for index in range(total) if index not in known]
