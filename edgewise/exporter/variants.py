"""Several compressions of one model as the functions of one artifact, which holds equal weights once.

Each is exported and verified as if it were all of a bundle. Then the artifacts are joined, and every function must give bit for
bit what its artifact gave alone.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_tensors

from edgewise.bundle.manifest import Artifact, Component, Manifest
from edgewise.bundle.reader import Golden
from edgewise.errors import CheckFailed, InputError
from edgewise.exporter.component import build_program, captured, finish
from edgewise.exporter.digest import graph_text
from edgewise.exporter.job import Job, Progress
from edgewise.exporter.variant_specs import MAIN, parse_variants
from edgewise.passes.program import Program
from edgewise.targets import Session, Target
from edgewise.verify.bundle import batched, run_all
from edgewise.verify.ladder import Rung, judge

JOINED = ", as a function"
"""Behind an artifact's label: the rung that compares it with itself before it was joined with others."""


@dataclass(frozen=True)
class _Part:
    """One compression, exported alone: the name of its function, the folder, what a bundle of it would say, and its program."""

    name: str
    folder: Path
    manifest: Manifest
    program: Program

    @property
    def component(self) -> Component:
        return self.manifest.components[0]

    def files(self, target: Target) -> list[Path]:
        return [self.folder / name for name in self.artifact(target).files]

    def artifact(self, target: Target) -> Artifact:
        return next(one for one in self.manifest.targets if one.target == target.name)

    def golden(self) -> Golden:
        path = self.folder / self.manifest.golden[self.component.role]
        return Golden.from_tensors(load_tensors(path.read_bytes()), str(path))


def build_variants(job: Job, folder: Path) -> Manifest:
    """Build all of a bundle but its manifest file: a component for each compression of the recipe."""
    asked = parse_variants(job.recipe.compress, job.recipe.compress_variants)
    program = captured(job)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as place:
        parts = []
        for turn, (name, specs) in enumerate(asked.items()):
            recipe = job.recipe.model_copy(update={"compress": specs})
            own_job = replace(job, recipe=recipe, rungs=[], notes=(), done=1, progress=_turn(job, turn, len(asked), name))
            own = program if name == MAIN else program.with_role(f"{program.role}.{name}")
            parts.append(_Part(name, Path(place) / name, *build_program(own_job, own, Path(place) / name)))
            _check_new(job, parts)
        files = {target.name: target.join({p.name: p.files(target) for p in parts}, folder / target.name, program.role)
                 for target in job.chosen}  # fmt: skip
        rungs = [_compared(target, files[target.name], part) for part in parts for target in job.chosen]
        for part in parts:
            for path in part.manifest.golden.values():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes((part.folder / path).read_bytes())
        manifest = _joined(job, parts, files, rungs, folder)
    finish(manifest, [part.program for part in parts], job, folder)
    return manifest


def _turn(job: Job, turn: int, turns: int, name: str) -> Progress | None:
    tell = job.progress
    return None if tell is None else (lambda done, total, text: tell(turn * total + done, turns * total, f"{name}: {text}"))


def _check_new(job: Job, parts: Sequence[_Part]) -> None:
    """Refuse a compression that comes to the same program as another, as `keep=0.5` and a fitting `r` do."""
    *others, last = parts
    text = hashlib.sha256(graph_text(last.program.exported, job.weights).encode()).digest()
    for other in others:
        if hashlib.sha256(graph_text(other.program.exported, job.weights).encode()).digest() == text:
            raise InputError(f"the variant {last.name!r} comes to the same program as {other.name!r}: leave one of them out")


def _compared(target: Target, files: Sequence[Path], part: _Part) -> Rung:
    """A function of the joined artifact against the artifact that it was, on the golden inputs: every bit must be the same."""
    golden, label = part.golden(), part.artifact(target).label
    alone = _outputs(target.rehearse(part.files(target)), golden)
    joined = _outputs(target.rehearse(files, part.name), golden)
    rung = judge(label + JOINED, label, "lowering", batched(alone), batched(joined), threshold=0.0)
    if not all(np.array_equal(alone[name], joined[name], equal_nan=True) for name in alone):
        raise CheckFailed(f"{label}: as a function of one artifact it gives other numbers than alone. Nothing was written")
    return rung


def _outputs(session: Session, golden: Golden) -> dict[str, np.ndarray]:
    with session:
        return run_all(session, golden)


def _joined(job: Job, parts: Sequence[_Part], files: dict[str, list[Path]], rungs: Sequence[Rung], folder: Path) -> Manifest:
    """One manifest of all components."""
    main = parts[0]
    verification = list(main.manifest.verification)
    for part in parts[1:]:
        labels = {one.label for one in part.manifest.targets}
        for one in part.manifest.verification:
            if one.kind != "capture":  # which is of the same graph
                own = one.name.split(",")[0] in labels
                verification.append(one if own else one.model_copy(update={"name": f"{part.name}: {one.name}"}))
    shared = {name: tuple(path.relative_to(folder).as_posix() for path in paths) for name, paths in files.items()}
    artifacts = [made.model_copy(update={"files": shared[made.target], "function": part.name})
                 for part in parts for made in part.manifest.targets]  # fmt: skip
    own_notes = [note if part is main else f"{part.name}: {note}" for part in parts for note in part.manifest.notes
                 if part is main or note not in main.manifest.notes]  # fmt: skip
    return main.manifest.model_copy(
        update={
            "components": tuple(_component(part, main) for part in parts),
            "targets": tuple(artifacts),
            "verification": (*verification, *rungs),
            "notes": (*own_notes, *_interfaces(parts), *_sizes(job, parts, files)),
            "golden": {role: path for part in parts for role, path in part.manifest.golden.items()},
        }
    )


def _component(part: _Part, main: _Part) -> Component:
    specs = part.manifest.compress
    return part.component.model_copy(update={"compress": specs, "variant_of": None if part is main else main.component.role})


def _interfaces(parts: Sequence[_Part]) -> list[str]:
    """What a caller of one function has to change for another."""
    main, *others = parts
    notes = []
    for part in others:
        for kind, own, theirs in (
            ("takes", part.component.inputs, main.component.inputs),
            ("gives", part.component.outputs, main.component.outputs),
        ):
            known = {one.name: one.shape for one in theirs}
            for one in own:
                if known.get(one.name) != one.shape:
                    other = f"{main.name} {list(known[one.name])}" if one.name in known else f"{main.name} does not"
                    notes.append(f"function {part.name} {kind} {one.name} {list(one.shape)}, and {other}")
            missing = sorted(set(known) - {one.name for one in own})
            if missing:
                notes.append(f"function {part.name} {kind} no {', '.join(missing)}, as {main.name} does")
    return notes


def _sizes(job: Job, parts: Sequence[_Part], files: dict[str, list[Path]]) -> list[str]:
    notes = []
    for target in job.chosen:
        whole = sum(path.stat().st_size for path in files[target.name])
        alone = {part.name: sum(path.stat().st_size for path in part.files(target)) for part in parts}
        told = ", ".join(f"{name} alone has {size:,}" for name, size in alone.items())
        notes.append(f"{target.name}: one artifact of {whole:,} bytes holds {len(parts)} functions, which share weights; {told}")
    return notes
