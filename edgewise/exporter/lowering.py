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
from edgewise.version import __version__


@dataclass(frozen=True)
class Lowered:
    """An artifact, its target and its files, and the pass that made its program legal."""

    artifact: Artifact
    target: Target
    files: list[Path]
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
        files = _lower(job, maker, legalised[key], program, root / target.name, precision)
        artifact = Artifact(
            target=target.name,
            role=program.role,
            precision=precision,
            files=tuple(path.relative_to(root).as_posix() for path in files),
            versions=target.versions(),
            warnings=tuple(target.check()),
            states=tuple(cache.input for cache in target.caches),
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
            "caches": target.caches,
            "inputs": names,
            "outputs": program.output_names,
            "stem": program.role,
        },
    )
    return job.cache.fetch(key, folder, make)[0]
