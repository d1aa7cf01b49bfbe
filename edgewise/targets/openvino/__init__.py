"""The target `openvino`: Intel CPUs, GPUs and NPUs of laptops and edge boxes, through OpenVINO IR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.base import Feeds, Lowering, Quantiser, Ranges, Requirement, Session, Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class OpenVino(Target):
    """OpenVINO IR, `.xml` and `.bin`. With `fp16` weights are stored in half precision and the arithmetic
    is the device's choice; with `fp32` both are single precision. `w8a16`, `w4a16` and `w8a8` store the weights of layers in 8 or
    4 bits and the rest as `fp16` does; with `w8a8` layers compute in 8 bits."""

    name = "openvino"
    description = "OpenVINO IR for Intel CPUs, GPUs and NPUs"
    suffixes = (".xml", ".bin")
    requirements = (
        Requirement("openvino", minimum="2026.2.0", tested="2026.4.1", extra="openvino"),
        Requirement("torch", minimum="2.9.0", tested="2.13.0", extra="export", runtime=False),
    )
    precisions = ("fp32", "fp16", "w8a16", "w8a8", "w4a16")
    quantises = ("w8a16", "w8a8", "w4a16")
    quantiser_requirements = (
        Requirement("nncf", minimum="3.4.0", tested="3.4.0", extra="calibration", runtime=False),
    )
    has_ranges = True
    realisations = {
        "top_tokens": ("topk", "sort_free", "scatter"),
        "bipartite_match": ("topk", "sort_free", "scatter"),
        "take": ("topk", "sort_free", "scatter"),
        "merge": ("topk", "sort_free", "scatter"),
        "order_tokens": ("topk", "sort_free", "scatter"),
        "farthest_points": ("loop", "topk", "sort_free", "scatter"),
        "determinantal": ("loop", "topk", "sort_free", "scatter"),
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
        from edgewise.targets.openvino.lower import lower

        self.check()
        self.check_precision(precision)
        return lower(exported, folder, stem, precision, input_names, output_names)

    def quantiser(
        self,
        files: Sequence[Path],
        precision: str,
        feeds: Feeds | None,
        ranges: Ranges | None = None,
        made_of: Lowering | None = None,
    ) -> Quantiser:
        from edgewise.targets.openvino.quantise import quantiser

        self.check(precision=precision)
        return quantiser(files, precision, feeds, ranges)

    def ranges(self, files: Sequence[Path], feeds: Feeds) -> Ranges:
        from edgewise.targets.openvino.smooth import ranges

        return ranges(files[0], feeds)

    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        from edgewise.targets.openvino.session import OpenVinoSession

        self.check(runtime_only=True)
        return OpenVinoSession(files, threads=threads)

    def ops(self, files: Sequence[Path]) -> dict[str, int] | None:
        from edgewise.targets.openvino.ops import ops

        return ops(files[0])
