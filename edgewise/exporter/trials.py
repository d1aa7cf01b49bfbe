"""Trials of schedules: what each loses and costs, measured once and remembered in a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from edgewise.calibration.metric import check_labels
from edgewise.calibration.samples import Samples
from edgewise.calibration.schedule import Counts
from edgewise.errors import CheckFailed, InputError, Refused
from edgewise.exporter.compare import Plain, interleaved, lowered
from edgewise.exporter.divergence import Divergence, Outputs
from edgewise.exporter.schedules import Space
from edgewise.passes.flops import total_flops
from edgewise.passes.program import Program
from edgewise.passes.program import compress as insert
from edgewise.targets import Session, Target

Arrays = dict[str, np.ndarray]
LIMIT = 1 << 24
"""Bytes of a file of trials."""


@dataclass
class Memory:
    """Numbers by name, in a file that is replaced whole after each new one. `key` says what they were measured of: those of
    something else are forgotten."""

    path: Path
    key: str
    known: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, key: str) -> Memory:
        """What the file holds of this key; nothing if it holds none, or is damaged."""
        try:
            if path.stat().st_size > LIMIT:
                return Memory(path, key)
            data = json.loads(path.read_text("utf-8"))
            if data["key"] == key:
                return Memory(path, key, {str(k): float(v) for k, v in data["measured"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # measured again, as all of it is
        return Memory(path, key)

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """The number of this name, measured now if it is not known."""
        if name not in self.known:
            self.put({name: measure()})
        return self.known[name]

    def put(self, measured: Mapping[str, float]) -> None:
        """Remember numbers. Raises `CheckFailed` for one that is not finite."""
        for name, value in measured.items():
            if not np.isfinite(value):
                raise CheckFailed(f"{name}: the compressed model's output is not finite on this data")
        self.known |= {name: float(value) for name, value in measured.items()}
        write_whole(self.path, json.dumps({"key": self.key, "measured": self.known}, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `InputError`."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


class Trials:
    """The schedules of a space on one model: `loss` on the samples to tune with; `flops` and `latency` as shares of those of the
    uncompressed model, which are measured of the compressed program and of its artifact."""

    def __init__(self, program: Program, space: Space, samples: Samples, memory: Memory, target: Target) -> None:
        self.program, self.space, self.memory, self.target = program, space, memory, target
        self.feeds = list(samples)
        self.evaluated = 0
        self.base_flops = total_flops(program.base)
        base = Plain(program.base, program.output_names)
        self.wanted: list[Outputs] = [base(_tensors(feed)) for feed in self.feeds]
        first = self.compressed(space.sites.clipped([1] * space.sites.count))
        found = Plain(first.exported, program.output_names)(_tensors(self.feeds[0]))
        self.divergence = Divergence.of(self.wanted, found, space.stream.protected, samples.labels is not None, samples.batch)
        self._check_labels(samples)
        self._made: tuple[Counts, Program] | None = None
        self._open = ExitStack()
        self._base: Session | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def compressed(self, counts: Counts) -> Program:
        """The program with a schedule. Raises `Refused` where it takes an input that data does not give."""
        specs = self.space.specs(counts)
        if not specs:
            return self.program
        self.space.check(self.program, counts)
        made = insert(self.program, *specs)
        if made.added:
            raise Refused(f"it takes an input that the data does not give: {', '.join(made.added)}",
                          method=self.space.spec.method.name)
        return made

    def _program(self, counts: Counts) -> Program:
        if self._made is None or self._made[0] != counts:
            self._made = (counts, self.compressed(counts))
        return self._made[1]

    def loss(self, counts: Counts) -> float:
        """The divergence of the outputs."""
        return self.memory.get(f"loss {_name(counts)}", lambda: self._loss(counts))

    def _loss(self, counts: Counts) -> float:
        self.evaluated += 1
        run = Plain(self._program(counts).exported, self.program.output_names)
        parts = [self.divergence(run(_tensors(feed)), wanted) for feed, wanted in zip(self.feeds, self.wanted, strict=True)]
        return sum(parts) / len(parts)

    def flops(self, counts: Counts) -> float:
        return self.memory.get(f"flops {_name(counts)}", lambda: total_flops(self._program(counts).exported) / self.base_flops)

    def latency(self, counts: Counts) -> float:
        """Of the artifact at `fp32`, one thread, in turns with the uncompressed one; the ratio of the medians."""
        return self.memory.get(f"{self.target.name} {_name(counts)}", lambda: self._latency(counts))

    def _latency(self, counts: Counts) -> float:
        program = self._program(counts)
        if self._base is None:
            folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="edgewise-")))
            self._base = self._open.enter_context(lowered(self.program, self.program.base, self.target, folder / "base"))
        with tempfile.TemporaryDirectory(prefix="edgewise-") as place, \
                lowered(program, program.exported, self.target, Path(place) / "made") as made:
            return interleaved(self._base, made, self.feeds[0], self.feeds[0]).ratio

    def judge(self, schedules: Mapping[str, Counts], samples: Samples) -> dict[str, tuple[float, float | None]]:
        """Of each schedule the divergence, and the accuracy where there are labels and class scores, on samples that `loss` does
        not see: these are read once, and none is kept."""
        names = list(dict.fromkeys(schedules.values()))
        missing = [c for c in names if f"held {_name(c)}" not in self.memory.known]
        if missing:
            self._judge(missing, samples)
        known = self.memory.known
        return {k: (known[f"held {_name(c)}"], known.get(f"accuracy {_name(c)}")) for k, c in schedules.items()}

    def _check_labels(self, samples: Samples) -> None:
        if self.divergence.scores is not None:
            check_labels(samples, self.wanted[0][self.divergence.scores].shape[1])

    def _judge(self, schedules: Sequence[Counts], samples: Samples) -> None:
        runs = [Plain(self.compressed(counts).exported, self.program.output_names) for counts in schedules]
        base = Plain(self.program.base, self.program.output_names)
        self._check_labels(samples)
        scores, labels = self.divergence.scores, samples.labels
        lost, correct, start = np.zeros(len(runs)), np.zeros(len(runs), int), 0
        for feed in samples:
            wanted = base(_tensors(feed))
            for i, run in enumerate(runs):
                found = run(_tensors(feed))
                lost[i] += self.divergence(found, wanted) / len(samples)
                if labels is not None and scores is not None:
                    here = labels[start : start + samples.batch]
                    correct[i] += int((found[scores].argmax(-1)[: len(here)] == here).sum())
            start += samples.batch
        for i, counts in enumerate(schedules):
            judged = labels is not None and scores is not None
            accuracy = {f"accuracy {_name(counts)}": correct[i] / samples.count} if judged else {}
            self.memory.put({f"held {_name(counts)}": lost[i], **accuracy})


def _tensors(feed: Arrays) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in feed.items()}


def _name(counts: Counts) -> str:
    return ",".join(map(str, counts))
