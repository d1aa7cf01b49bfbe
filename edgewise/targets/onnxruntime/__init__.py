"""The target `onnxruntime`: any machine, through an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.base import Feeds, Lowering, Quantiser, Ranges, Requirement, Session, Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class OnnxRuntime(Target):
    """One `.onnx` file, or two above 1.8 GB. With `fp16` weights are stored in half precision, and the
    arithmetic is single precision all the same. `w8a16`, `w4a16` and `w8a8` store the weights of layers in 8 or 4 bits, and the
    rest as `fp16` does; with `w8a8` layers compute in 8 bits."""

    name = "onnxruntime"
    description = "ONNX for ONNX Runtime, on any CPU"
    suffixes = (".onnx",)
    requirements = (
        Requirement("onnxruntime", minimum="1.20.0", tested="1.32.0", extra="onnxruntime"),
        Requirement("onnx", minimum="1.17.0", tested="1.23.2", extra="export", runtime=False),
        Requirement("onnxscript", minimum="0.5.0", tested="0.7.2", extra="export", runtime=False),
        Requirement("torch", minimum="2.9.0", tested="2.13.0", extra="export", runtime=False),
    )
    precisions = ("fp32", "fp16", "w8a16", "w8a8", "w4a16")
    quantises = ("w8a16", "w8a8", "w4a16")
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
        from edgewise.targets.onnxruntime.lower import lower

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
        from edgewise.targets.onnx.quantiser import Kind, OnnxQuantiser
        from edgewise.targets.onnxruntime.lower import halve

        self.check()
        return OnnxQuantiser(files, precision, feeds, Kind(self.name, store=halve), ranges)

    def ranges(self, files: Sequence[Path], feeds: Feeds) -> Ranges:
        from edgewise.targets.onnx.quantiser import ranges

        return ranges(files[0], feeds, self.name)

    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        from edgewise.targets.onnxruntime.session import OnnxRuntimeSession

        self.check(runtime_only=True)
        return OnnxRuntimeSession(files, threads=threads)

    def ops(self, files: Sequence[Path]) -> dict[str, int] | None:
        from edgewise.targets.onnx.ops import ops

        return ops(files[0])
