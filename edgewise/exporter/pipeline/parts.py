"""What the export of every pipeline does: each component as an export of its own, then one manifest of all."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.bundle.manifest import FileInfo, Manifest
from edgewise.bundle.pipeline import CacheLayer, Pipeline
from edgewise.bundle.reader import Bundle, digest
from edgewise.errors import InputError
from edgewise.exporter.capture import evaluating, quiet
from edgewise.exporter.component import build_component, finish
from edgewise.exporter.job import Job, Later
from edgewise.exporter.pipeline.asking import TASKS
from edgewise.exporter.pipeline.quantise import quantise_together
from edgewise.exporter.precisions import parse_precisions
from edgewise.exporter.quantise import Wish, needs_data
from edgewise.exporter.sources import Source
from edgewise.passes.cleanup import clean_up
from edgewise.passes.flops import total_flops
from edgewise.passes.program import Program
from edgewise.targets.base import Cache
from edgewise.verify.ladder import Rung


@dataclass
class Build:
    """One export of a pipeline on its way: `parts` and `programs` are of the components that are built, in the order of `order`."""

    job: Job
    folder: Path
    parts: list[Manifest] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    later: dict[str, Later] = field(default_factory=dict)

    def build(self) -> Manifest:
        """All of a bundle but its manifest file."""
        with tempfile.TemporaryDirectory(prefix="edgewise-") as place:
            self.place = Path(place)
            return self.run()

    def run(self) -> Manifest:
        """`build`, where what is quantised together is lowered to `place`."""
        raise NotImplementedError

    @property
    def order(self) -> tuple[str, ...]:
        """The roles of the components. The first one takes the media, and so all that calibration data has."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        """Raise `InputError` for precisions, data and layers that do not fit the components: before the model runs."""
        precisions, wish, chosen = parse_precisions(self.job.recipe.precision), self.job.wish, self.job.chosen
        precisions.check(self.order)
        if self.together and self.job.recipe.images > 1:
            raise InputError(
                "a decoder is calibrated with one image at a time: leave --images out, or leave --max-drop out and statistics to "
                f"the encoder (--precision w8a16,{self.order[0]}=w8a8)"
            )
        for target in chosen if self.together else ():
            if not target.has_ranges:
                raise InputError(
                    f"target {target.name} gathers statistics of {self.order[0]} alone: leave --max-drop out, and give the other "
                    f"components a precision without statistics (--precision fp16,{self.order[0]}=w8a8)"
                )
        for pattern in wish.skip:
            role, slash, _ = pattern.partition("/")
            if not slash or role not in self.order:
                raise InputError(
                    f"layers to skip {pattern!r}: this model has several components, so write ROLE/PATTERN with one of "
                    f"{', '.join(self.order)}"
                )
            if not any(precisions.of(role) in target.quantises for target in chosen):
                raise InputError(f"layers to skip {pattern!r}: {role} is not quantised, but {precisions.of(role)}")

    @property
    def kind(self) -> str:
        """The kind of pipeline (see `Pipeline`)."""
        raise NotImplementedError

    @cached_property
    def together(self) -> bool:
        """Whether the components are quantised together, once all are lowered: statistics are of the decoder too, or accuracy is
        controlled."""
        precisions = parse_precisions(self.job.recipe.precision)
        data = any(needs_data(precisions.of(role), self.job.chosen) for role in self.order[1:])
        return data or self.job.wish.max_drop is not None

    def component(self, role: str, source: Source, specs: Sequence[str] = (), room: int = 0) -> Program:
        """Export one component, as if it were all of a bundle. `room`: slots for new tokens, the last ones of its caches."""
        whole = self.job
        source.role, source.name, source.class_name = role, whole.source.name, whole.source.class_name
        source.preprocessing = whole.source.preprocessing
        precision = parse_precisions(whole.recipe.precision).of(role)
        recipe = whole.recipe.model_copy(update={"compress": tuple(specs), "precision": precision})
        caches = _caches(source, room)
        chosen = [target.for_caches(caches) for target in whole.chosen] if caches else whole.chosen
        part = Job(recipe, source, chosen, None, whole.cache, whole.weights, wish=self._wish(role, precision))
        turn = self.order.index(role)
        if self.together:
            self.later[role] = part.later = Later(self.place)
            part.check = TASKS[self.kind].check
        if whole.progress is not None:
            tell, steps = whole.progress, len(self.order)
            part.progress = lambda done, total, text: tell(turn * total + done, steps * total, f"{role}: {text}")
        manifest, program = build_component(part, self.folder)
        self.parts.append(manifest)
        self.programs.append(program)
        return program

    def _wish(self, role: str, precision: str) -> Wish:
        """What of the wish is for one component."""
        wish = self.job.wish
        skip = tuple(pattern.removeprefix(f"{role}/") for pattern in wish.skip if pattern.startswith(f"{role}/"))
        first = self.together and role == self.order[0]
        wanted = first or (not self.together and needs_data(precision, self.job.chosen))
        return Wish(wish.data if wanted else None, wish.samples, skip, wish.max_drop if first else None)

    def _quantised(self, pipeline: Pipeline) -> tuple[str, ...]:
        """Quantise all components together, and note it in their parts; gives what was odd."""
        files = {} if pipeline.tokenizer is None else {pipeline.tokenizer: self.folder / pipeline.tokenizer}
        manifest = self.parts[0].model_copy(
            update={
                "components": tuple(c for part in self.parts for c in part.components),
                "pipeline": pipeline,
                "preprocessing": self.job.source.preprocessing,
                "files": {name: FileInfo(sha256=digest(path), bytes=path.stat().st_size) for name, path in files.items()},
            }
        )
        precisions, steps = parse_precisions(self.job.recipe.precision), len(self.order) * (5 + len(self.job.chosen))
        by_role = {role: precisions.of(role) for role in self.order}
        wishes = {role: self._wish(role, precision) for role, precision in by_role.items()}
        progress = self.job.progress

        def tell(text: str) -> None:
            if progress is not None:
                progress(steps - 1, steps, text)

        made = quantise_together(Bundle(self.folder, manifest), self.later, by_role, wishes, TASKS[self.kind], tell)
        for i, (role, part) in enumerate(zip(self.order, self.parts, strict=True)):
            rungs = (*part.verification, *made.rungs.get(role, ()))
            self.parts[i] = part.model_copy(update={"targets": tuple(made.artifacts[role]), "verification": rungs})
        return made.notes

    def joined(self, seam: Rung, pipeline: Pipeline, model: nn.Module) -> Manifest:
        """One manifest of all components, with `seam`, the rung that compares them with the whole model; writes what a bundle has
        once."""
        odd = self._quantised(pipeline) if self.together else ()
        first = self.parts[0]
        digests = "".join(part.model.weights_digest for part in self.parts)
        rungs = [seam]
        for role, part in zip(self.order, self.parts, strict=True):
            artifacts = {a.label for a in part.targets}
            for one in part.verification:
                own = one.name.split(",")[0] in artifacts
                rungs.append(one if own else one.model_copy(update={"name": f"{role}: {one.name}"}))
        manifest = first.model_copy(
            update={
                "model": first.model.model_copy(
                    update={
                        "parameters": sum(p.numel() for p in model.parameters()),
                        "weights_digest": hashlib.sha256(digests.encode()).hexdigest(),
                    }
                ),
                "compress": self.job.recipe.compress,
                "components": tuple(c for part in self.parts for c in part.components),
                "pipeline": pipeline,
                "calibration": next((part.calibration for part in self.parts if part.calibration is not None), None),
                "preprocessing": self.job.source.preprocessing,
                "targets": tuple(a for part in self.parts for a in part.targets),
                "verification": tuple(rungs),
                "notes": tuple(
                    dict.fromkeys((*self.job.source.notes, *(n for part in self.parts for n in part.notes), *odd))
                ),
                "golden": {role: path for part in self.parts for role, path in part.golden.items()},
            }
        )
        finish(manifest, self.programs, self.job, self.folder)
        return manifest


def run(program: Program, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs of a program that is called with its module's arguments."""
    with torch.no_grad(), quiet():
        made = program.module()(*inputs.values()) if len(inputs) == 1 else program.module()(**inputs)
    return dict(made)


