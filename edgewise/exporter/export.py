"""The pipeline: model to program, compressed, legalised, lowered, verified at every step, and written as a bundle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from edgewise import targets as target_registry
from edgewise.bundle.manifest import Artifact, Calibration, Component, Manifest, ModelInfo, TensorInfo
from edgewise.bundle.manifest import Site as ManifestSite
from edgewise.bundle.reader import Bundle
from edgewise.bundle.writer import write_bundle
from edgewise.calibration.control import parse_drop
from edgewise.calibration.pixels import Pixels
from edgewise.calibration.samples import DEFAULT_SAMPLES
from edgewise.errors import CheckFailed, InputError
from edgewise.exporter.cache import Cache
from edgewise.exporter.capture import capture, evaluating, from_exported, quiet
from edgewise.exporter.choices import choices_of
from edgewise.exporter.digest import Weights, artifact_key
from edgewise.exporter.half import rounded
from edgewise.exporter.identity import code_digest
from edgewise.exporter.image_input import eager_inputs, take_pixels
from edgewise.exporter.precisions import DEFAULT, parse_precisions
from edgewise.exporter.quantise import Data, Wish, gather, quantise
from edgewise.exporter.quantise import check as check_wish
from edgewise.exporter.recipe import Recipe
from edgewise.exporter.report import write_report
from edgewise.exporter.run import Outputs, Runner, as_array
from edgewise.exporter.sources import Source, load_source
from edgewise.exporter.variant_specs import parse_variants
from edgewise.passes.flops import total_flops
from edgewise.passes.legalise import Legalise
from edgewise.passes.plan import parse_spec
from edgewise.passes.program import Program
from edgewise.passes.program import compress as insert
from edgewise.targets import Target, Tolerance
from edgewise.targets.base import Quantiser
from edgewise.verify import ladder
from edgewise.verify.bundle import SAME_CHOICES, batched
from edgewise.verify.ladder import Rung, within
from edgewise.verify.metrics import overlap
from edgewise.version import __version__

CAPTURE_THRESHOLD = 1e-5
LOWERING_THRESHOLD = Tolerance().relative
"""Largest relative error of a realisation. What artifacts are held to is said by their target (`Target.tolerance`); those of fp16
are compared with the program at the weights that half precision leaves, so that storage and lowering errors are not mixed up."""

ATTEMPTS = 6
"""Where two scores are nearly the same, runtimes may keep other tokens than torch, and neither is wrong. Such an input verifies
little, and up to this many are tried."""

_MEANINGS = {
    "length": "how many leading tokens of each sample are real, class token included; the rest is padding",
    "text": "text embedding, one row for each text token",
}
"""What the inputs are for that compression adds."""

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is done now."""


class NearTie(CheckFailed):
    """An artifact differs from its program, and the input leaves it open which tokens to keep."""


@dataclass
class Job:
    """One export on its way: everything that the steps hand on."""

    recipe: Recipe
    source: Source
    chosen: list[Target]
    progress: Progress | None = None
    cache: Cache | None = None
    weights: Weights = field(default_factory=Weights)
    rungs: list[Rung] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    wish: Wish = field(default_factory=Wish)
    precision: str = DEFAULT
    """Of the component that is built."""
    leaders: dict[str, Quantiser] = field(default_factory=dict)
    pixels: Pixels | None = None
    done: int = 0

    def step(self, text: str) -> None:
        self.tell(text)
        self.done += 1

    def tell(self, text: str) -> None:
        """Say what is done now, within a step."""
        if self.progress is not None:
            self.progress(self.done, 5 + len(self.chosen), text)

    @property
    def halves(self) -> bool:
        """Whether weights are rounded to half precision: what a quantised artifact does not quantise is stored in it, too."""
        return self.precision == "fp16" or any(self.precision in target.quantises for target in self.chosen)

    def lowered_precision(self, target: Target) -> str:
        """What a program is lowered at; a quantised artifact is made of the lowered one."""
        return target.quantises_from if self.precision in target.quantises else self.precision

    def judge(self, *args: Any, **kwargs: Any) -> None:
        """Compare, and add the rung."""
        self.add(judge(*args, **kwargs))

    def add(self, rung: Rung) -> None:
        """Add a rung; a failed one ends the export, and nothing is published."""
        self.rungs.append(rung)
        if rung.passed is False:
            worst = max(rung.outputs.items(), key=lambda kv: float("inf") if kv[1].relative is None else kv[1].relative)
            found = "not finite" if not worst[1].finite else f"relative error {worst[1].relative}"
            raise CheckFailed(
                f"{rung.kind} check failed: {rung.name} against {rung.against}, output {worst[0]!r}: {found}, "
                f"allowed {rung.threshold:g}. Nothing was written"
            )


