"""Climb the ladder: the model, its program, the compressed one, and every artifact, each against the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from edgewise.errors import CheckFailed
from edgewise.exporter.capture import evaluating, quiet
from edgewise.exporter.choices import choices_of
from edgewise.exporter.image_input import eager_inputs
from edgewise.exporter.job import Job, judge
from edgewise.exporter.lowering import Lowered
from edgewise.exporter.run import Outputs, Runner, as_array
from edgewise.passes.legalise import Legalise
from edgewise.passes.program import Program
from edgewise.targets import Target, Tolerance
from edgewise.verify.bundle import SAME_CHOICES
from edgewise.verify.ladder import Rung, within
from edgewise.verify.metrics import overlap

CAPTURE_THRESHOLD = 1e-5
LOWERING_THRESHOLD = Tolerance().relative
"""Largest relative error of a realisation. What artifacts are held to is said by their target (`Target.tolerance`); those of fp16
are compared with the program at the weights that half precision leaves, so that storage and lowering errors are not mixed up."""


class NearTie(CheckFailed):
    """An artifact differs from its program, and the input leaves it open which tokens to keep."""


@dataclass(frozen=True)
class Ran:
    """What came out on the samples: of the uncompressed (`base`) and of the compressed program, with what each of its selections
    kept, and its runner, which knows how near to another choice those were and how well the realisations did."""

    base: Outputs
    compressed: Outputs
    decisions: dict[str, np.ndarray]
    runner: Runner


def run_programs(program: Program, steps: Mapping[str, Legalise], samples: list[dict[str, Tensor]]) -> Ran:
    base = _run_all(program, program.base, samples)
    realised = {name: step.realised for name, step in steps.items()}
    runner = Runner(program.exported, program.output_names, realised=realised)
    return Ran(base, *_stack(runner, samples), runner)


def verify(
    job: Job,
    program: Program,
    stored: ExportedProgram,
    lowered: list[Lowered],
    samples: list[dict[str, Tensor]],
    ran: Ran,
    last: bool,
) -> Outputs:
    """Climb the ladder on these samples; gives the outputs of `stored`, which is the compressed program with the weights that the
    artifacts have.

    Raises CheckFailed at the first rung above its threshold; NearTie if that may come from a choice between tokens whose
    scores are as close as rounding errors are. On the `last` attempt such an artifact is compared at its own choices instead.
    """
    base, wanted, decisions, runner = ran.base, ran.compressed, ran.decisions, ran.runner
    if job.source.module is not None:
        eager = _eager(job, samples, program)
        job.judge("captured", "eager model", "capture", eager, base, threshold=CAPTURE_THRESHOLD)
    if program.steps:
        _judge_compression(job, base, wanted)
        _judge_realisations(job, runner)
    if job.halves:
        half = Runner(stored, program.output_names)
        full = wanted
        wanted, others = _stack(half, samples)
        runner.margin = half.margin
        kept = [overlap(decisions[k], others[k]) for k in decisions]
        agree = sum(kept) / len(kept) if kept else None
        note = "weights are rounded to half precision; there is nothing to pass"
        job.rungs.append(judge("fp16 weights", "compressed", "precision", full, wanted, kept_overlap=agree, note=note))
    feeds = [{k: as_array(v) for k, v in sample.items()} for sample in samples]
    against = "fp16 weights" if job.halves else "compressed"
    for low in lowered:
        found = outputs_of(low.target, low.files, samples)
        label, tolerance = low.artifact.label, low.target.tolerance(low.artifact.precision)
        try:
            job.judge(label, against, "lowering", wanted, found, threshold=tolerance.relative)
            continue
        except CheckFailed as failed:
            if runner.margin >= tolerance.near_tie:
                raise
            if not last:
                raise NearTie(str(failed)) from failed
            job.rungs.pop()
        note = (
            f"{label}: the scores of two tokens differ by {runner.margin:.1e} on every input tried, so that "
            "runtimes may keep other tokens than torch; "
        )
        _judge_alike(job, low, program, stored, samples, feeds, (wanted, found), against, note)
    return wanted


def _judge_alike(
    job: Job,
    low: Lowered,
    program: Program,
    stored: ExportedProgram,
    samples: list[dict[str, Tensor]],
    feeds: list[dict[str, np.ndarray]],
    results: tuple[Outputs, Outputs],
    against: str,
    note: str,
) -> None:
    """Judge an artifact that keeps other tokens than torch against the program that keeps the same. `results`: what was wanted of
    it, and what it gave."""
    wanted, found = results
    label, precision = low.artifact.label, low.artifact.precision
    with quiet():
        chosen = choices_of(stored, low.target, low.legalise, precision, list(program.inputs), program.output_names, feeds)
    runner = Runner(stored, program.output_names)
    kept, outputs = [], []
    for sample, choice in zip(samples, chosen, strict=True):
        runner(sample)
        for name, indices in runner.decisions.items():
            made = choice[name]
            other = made if isinstance(made, Tensor) else made[0]
            if other is not None:
                kept.append(overlap(indices, other.numpy()))
        outputs.append(runner(sample, choice))
    alike = {k: np.stack([one[k] for one in outputs]) for k in wanted}
    agree = sum(kept) / len(kept) if kept else None
    job.add(judge(label, against, "lowering", wanted, found, kept_overlap=agree, note=note + "compared at the same choices below"))
    threshold = low.target.tolerance(precision).relative
    job.judge(label + SAME_CHOICES, against, "lowering", alike, found, threshold=threshold)


def _judge_compression(job: Job, base: Outputs, wanted: Outputs) -> None:
    same = {k for k in base if base[k].shape == wanted[k].shape}
    if same:
        job.rungs.append(
            judge(
                "compressed",
                "uncompressed",
                "compression",
                {k: base[k] for k in sorted(same)},
                {k: wanted[k] for k in sorted(same)},
            )
        )
    if set(base) - same:
        job.rungs.append(
            Rung(
                name="compressed",
                against="uncompressed",
                kind="compression",
                note="these outputs have fewer tokens, and cannot be compared: " + ", ".join(sorted(set(base) - same)),
            )
        )


def _judge_realisations(job: Job, runner: Runner) -> None:
    """Every compression op against the realisation that stands for it, on the values that it gets in the model.

    The graph that they make together is judged by the artifact, which is compared with the compressed program.
    """
    for target, checked in runner.checked.items():
        passed = all(within(errors, LOWERING_THRESHOLD) for errors in checked.values())
        job.add(
            Rung(
                name=f"realisations for {target}",
                against="compression ops",
                kind="legalisation",
                outputs=dict(sorted(checked.items())),
                threshold=LOWERING_THRESHOLD,
                passed=passed,
            )
        )


def outputs_of(target: Target, files: Sequence[Path], samples: list[dict[str, Tensor]]) -> Outputs:
    """What an artifact gives on the samples, stacked."""
    with target.rehearse(files) as session:
        results = [session.run_anew({k: as_array(v) for k, v in sample.items()}) for sample in samples]
    return {k: np.stack([r[k] for r in results]) for k in results[0]}


def _eager(job: Job, samples: list[dict[str, Tensor]], program: Program) -> Outputs:
    """The model itself on the samples. On the example inputs it ran when it was captured."""
    source = job.source
    assert source.module is not None
    flat, spec = pytree.tree_flatten((tuple(source.args), dict(source.kwargs)))
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    results = []
    with evaluating(source.module), quiet():
        for sample in samples:
            inputs = {k: v for k, v in sample.items() if k not in program.added}
            if program.expected and all(inputs[k] is program.inputs[k] for k in inputs):
                results.append({k: as_array(v) for k, v in program.expected.items()})
                continue
            leaves = list(flat)
            for i, value in zip(where, eager_inputs(inputs, job.pixels).values(), strict=True):
                leaves[i] = value
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            outputs = pytree.tree_leaves(source.module(*args, **kwargs))
            results.append(
                {n: as_array(v) for n, v in zip(program.output_names, outputs, strict=True) if isinstance(v, Tensor)}
            )
    return {k: np.stack([r[k] for r in results]) for k in results[0]}


def _run_all(program: Program, exported: ExportedProgram, samples: list[dict[str, Tensor]]) -> Outputs:
    return _stack(Runner(exported, program.output_names), samples)[0]


def _stack(runner: Runner, samples: list[dict[str, Tensor]]) -> tuple[Outputs, dict[str, np.ndarray]]:
    """Outputs, and what each selection kept, stacked over samples."""
    results, decisions = [], []
    for sample in samples:
        results.append(runner(sample))
        decisions.append(runner.decisions)
    return (
        {k: np.stack([r[k] for r in results]) for k in results[0]},
        {k: np.stack([d[k] for d in decisions]) for k in decisions[0]},
    )