def source_of(module: nn.Module, samples: Sequence[Mapping[str, Any]]) -> Source:
    """A component with its example, which is the first sample, and all samples under the names that capture gives them."""
    flat: dict[str, list[Any]] = {}
    for sample in samples:
        for name, value in sample.items():
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                flat.setdefault(f"{name}_{i}" if isinstance(value, list) else name, []).append(one.numpy())
    return Source(
        "", "", module=module, kwargs=dict(samples[0]), samples={k: np.concatenate(v) for k, v in flat.items()}
    )


def flops_of(module: nn.Module, inputs: Mapping[str, Any]) -> int:
    """FLOPs of one run of a module as it is, uncompressed."""
    with evaluating(module), quiet():
        return total_flops(clean_up(torch.export.export(module, (), dict(inputs), strict=False)))


def _caches(source: Source, room: int) -> list[Cache]:
    """The caches that a component takes and adds a token to, by the names that pipelines have for them."""
    return [
        Cache(name, name.removeprefix("past_"), "step", array.shape[2] - room)
        for name, array in (source.samples or {}).items()
        if room and name.startswith("past_")
    ]


def cache_layers(decode: Manifest, bucket: int, room: int) -> tuple[CacheLayer, ...]:
    """The caches, as the decode graph takes them."""
    shapes = {info.name: info for info in decode.components[0].inputs}
    layers: list[CacheLayer] = []
    while f"past_key_{len(layers)}" in shapes:
        pair = [shapes[f"past_{kind}_{len(layers)}"] for kind in ("key", "value")]
        size = sum(
            torch.Size(info.shape).numel() * torch.empty(0, dtype=getattr(torch, info.dtype)).itemsize for info in pair
        )
        slots = pair[0].shape[2]
        layers.append(CacheLayer(media=slots - room - bucket, tokens=slots - room, slots=slots, bytes=size))
    return tuple(layers)