def export(
    model: str | nn.Module | ExportedProgram,
    out: str | os.PathLike[str],
    *,
    example: Any = None,
    targets: Sequence[str] = ("openvino",),
    compress: str | Sequence[str] | None = None,
    compress_variants: str | Sequence[str] = (),
    precision: str = "fp32",
    image_input: bool = False,
    calibration: Any = None,
    calibration_samples: int = DEFAULT_SAMPLES,
    skip_quant: Sequence[str] = (),
    max_drop: str | float | None = None,
    devices: Sequence[str] = (),
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    weights_only: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model to a bundle: compressed, lowered to every target, verified, written whole or not at all.

    Args:
        model: what MODEL may be on the command line, an `nn.Module`, or an `ExportedProgram`.
        out: the bundle's folder. A bundle that is there is replaced; anything else is left alone, and an error.
        example: example inputs of an `nn.Module`: a tuple of positional or a dict of keyword arguments.
        targets: names of targets. compress: one or more specs, such as `"tome:keep=0.5"`.
        compress_variants: other compressions, each as `"[NAME=]SPEC [+ SPEC]"` or `"none"`, which become further functions of the
            same artifacts and share their weights; see `edgewise.exporter.variants`.
        precision: one that every target has: `fp32`, `fp16` (weights stored in half precision), `w8a8`, `w8a16`, `w4a16`; or by
            the roles of components, `"w8a16,vision_encoder=w8a8"`.
        image_input: the artifacts take an image, pixels from 0 to 255, and do to it what the processor does after it resized.
        calibration: data for precisions that need some, see `edgewise.calibration.open_source`. Default: a demo's own.
        calibration_samples: the most samples that statistics are gathered of.
        skip_quant: patterns (`*.fc2`) of the names of layers that stay in floating point.
        max_drop: accuracy control, `"1%"` or 0.01: layers stay in floating point, the most sensitive first, until the accuracy on
            labelled samples of `calibration` that the statistics did not see is at most so many points below that of the
            artifact before it was quantised.
        devices: what to build for ahead of time, as far as the targets can: `sm86` for `tensorrt`.
        input_shapes, batch, trust_remote_code, weights_only: see `load_source`.
        prompt_tokens, new_tokens: of a generative model: the longest prompt besides the image, and the most tokens generated.
        seed: of example inputs, where no real ones are at hand. cache: reuse lowered artifacts.

    Raises InputError (bad input), Refused (no provably right graph) or CheckFailed (a rung above its threshold).
    """
    specs = (compress,) if isinstance(compress, str) else tuple(compress or ())
    for spec in specs:
        parse_spec(spec)  # what is misspelt is said before the model is loaded
    others = (compress_variants,) if isinstance(compress_variants, str) else tuple(compress_variants)
    parse_variants(specs, others)
    precisions = parse_precisions(precision)
    chosen = _targets(targets, precisions.all, devices)
    if others:
        chosen = [target.for_functions() for target in chosen]
    if image_input:
        chosen = [target.for_images({}) for target in chosen]
    if batch < 1:
        raise InputError(f"batch={batch}: the first dimension of the inputs is 1 or more")
    for name, count in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if count is not None and count < 1:
            raise InputError(f"{name}={count}: give 1 or more")
    drop = None if max_drop is None else parse_drop(max_drop)
    wish = check_wish(Wish(calibration, calibration_samples, tuple(skip_quant), drop), precisions.all, chosen, model)
    if isinstance(model, str) and example is not None:
        raise InputError("example inputs go with a module; for a named model give input_shapes")
    if progress is not None:
        progress(0, 5 + len(chosen), "load the model")
    if isinstance(model, str):
        source = load_source(
            model,
            input_shapes=input_shapes,
            batch=batch,
            seed=seed,
            trust_remote_code=trust_remote_code,
            weights_only=weights_only,
        )
    else:
        source = _given(model, example)
    recipe = Recipe(
        model=source.name,
        compress=specs,
        compress_variants=others,
        image_input=image_input,
        targets=tuple(t.name for t in chosen),
        precision=precision,
        devices=tuple(devices),
        input_shapes={k: tuple(v) for k, v in (input_shapes or {}).items()},
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        calibration=str(wish.data) if isinstance(wish.data, (str, os.PathLike)) else None,
        calibration_samples=wish.samples,
        skip_quant=wish.skip,
        max_drop=drop,
    )
    job = Job(recipe, source, chosen, progress, Cache() if cache else None, wish=wish, done=1)
    # The place is checked by the writer before any work is done.
    return write_bundle(out, lambda folder: _whole(job, folder))


def _targets(names: Sequence[str], precisions: Sequence[str], devices: Sequence[str]) -> list[Target]:
    if not names:
        raise InputError(f"no target: give one or more of {', '.join(target_registry.names())}")
    found = [target_registry.get(name) for name in dict.fromkeys(names)]
    if devices and not any(target.ahead_of_time for target in found):
        found[0].for_devices(devices)  # says what it cannot do
    chosen = []
    for target in found:
        if devices and target.ahead_of_time:
            target = target.for_devices(devices)
        for precision in precisions:
            target.check_precision(precision)
            target.check(precision=precision)
        chosen.append(target)
    return chosen


def _given(model: nn.Module | ExportedProgram, example: Any) -> Source:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    args, kwargs = (
        ((), dict(example))
        if isinstance(example, Mapping)
        else ((), {})
        if example is None
        else (tuple(example) if isinstance(example, (tuple, list)) else (example,), {})
    )
    if isinstance(model, ExportedProgram):
        return Source(name, type(model).__name__, exported=model, args=args, kwargs=kwargs)
    if example is None:
        raise InputError("example inputs are needed to capture a module: example=(x,) or example={'name': x}")
    return Source(name, type(model).__name__, module=model, args=args, kwargs=kwargs)


def _whole(job: Job, folder: Path) -> Manifest:
    """Build all of a bundle but its manifest file."""
    from edgewise.exporter.pipeline import export as vision_language
    from edgewise.exporter.pipeline import speech_export as speech

    for kind in (vision_language, speech):
        if kind.is_pipeline(job.source):
            if job.recipe.compress_variants:
                raise InputError(
                    f"{job.source.class_name} becomes several components, whose caches are of one compression: leave the variants "
                    "out, and export a bundle for each"
                )
            if job.recipe.image_input:
                name = job.source.class_name
                raise InputError(f"{name} becomes several components, whose inputs are arrays: leave --image-input out")
            return kind.build_pipeline(job, folder)
    if job.recipe.prompt_tokens or job.recipe.new_tokens:
        raise InputError(
            f"{job.source.class_name} generates no text: --prompt-tokens and --new-tokens have no meaning for it"
        )
    if job.recipe.compress_variants:
        from edgewise.exporter.variants import build_variants

        return build_variants(job, folder)
    manifest, program = build_component(job, folder)
    finish(manifest, [program], job, folder)
    return manifest


def finish(manifest: Manifest, programs: Sequence[Program], job: Job, folder: Path) -> None:
    """Write what a bundle has once, however many components it holds: recipe and report."""
    (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), "utf-8")
    write_report(manifest, [program.sites for program in programs], folder / "report.html")


def build_component(job: Job, folder: Path) -> tuple[Manifest, Program]:
    """Capture, compress, lower and verify the one graph of a job; gives the manifest of a bundle that holds nothing else, and the
    program that its artifacts were made of."""
    return build_program(job, captured(job), folder)


def captured(job: Job) -> Program:
    """The graph of a job, with all its tokens."""
    source = job.source
    job.step("capture")
    if source.exported is not None:
        given = (source.args, source.kwargs) if source.args or source.kwargs else (None, None)
        program = from_exported(source.exported, *given)
    else:
        assert source.module is not None
        program = capture(source.module, source.args, source.kwargs)
    if source.role is not None:
        program = program.with_role(source.role, source.tokens, order=source.order)
    if job.recipe.image_input:
        program, job.pixels = take_pixels(program, source, job.recipe.seed)
        job.chosen = [target.for_images({job.pixels.name: job.pixels.colour}) for target in job.chosen]
    return program


def build_program(job: Job, program: Program, folder: Path) -> tuple[Manifest, Program]:
    """As `build_component`, of a program that is captured."""
    role, precisions = program.role.partition(".")[0], parse_precisions(job.recipe.precision)
    precisions.check([role])
    job.precision = precisions.of(role)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as place:
        return _make(job, program, folder, Path(place))


def _make(job: Job, program: Program, folder: Path, place: Path) -> tuple[Manifest, Program]:
    """Compress, lower, verify and quantise; `place` holds what is lowered to be quantised."""
    steps = {target.name: Legalise(target.realisations) for target in job.chosen}
    # Digests and runs take long and need little Python: they are done aside, while graphs are rewritten here.
    with ThreadPoolExecutor(1, "edgewise") as aside:
        digest = aside.submit(job.weights.of_program, program.base)
        job.step("compress")
        compressed = insert(program, *job.recipe.compress)
        data = gather(job.wish, job.source, compressed)
        samples = _samples(job, compressed)
        running = aside.submit(_run_programs, compressed, steps, samples)
        stored = rounded(compressed.exported) if job.halves else compressed.exported
        weights_digest = digest.result()
        lowered = _lower_all(job, compressed, stored, steps, folder, place)
        ran = running.result()
    for attempt in range(ATTEMPTS):
        job.step("verify" if not attempt else "verify with another input: a decision was a near tie")
        if attempt:
            samples = _samples(job, compressed, attempt)
            ran = _run_programs(compressed, steps, samples)
        try:
            wanted = _verify(job, compressed, stored, lowered, samples, ran, last=attempt == ATTEMPTS - 1)
            break
        except NearTie:
            job.rungs.clear()
            job.done -= 1
    artifacts = [_quantised(job, low, data, samples, folder) for low in lowered]
    job.step("write the bundle")
    return _manifest(job, compressed, weights_digest, samples, ran.base, wanted, artifacts, data, folder), compressed


def _quantised(job: Job, low: Lowered, data: Data | None, samples: list[dict[str, Tensor]], folder: Path) -> Artifact:
    """The artifact of a lowered one: itself, or what is quantised of it, judged against it."""
    precision = job.precision
    if low.artifact.precision == precision:
        return low.artifact
    place = folder / low.target.name
    place.mkdir(parents=True, exist_ok=True)
    role = low.artifact.role
    files, record, notes = quantise(low.target, low.files, precision, job.wish, data, place, role, job.tell, job.leaders)
    job.notes += notes
    artifact = low.artifact.model_copy(
        update={
            "precision": precision,
            "files": tuple(path.relative_to(folder).as_posix() for path in files),
            "quantisation": record,
            "versions": low.target.versions(precision=precision),
            "warnings": tuple(low.target.check(precision=precision)),
        }
    )
    before, after = (_outputs(low.target, files, samples) for files in (low.files, files))
    job.rungs.append(judge(artifact.label, low.artifact.label, "quantisation", before, after))
    if not all(errors.finite for errors in job.rungs[-1].outputs.values()):
        raise CheckFailed(f"{artifact.label}: the quantised artifact gives values that are not finite. Nothing was written")
    return artifact


def _outputs(target: Target, files: Sequence[Path], samples: list[dict[str, Tensor]]) -> Outputs:
    """What an artifact gives on the samples, stacked."""
    with target.rehearse(files) as session:
        results = [session.run_anew({k: as_array(v) for k, v in sample.items()}) for sample in samples]
    return {k: np.stack([r[k] for r in results]) for k in results[0]}


@dataclass(frozen=True)
class Ran:
    """What came out on the samples: of the uncompressed (`base`) and of the compressed program, with what each of its selections
    kept, and its runner, which knows how near to another choice those were and how well the realisations did."""

    base: Outputs
    compressed: Outputs
    decisions: dict[str, np.ndarray]
    runner: Runner


def _run_programs(program: Program, steps: Mapping[str, Legalise], samples: list[dict[str, Tensor]]) -> Ran:
    base = _run_all(program, program.base, samples)
    realised = {name: step.realised for name, step in steps.items()}
    runner = Runner(program.exported, program.output_names, realised=realised)
    return Ran(base, *_stack(runner, samples), runner)


def _verify(
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
        found = _outputs(low.target, low.files, samples)
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


def judge(name: str, against: str, kind: ladder.Kind, reference: Outputs, value: Outputs, **known: Any) -> Rung:
    """A rung of outputs stacked over samples. Samples count as rows of the batch, so that class scores stay a matrix."""
    return ladder.judge(name, against, kind, batched(reference), batched(value), **known)


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


@dataclass(frozen=True)
class Lowered:
    """An artifact, its target and its files, and the pass that made its program legal."""

    artifact: Artifact
    target: Target
    files: list[Path]
    legalise: Legalise


def _lower_all(
    job: Job, program: Program, stored: ExportedProgram, steps: Mapping[str, Legalise], folder: Path, place: Path
) -> list[Lowered]:
    """Lower to every target: into `folder`, or into `place` what is to be quantised."""
    lowered: list[Lowered] = []
    legalised: dict[str, ExportedProgram] = {}
    for target in job.chosen:
        job.step(f"lower to {target.name}")
        key = repr(sorted(target.realisations.items()))
        if key not in legalised:
            legalised[key] = steps[target.name](stored).program
        precision = job.lowered_precision(target)
        shipped = precision == job.precision
        root = folder if shipped else place
        # What is built for devices is built of the quantised artifact.
        maker = target if shipped else target.for_no_device()
        files = _lower(job, maker, legalised[key], program, root / target.name, precision)
        artifact = Artifact(
            target=target.name,
            role=program.role,
            precision=precision,
            files=tuple(path.relative_to(root).as_posix() for path in files),
            versions=target.versions(),
            warnings=tuple(target.check()),
        )
        lowered.append(Lowered(artifact, target, files, steps[target.name]))
    return lowered


def _lower(
    job: Job, target: Target, legal: ExportedProgram, program: Program, folder: Path, precision: str
) -> list[Path]:
    names = list(program.inputs)

    def make(place: Path) -> list[Path]:
        place.mkdir(parents=True, exist_ok=True)
        with quiet():
            return target.lower(
                legal,
                place,
                program.role,
                precision=precision,
                input_names=names,
                output_names=list(program.output_names),
            )

    if job.cache is None:
        return make(folder)
    key = artifact_key(
        legal,
        job.weights,
        {
            "edgewise": __version__,
            "code": code_digest(),
            "target": target.name,
            "versions": target.versions(),
            "precision": precision,
            "devices": target.devices,
            "functions": target.functions,
            "images": target.images,
            "inputs": names,
            "outputs": program.output_names,
            "stem": program.role,
        },
    )
    return job.cache.fetch(key, folder, make)[0]


def _samples(job: Job, program: Program, attempt: int = 0) -> list[dict[str, Tensor]]:
    """Inputs to verify with: the program's examples, and others that the source has at hand; for a later attempt, others.

    A program that is told how many tokens are real is verified with padding, too."""
    captured = {k: v for k, v in program.inputs.items() if k not in program.added}
    image = job.pixels.name if job.pixels is not None else None
    generator = torch.Generator().manual_seed(job.recipe.seed + attempt)
    real, size = job.source.samples, next(iter(captured.values())).shape[0]
    if real and set(real) == set(captured):
        count = len(next(iter(real.values())))
        # Spread over the split, which may be sorted by label. The first is the example already.
        starts = list(dict.fromkeys((attempt + i * (count - size) // 3) % (count - size + 1) for i in range(4)))
        samples = [{k: torch.from_numpy(real[k][s : s + size].copy()) for k in real} for s in starts]
        samples = samples if attempt else [captured, *samples[1:]]
    else:
        samples = [{k: _noise(v, generator) for k, v in captured.items()} if attempt else captured]
        samples = [{k: v.round().clamp(0, 255) if k == image else v for k, v in one.items()} for one in samples]
        if any(not program.inputs[k].is_floating_point() for k in program.added):
            samples.append(samples[0])
    added = [{k: program.inputs[k] for k in program.added}]
    for _ in samples[1:]:
        added.append(
            {k: _noise(v, generator) if v.is_floating_point() else _fewer(v, generator) for k, v in added[0].items()}
        )
    return [{**sample, **more} for sample, more in zip(samples, added, strict=True)]


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """Another value of the same spread; what is no floating-point number may be an index, and stays."""
    if not value.is_floating_point() or value.numel() < 2:
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    return (noise * value.float().std() + value.float().mean()).to(value.dtype)


def _fewer(count: Tensor, generator: torch.Generator) -> Tensor:
    """From half of a count up to all of it."""
    return (count * (0.5 + 0.5 * torch.rand(count.shape, generator=generator))).to(count.dtype)


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


def _meaning(name: str, program: Program, pixels: Pixels | None) -> str:
    if pixels is not None and name == pixels.name:
        return f"an image, {pixels.colour}, 0 to 255"
    return _MEANINGS.get(name.rstrip("_0123456789"), "") if name in program.added else ""


def _manifest(
    job: Job,
    program: Program,
    weights_digest: str,
    samples: list[dict[str, Tensor]],
    base: Outputs,
    wanted: Outputs,
    artifacts: list[Artifact],
    data: Data | None,
    folder: Path,
) -> Manifest:
    golden = {f"input.{k}": np.stack([as_array(s[k]) for s in samples]) for k in program.inputs}
    golden |= {f"output.{k}": v for k, v in wanted.items()}
    golden |= {f"reference.{k}": v for k, v in base.items()}
    path = folder / "golden" / f"{program.role}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save_tensors(dict(sorted(golden.items()))))
    return Manifest(
        edgewise_version=__version__,
        model=ModelInfo(
            source=job.source.name,
            class_name=job.source.class_name,
            parameters=sum(t.numel() for t in program.base.state_dict.values() if isinstance(t, nn.Parameter)),
            weights_digest=weights_digest,
        ),
        compress=job.recipe.compress,
        components=(
            Component(
                role=program.role,
                inputs=tuple(
                    TensorInfo(
                        name=k,
                        shape=tuple(v.shape),
                        dtype=str(v.dtype).removeprefix("torch."),
                        meaning=_meaning(k, program, job.pixels),
                    )
                    for k, v in program.inputs.items()
                ),
                outputs=tuple(TensorInfo(name=k, shape=v.shape[1:], dtype=str(v.dtype)) for k, v in wanted.items()),
                sites=tuple(
                    ManifestSite(
                        name=s.name, method="+".join(s.methods), tokens_in=s.tokens_in, tokens_out=s.tokens_out
                    )
                    for s in program.sites
                    if s.methods
                ),
                flops_before=total_flops(program.base),
                flops_after=total_flops(program.exported),
            ),
        ),
        preprocessing=job.source.preprocessing,
        targets=tuple(artifacts),
        verification=tuple(job.rungs),
        calibration=None
        if data is None
        else Calibration(data=data.samples.source.name, samples=data.samples.count, digest=data.samples.digest),
        notes=(
            *job.source.notes,
            *program.notes,
            *(data.notes if data is not None else ()),
            *job.notes,
            *(step.fitted.note(weights_digest) for step in program.steps if step.fitted is not None),
        ),
        golden={program.role: f"golden/{program.role}.safetensors"},
        seed=job.recipe.seed,
    )
