"""Fit the weights of a query method on calibration data: a short distillation against the uncompressed model.

What the model made of all its tokens is the teacher. The part of the program behind the site runs on the fitted tokens, and what
comes out is held to what the uncompressed program gives on the same inputs (knowledge distillation: Hinton et al., arXiv
1503.02531; as a regression: Ba and Caruana, arXiv 1312.6184). So tokens are good if what follows them reads the same from them,
which no error at the site itself can tell. Where tokens are themselves what comes out (at the end of an encoder, behind a
projector), there is nothing behind them to ask, and the full tokens must be readable from the fitted ones: see
`objective.Cover`. The model's own weights stay as they are; no labels are used.

The fit starts at pooling (`ops.start`), and decays towards it (L2-SP: Li et al., arXiv 1802.01483). AdamW, a constant rate, and a
running mean of the weights, which is what is kept: at the step where it is best on a fifth of the data that no gradient sees. So a
fit that runs out of time has the weights of one of as many steps, and more steps never make it worse on those inputs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from edgewise.errors import CheckFailed, InputError, Refused
from edgewise.exporter.compare import Data, Feeds
from edgewise.exporter.digest import Weights, tensor_digest
from edgewise.exporter.objective import Objective
from edgewise.exporter.rest import Rest, Values, outputs
from edgewise.ops import METHODS
from edgewise.ops.record import Record
from edgewise.ops.start import Start
from edgewise.passes.insert import Tap
from edgewise.passes.plan import Spec, make_plan, parse_spec
from edgewise.passes.program import Program, insert_plan
from edgewise.passes.step import batch_first

LEAST_SAMPLES = 16
HELD_OUT = 5
"""Every so manieth batch is not fitted on."""
STEP_SAMPLES = 16
EVERY = 25
"""Steps from one look at the held-out samples to the next."""
RATE, WARM_UP, DECAY, MEMORY, CLIP = 1e-2, 20, 1e-2, 0.95, 1.0
START_SAMPLES = 64

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Fitted:
    """Weights by name, those that they were at the `start`, what is known of how they came about, and the spec that they are for
    (without `weights`)."""

    weights: dict[str, Tensor]
    start: dict[str, Tensor]
    record: Record
    spec: Spec

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file, whole or not at all: the same weights give the same bytes. Raises InputError."""
        place = check_place(path)
        part = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            part.write_bytes(save(dict(sorted(self.weights.items())), self.record.metadata()))
            os.replace(part, place)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"cannot write {place}: {error.strerror or error}") from error

    def spec_with(self, path: str | os.PathLike[str]) -> str:
        """The spec that uses the weights from a file."""
        known = {"keep": self.record.keep} if "keep" in self.spec.parameters else {}
        options = {**self.spec.parameters, **known, "weights": path}
        return f"{self.record.method}@{self.record.site}:" + ",".join(f"{k}={_text(v)}" for k, v in options.items())


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_place(path: str | os.PathLike[str]) -> Path:
    """The path, if weights can be written there. Raises InputError."""
    place = Path(path)
    if place.suffix != ".safetensors":
        raise InputError(f"{path}: weights are written as a .safetensors file")
    if any(c in str(path) for c in ",[]"):
        raise InputError(f"{path}: a compression spec cannot hold this name: use one without , [ and ]")
    if place.is_dir():
        raise InputError(f"{path} is a folder: name a .safetensors file")
    if not place.parent.is_dir():
        raise InputError(f"{path}: there is no folder {place.parent}")
    return place


