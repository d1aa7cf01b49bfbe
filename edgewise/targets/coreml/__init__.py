"""The target `coreml`: iPhones, iPads and Macs, through Core ML packages."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgewise.errors import MissingExtra, unknown
from edgewise.targets.base import (
    Cache,
    Feeds,
    Lowering,
    Quantiser,
    Ranges,
    Requirement,
    Session,
    Target,
    Tolerance,
    check_threads,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram


TOLERANCES = {"fp16": (2e-2, 1e-2), "w8a16": (0.1, 0.05), "w8a16-palette": (0.1, 0.05), "w4a16": (0.5, 0.2)}
"""Largest relative error, and how near two scores may be to change places. Half precision rounds at each op to 2^-11: models of a
dozen blocks were seen at 1e-3 to 5e-3. The error of quantised weights is for the most part that of the weights, whose own values
the lowering checks; how much of it a model bears, its accuracy tells (`edgewise verify --data`)."""

_OPS = (
    *("top_tokens", "bipartite_match", "take", "merge", "order_tokens"),
    *("farthest_points", "determinantal"),
)


class CoreML(Target):
    """An `.mlpackage` with an ML Program. With `fp16` weights and arithmetic are half precision, as the Neural Engine
    needs it, and so are inputs and outputs of the package; a session takes and gives what the program does. `w8a16` and
    `w4a16` store the weights of linear layers and convolutions in 8 and 4 bits, `w8a16-palette` as 8-bit indices into a palette of
    each weight; the arithmetic is that of `fp16`. With `w8a8` they compute in 8 bits."""

    name = "coreml"
    description = "Core ML package for iPhones, iPads and Macs"
    suffixes = (".mlpackage",)
    requirements = (
        Requirement("coremltools", minimum="9.0", tested="9.0", extra="coreml", runtime=False),
        Requirement("torch", minimum="2.9.0", tested="2.13.0", extra="export", runtime=False),
        Requirement("protobuf", minimum="4.25.0", tested="7.36.2", extra="coreml"),
    )
    precisions = ("fp32", "fp16", "w8a16", "w8a16-palette", "w8a8", "w4a16")
    quantises = ("w8a8",)
    quantises_from = "fp16"
    quantiser_requirements = (
        Requirement("torchao", minimum="0.18.0", tested="0.18.0", extra="calibration", runtime=False),
    )
    realisations = dict.fromkeys(_OPS, ("sort_free",))
    has_units = True
    oldest: ClassVar[str] = "iOS17"
    """The oldest system that packages are for, where neither their precision nor their states ask for a later one."""
    tokens_last: ClassVar[bool] = False
    """Whether tokens are the last axis (see `layout`)."""

    def tolerance(self, precision: str) -> Tolerance:
        if self.caches and precision == "fp32":
            precision = "fp16"  # in which states are kept
        return Tolerance(*TOLERANCES[precision]) if precision in TOLERANCES else Tolerance()

    def lower(
        self,
        exported: ExportedProgram,
        folder: Path,
        stem: str,
        *,
        precision: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> list[Path]:
        from edgewise.targets.coreml.lower import lower

        self.check()
        self.check_precision(precision)
        return lower(
            exported,
            folder,
            stem,
            precision,
            input_names,
            output_names,
            functions=self.functions,
            oldest=self.oldest,
            images=self.images,
            tokens_last=self.tokens_last,
            caches=self.caches,
        )

    def for_functions(self) -> Target:
        made = copy.copy(self)
        made.functions = True
        return made

    def for_units(self, units: str) -> Target:
        from edgewise.targets.coreml.predict import UNITS, why_not

        if units not in UNITS:
            raise unknown("compute units", units, UNITS)
        reason = why_not()
        if reason is not None:
            raise MissingExtra(f"compute units are those of Core ML, in whose place an interpreter runs packages here: {reason}")
        made = copy.copy(self)
        made.units = units
        return made

    def for_images(self, images: Mapping[str, str]) -> Target:
        made = copy.copy(self)
        made.images = dict(images)
        return made

    def join(self, parts: Mapping[str, Sequence[Path]], folder: Path, stem: str) -> list[Path]:
        from edgewise.targets.coreml.join import join

        return join(parts, Path(folder) / f"{stem}.mlpackage")

    def quantiser(
        self,
        files: Sequence[Path],
        precision: str,
        feeds: Feeds | None,
        ranges: Ranges | None = None,
        made_of: Lowering | None = None,
    ) -> Quantiser:
        from edgewise.targets.coreml.quantise import CoreMLQuantiser

        self.check(precision=precision)
        assert feeds is not None and made_of is not None
        return CoreMLQuantiser(self, made_of, feeds)

    def lint(self, exported: ExportedProgram, precision: str = "fp32") -> list[str]:
        from edgewise.targets.coreml.convert import quiet
        from edgewise.targets.coreml.lint import lint

        self.check()
        with quiet():
            return super().lint(exported) or lint(exported, tokens_last=self.tokens_last, fused=self.oldest != "iOS17")

    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        return self.load_function(files, None, threads=threads)

    def load_function(self, files: Sequence[Path], function: str | None, *, threads: int | None = None) -> Session:
        from edgewise.targets.coreml.predict import PredictSession, why_not

        self.check(runtime_only=True)
        check_threads(threads)
        if why_not() is None:
            return PredictSession(files, function=function, threads=threads, units=self.units)
        return self.rehearse(files, function)

    def rehearse(self, files: Sequence[Path], function: str | None = None) -> Session:
        """By the interpreter on every machine: what is verified where it is made does not depend on the maker's machine."""
        from edgewise.targets.coreml.session import CoreMLSession

        self.check(runtime_only=True)
        return CoreMLSession(files, function=function)

    def ops(self, files: Sequence[Path]) -> dict[str, int] | None:
        from edgewise.targets.coreml.ops import ops

        return ops(files[0])



class CoreMLTopK(CoreML):
    """The same with topk and gather in the place of comparisons and products: less arithmetic, for CPUs and GPUs. The Neural
    Engine does not take these ops."""

    name = "coreml-topk"
    description = "Core ML package with topk and gather, for the CPU and GPU of Apple devices"
    realisations = dict.fromkeys(_OPS, ("topk", "sort_free"))


class CoreMLLayout(CoreML):
    """The same with tokens laid out as Apple publishes it for the Neural Engine: see `edgewise.targets.coreml.layout`."""

    name = "coreml-ane"
    description = "Core ML package in Apple's layout for the Neural Engine, (batch, channels, 1, tokens)"
    tokens_last = True


class CoreMLFused(CoreML):
    """The same with each attention as one op, and the caches of a decoder as states, which iOS 18 and macOS 15 brought."""

    name = "coreml-ios18"
    description = "Core ML package for iOS 18 and macOS 15, with attention as one op"
    oldest = "iOS18"

    def for_caches(self, caches: Sequence[Cache]) -> Target:
        made = copy.copy(self)
        made.caches = tuple(caches)
        return made
