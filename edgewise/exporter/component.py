"""One graph of a bundle: captured, compressed, lowered, verified, quantised, and described."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from edgewise.bundle.manifest import Artifact, Component, Manifest, ModelInfo, Quantisation, TensorInfo
from edgewise.bundle.manifest import Site as ManifestSite
from edgewise.calibration.pixels import Pixels
from edgewise.errors import CheckFailed
from edgewise.exporter.capture import capture, from_exported
from edgewise.exporter.climb import NearTie, outputs_of, run_programs, verify
from edgewise.exporter.data import class_names
from edgewise.exporter.examples import take_samples
from edgewise.exporter.half import rounded
from edgewise.exporter.image_input import take_pixels
from edgewise.exporter.job import Job, judge
from edgewise.exporter.lowering import Lowered, lower_all
from edgewise.exporter.precisions import parse_precisions
from edgewise.exporter.quantise import Data, gather, quantise
from edgewise.exporter.report import write_report
from edgewise.exporter.run import Outputs, as_array
from edgewise.passes.flops import total_flops
from edgewise.passes.legalise import Legalise
from edgewise.passes.program import Program
from edgewise.passes.program import compress as insert
from edgewise.verify.ladder import Rung
from edgewise.version import __version__

ATTEMPTS = 6
"""Where two scores are nearly the same, runtimes may keep other tokens than torch, and neither is wrong. Such an input verifies
little, and up to this many are tried."""

_MEANINGS = {
    "length": "how many leading tokens of each sample are real, class token included; the rest is padding",
    "text": "text embedding, one row for each text token",
}
"""What the inputs are for that compression adds."""


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
        program = program.with_role(source.role, source.tokens, source.grid, order=source.order)
    if job.recipe.image_input:
        program, job.pixels = take_pixels(program, source, job.recipe.seed)
        job.chosen = [target.for_images({job.pixels.name: job.pixels.colour}) for target in job.chosen]
    return program


def build_program(job: Job, program: Program, folder: Path) -> tuple[Manifest, Program]:
    """As `build_component`, of a program that is captured."""
    role, precisions = program.role.partition(".")[0], parse_precisions(job.recipe.precision)
    precisions.check([role])
    job.precision = precisions.of(role)
    if job.later is not None:
        return _make(job, program, folder, job.later.place)
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
        data = gather(job.wish, job.source, compressed, job.check)
        samples = take_samples(job, compressed)
        running = aside.submit(run_programs, compressed, steps, samples)
        stored = rounded(compressed.exported) if job.halves else compressed.exported
        weights_digest = digest.result()
        lowered = lower_all(job, compressed, stored, steps, folder, place)
        ran = running.result()
    for attempt in range(ATTEMPTS):
        job.step("verify" if not attempt else "verify with another input: a decision was a near tie")
        if attempt:
            samples = take_samples(job, compressed, attempt)
            ran = run_programs(compressed, steps, samples)
        try:
            wanted = verify(job, compressed, stored, lowered, samples, ran, last=attempt == ATTEMPTS - 1)
            break
        except NearTie:
            job.rungs.clear()
            job.done -= 1
    if job.later is None:
        artifacts = [_quantised(job, low, data, samples, folder) for low in lowered]
    else:
        artifacts = [low.artifact for low in lowered]
        job.later.lowered, job.later.samples, job.later.data = lowered, samples, data
    job.step("write the bundle")
    return _manifest(job, compressed, weights_digest, samples, ran.base, wanted, artifacts, data, folder), compressed


def _quantised(job: Job, low: Lowered, data: Data | None, samples: list[dict[str, Tensor]], folder: Path) -> Artifact:
    """The artifact of a lowered one: itself, or what is quantised of it, judged against it."""
    precision = job.precision
    if low.artifact.precision == precision:
        return low.artifact
    place = folder / low.target.name
    place.mkdir(parents=True, exist_ok=True)
    role, given = low.artifact.role, (low.files, low.made_of)
    files, record, notes = quantise(low.target, *given, precision, job.wish, data, place, role, job.tell, job.leaders)
    job.notes += notes
    artifact, rung = described(low, files, precision, record, samples, folder)
    job.rungs.append(rung)
    return artifact


def described(
    low: Lowered, files: Sequence[Path], precision: str, record: Quantisation, samples: list[dict[str, Tensor]], folder: Path
) -> tuple[Artifact, Rung]:
    """The artifact that was quantised of a lowered one, and the rung that compares them. Raises CheckFailed for values that are not
    finite."""
    artifact = low.artifact.model_copy(
        update={
            "precision": precision,
            "files": tuple(path.relative_to(folder).as_posix() for path in files),
            "quantisation": record,
            "versions": low.target.versions(precision=precision),
            "warnings": tuple(low.target.check(precision=precision)),
        }
    )
    before, after = (outputs_of(low.target, files, samples) for files in (low.files, files))
    rung = judge(artifact.label, low.artifact.label, "quantisation", before, after)
    if not all(errors.finite for errors in rung.outputs.values()):
        raise CheckFailed(f"{artifact.label}: the quantised artifact gives values that are not finite. Nothing was written")
    return artifact, rung


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
        classes=class_names(job.source),
        targets=tuple(artifacts),
        verification=tuple(job.rungs),
        calibration=None if data is None else data.described,
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
