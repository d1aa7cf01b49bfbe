"""The target `coreml`: iPhones, iPads and Macs, through Core ML packages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.base import Requirement, Session, Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class CoreML(Target):
    """An `.mlpackage` with an ML Program. With `fp16` weights and arithmetic are half precision, as the Neural Engine
    needs it, and so are inputs and outputs of the package; a session takes and gives what the program does."""

    name = "coreml"
    description = "Core ML package for iPhones, iPads and Macs"
    suffixes = (".mlpackage",)
    requirements = (
        Requirement("coremltools", minimum="9.0", tested="9.0", extra="coreml", runtime=False),
        Requirement("torch", minimum="2.9.0", tested="2.13.0", extra="export", runtime=False),
        Requirement("protobuf", minimum="4.25.0", tested="7.36.2", extra="coreml"),
    )
    precisions = ("fp32", "fp16")
    realisations = {
        "top_tokens": ("sort_free",),
        "bipartite_match": ("sort_free",),
        "take": ("sort_free",),
        "merge": ("sort_free",),
        "order_tokens": ("sort_free",),
        "farthest_points": ("sort_free",),
        "determinantal": ("sort_free",),
    }

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
        return lower(exported, folder, stem, precision, input_names, output_names)

    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        from edgewise.targets.coreml.session import CoreMLSession

        self.check(runtime_only=True)
        return CoreMLSession(files, threads=threads)