def find_spec(texts: Sequence[str]) -> tuple[Spec, list[Spec]]:
    """The one spec whose weights are to be fitted, and all, in order. Raises InputError where there is none, or several."""
    specs = [parse_spec(text) for text in texts]
    wanted = [spec for spec in specs if "weights" in spec.method.needs and "weights" not in spec.parameters]
    able = ", ".join(sorted(name for name, entry in METHODS.items() if entry.start is not None))
    if not specs:
        raise InputError(f"nothing to fit: give --compress METHOD:keep=... with a method that has weights: {able}")
    if not wanted:
        if all("weights" not in spec.method.needs for spec in specs):
            raise InputError(f"{', '.join(spec.method.name for spec in specs)} has no weights: {able} have")
        raise InputError("every method has its weights from a file already: leave weights=FILE out of the one to fit")
    if len(wanted) > 1:
        raise InputError(f"{' and '.join(spec.text for spec in wanted)} both want weights: fit one after the other, the first "
                         "with weights=FILE in the second fit")
    if wanted[0].method.start is None:
        raise InputError(f"{wanted[0].method.name} says nothing of where a fit could begin: {able} do")
    return wanted[0], specs


def fit(
    program: Program,
    specs: Sequence[str],
    data: Data,
    *,
    samples: int = 256,
    steps: int = 400,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Fit the one method among `specs` that has weights and no file with them.

    The program may have any batch: 16 samples make a step, from one batch or several. The same program, data, seed and number of
    threads give the same weights, bit by bit; after `seconds` those of as many steps as were done.

    Raises InputError where data or specs do not fit, Refused where nothing that follows the site can teach the weights,
    CheckFailed where the fit diverges, or is no better on held-out samples than its start.
    """
    tell = progress or (lambda done, total, text: None)
    if steps < 1 or samples < LEAST_SAMPLES or (seconds is not None and not seconds > 0):
        raise InputError(f"a fit takes 1 step or more, {LEAST_SAMPLES} samples or more, and some time: steps={steps}, "
                         f"samples={samples}, seconds={seconds}")
    if seed < 0:
        raise InputError(f"seed={seed} is negative")
    spec, parsed = find_spec(specs)
    fitting = _Fitting(program, spec, parsed)
    feeds = Feeds(fitting.program, data, samples, seed)
    batches = -(-feeds.count // feeds.batch)
    if feeds.count < LEAST_SAMPLES or batches < 2:
        raise InputError(f"{data.name} has {feeds.count} samples: a fit takes {LEAST_SAMPLES} or more, in two batches or more of "
                         f"the program's {feeds.batch}")
    _check_span(feeds)
    fitting.look(feeds, batches, tell)
    learn = _Learning(fitting, steps, seconds, seed, tell)
    changes, done, before, after = learn.run()
    weights = {name: value.contiguous().clone() for name, value in fitting.weights(changes).items()}
    start = {name: weight.value.clone() for name, weight in fitting.start.items()}
    record = Record(
        method=spec.method.name, site=fitting.step.place.name, keep=fitting.step.keep,
        parameters=dict(fitting.step.parameters), width=fitting.width, model=Weights().of_program(program.base),
        data=data.name, data_digest=_digest(feeds), samples=feeds.count - learn.held_samples, held_out=learn.held_samples,
        seed=seed, steps=done, before=before, after=after,
    )
    return Fitted(weights, start, record, spec)


def _digest(feeds: Feeds) -> str:
    parts = [f"{name} {tensor_digest(torch.from_numpy(array))}" for name, array in sorted(feeds.arrays.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_span(feeds: Feeds) -> None:
    if all((array == array[:1]).all() for array in feeds.arrays.values()):
        raise InputError("all calibration inputs are the same: there is nothing to learn from them")


class _Fitting:
    """The compressed program with its weights open, and what the fit needs to know of each batch: `border`, what comes before the
    weights, and `wanted`, what the uncompressed program gives."""

    def __init__(self, program: Program, spec: Spec, specs: list[Spec]) -> None:
        self.base, self.spec = program, spec
        plan, notes = make_plan(program.analysis, [*program.specs, *specs])
        of_spec = [(stream, step) for stream, steps in plan for step in steps
                   if step.method is spec.method and step.weights is None]
        if not of_spec:
            raise InputError(f"{spec.text!r} keeps every token: there is nothing to fit")
        if len(of_spec) > 1:
            raise InputError(f"{spec.text!r} goes to {len(of_spec)} sites: fit one site at a time")
        self.stream, self.step = of_spec[0]
        shape = self.step.place.node.meta["val"].shape
        others = [n for i, n in enumerate(shape) if i != self.step.place.axis]
        self.width = int(others[-1])
        # Of the right shapes; the values come when the tokens are known.
        generator = torch.Generator().manual_seed(0)
        free = self.step.tokens_in - self.step.protected
        drawn = self._begin(torch.randn(2, free, self.width, generator=generator))
        given = {name: weight.value for name, weight in drawn.items()}
        plan = [(stream, [replace(s, weights=given) if s is self.step else s for s in steps]) for stream, steps in plan]
        self.program, taps = insert_plan(program, tuple([*program.specs, *specs]), plan, notes)
        tap = next(tap for tap in taps if tap.step.weights is given)
        self.nodes = {name: _name(tap, f"weights.{name}") for name in given}
        self._tokens = _name(tap, "x")
        self.rest = Rest(self.program.exported, self.program.output_names, list(self.nodes.values()))
        self.start: Start = drawn
        self.border: list[Values] = []
        self.wanted: list[Values] = []
        self.feeds: Feeds | None = None
        self.objective = Objective({})

    def _begin(self, tokens: Tensor) -> Start:
        assert self.spec.method.start is not None
        try:
            return self.spec.method.start(tokens, self.step.keep, self._grid(tokens.shape[1]), dict(self.step.parameters))
        except ValueError as error:
            raise InputError(f"{self.spec.text!r}: {error}") from error

    def _grid(self, free: int) -> tuple[int, ...] | None:
        """Earlier steps of the stream have broken the grid."""
        return self.stream.grid if free == self.stream.tokens - self.stream.protected else None

    def look(self, feeds: Feeds, batches: int, tell: Progress) -> None:
        """Run both programs once on all the data, and choose the start and the objective."""
        captured = [name for name in self.program.inputs if name not in self.program.added]
        seen, enough = [], -(-START_SAMPLES // feeds.batch)
        for i in range(batches):
            tell(i, batches, f"run the model on {feeds.count} samples")
            feed = {k: torch.from_numpy(v) for k, v in feeds.feed(i * feeds.batch).items()}
            also = (self._tokens,) if i < enough else ()
            values = self.rest.first(feed, also)
            if also:
                seen.append(batch_first(values[self._tokens].float(), self.step.place.axis)[:, self.step.protected:])
            self.border.append(values)
            whole = outputs(self.base.base, self.base.output_names, {k: feed[k] for k in captured})
            self.wanted.append({k: v for k, v in whole.items() if k in self.rest.names})
        self.feeds = feeds
        tokens = torch.cat(seen)
        if not bool(tokens.isfinite().all()):
            raise InputError(f"the tokens at {self.step.place.name} are not finite on this data")
        self.start = self._begin(tokens)
        zero = {name: torch.zeros_like(weight.value).requires_grad_() for name, weight in self.start.items()}
        found = self.rest.second(self.border[0], self.by_node(zero))
        self.objective = Objective.of(self.wanted, found, self.stream.tokens - self.stream.protected, feeds.batch)
        names = set(self.objective.terms)
        self.wanted = [{k: v for k, v in wanted.items() if k in names} for wanted in self.wanted]
        if not names:
            raise Refused(f"no output of the model changes smoothly with the tokens of {self.step.place.name}, so nothing can "
                          "teach the weights: give a model that returns its scores or features",
                          method=self.spec.method.name)
        loss = self.loss(0, zero)
        if not bool(loss.isfinite()):
            raise InputError("the model's outputs are not finite on this data")
        gradients = torch.autograd.grad(loss, list(zero.values()), allow_unused=True)
        if not any(g is not None and bool(g.any()) for g in gradients):
            raise Refused(f"the outputs do not change with the tokens of {self.step.place.name}, so nothing can teach the "
                          "weights", method=self.spec.method.name)

    def weights(self, changes: Values) -> Values:
        """The weights after `changes`, in units of each."""
        return {name: weight.value + weight.unit * changes[name] for name, weight in self.start.items()}

    def by_node(self, changes: Values) -> Values:
        return {self.nodes[name]: value for name, value in self.weights(changes).items()}

    def loss(self, batch: int, changes: Values) -> Tensor:
        return self.objective(self.rest.second(self.border[batch], self.by_node(changes)), self.wanted[batch])


def _name(tap: Tap, key: str) -> str:
    node = tap.given[key]
    assert node is not None
    return node.name


class _Learning:
    """The descent."""

    def __init__(self, fitting: _Fitting, steps: int, seconds: float | None, seed: int, tell: Progress) -> None:
        self.fitting, self.steps, self.seconds, self.tell = fitting, steps, seconds, tell
        feeds, batches = fitting.feeds, range(len(fitting.border))
        assert feeds is not None
        # The last batch may be filled up, and is best fitted on.
        self.held = [i for i in batches if i % HELD_OUT == HELD_OUT - 1] or [0]
        self.seen = [i for i in batches if i not in self.held]
        self.held_samples = sum(min(feeds.batch, feeds.count - i * feeds.batch) for i in self.held)
        self.together = max(1, STEP_SAMPLES // feeds.batch)
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: list[int] = []

    def run(self) -> tuple[Values, int, float, float]:
        """The changes that are best on held-out samples, the steps that were done, and the held-out loss before and after."""
        fitting, ends = self.fitting, None if self.seconds is None else time.monotonic() + self.seconds
        changes = {name: torch.zeros_like(weight.value).requires_grad_() for name, weight in fitting.start.items()}
        mean = {name: torch.zeros_like(value) for name, value in changes.items()}
        optimizer = torch.optim.AdamW(changes.values(), lr=RATE, weight_decay=DECAY)
        first = best = self._judge(mean)
        chosen, done = dict(mean), 0
        while done < self.steps and (ends is None or time.monotonic() < ends):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (done + 1) / WARM_UP)
            optimizer.zero_grad()
            for batch in self._next():
                loss = fitting.loss(batch, changes) / self.together
                if not bool(loss.isfinite()):
                    raise CheckFailed(f"the fit diverged at step {done + 1}: the loss is {float(loss)}")
                loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(changes.values(), CLIP)
            optimizer.step()
            done += 1
            share = min(MEMORY, done / (done + 10))
            with torch.no_grad():
                mean = {name: share * mean[name] + (1 - share) * changes[name] for name in mean}
            if done % EVERY == 0:
                found = self._judge(mean)
                if found < best:
                    best, chosen = found, mean
                self.tell(done - 1, self.steps, f"fit: held-out loss {found:.4g}, {first:.4g} at the start")
        found = self._judge(mean)
        if found < best:
            best, chosen = found, mean
        if not best < first:
            raise CheckFailed(f"after {done} steps the fit is no better on {self.held_samples} held-out samples than its start "
                              f"(loss {found:.4g}, {first:.4g} at the start): give more data or more steps. "
                              "Nothing was written")
        return chosen, done, first, best

    def _next(self) -> list[int]:
        """The batches of one step: all in a random order, then all again."""
        while len(self.queue) < self.together:
            self.queue += [self.seen[i] for i in torch.randperm(len(self.seen), generator=self.generator).tolist()]
        taken, self.queue = self.queue[: self.together], self.queue[self.together :]
        return taken

    def _judge(self, changes: Values) -> float:
        """The mean loss on held-out samples."""
        with torch.no_grad():
            losses = [float(self.fitting.loss(batch, changes)) for batch in self.held]
        return sum(losses) / len(losses)
