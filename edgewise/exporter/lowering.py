"""Lower a compressed program to every target of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.export import ExportedProgram

from edgewise.bundle.manifest import Artifact
from edgewise.exporter.capture import quiet
from edgewise.exporter.digest import artifact_key
from edgewise.exporter.identity import code_digest
from edgewise.exporter.job import Job
from edgewise.passes.legalise import Legalise
from edgewise.passes.program import Program
from edgewise.targets import Target
from edgewise.targets.base import Lowering
from edgewise.version import __version__


@dataclass(frozen=True)
class Lowered:
    """An artifact, its target and its files, what it was lowered of, and the pass that made that legal."""

    artifact: Artifact
    target: Target
    files: list[Path]
    made_of: Lowering
    legalise: Legalise


def lower_all(
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
        made_of = Lowering(legalised[key], list(program.inputs), list(program.output_names))
        files = _lower(job, maker, made_of, program.role, root / target.name, precision)
        artifact = Artifact(
            target=target.name,
            role=program.role,
            precision=precision,
            files=tuple(path.relative_to(root).as_posix() for path in files),
            versions=target.versions(),
            warnings=tuple(target.check()),
            states=tuple(cache.input for cache in target.caches),
        )
        lowered.append(Lowered(artifact, target, files, made_of, steps[target.name]))
    return lowered


def _lower(
    job: Job, target: Target, made_of: Lowering, stem: str, folder: Path, precision: str
) -> list[Path]:
    def make(place: Path) -> list[Path]:
        place.mkdir(parents=True, exist_ok=True)
        with quiet():
            return target.lower(
                made_of.exported,
                place,
                stem,
                precision=precision,
                input_names=made_of.input_names,
                output_names=made_of.output_names,
            )

    if job.cache is None:
        return make(folder)
    key = artifact_key(
        made_of.exported,
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
            "caches": target.caches,
            "inputs": made_of.input_names,
            "outputs": made_of.output_names,
            "stem": stem,
        },
    )
    return job.cache.fetch(key, folder, make)[0]
