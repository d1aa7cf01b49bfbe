"""The target `coreai`: Apple's successor of Core ML, whose runtime also runs on Linux."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.targets.base import Requirement, Session, Target, Tolerance
from edgewise.targets.coreml import TOLERANCES

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_OPS = (
    *("top_tokens", "bipartite_match", "take", "merge", "order_tokens"),
    *("farthest_points", "determinantal"),
)


class CoreAI(Target):
    """An `.aimodel`; with `fp16` weights, arithmetic, inputs and outputs are half precision, and with `w8a16` and `w4a16` the
    weights of linear layers and convolutions are stored in 8 and 4 bits. Sorts and scatters with sums have no rule there, so that
    compression is sort-free."""

    name = "coreai"
    description = "Core AI model for iOS 27 and macOS 27, run here by Apple's runtime on the CPU"
    suffixes = (".aimodel",)
    requirements = (
        Requirement("coreai-core", minimum="1.0.0b3", tested="1.0.0b3", extra="coreai"),
        Requirement("coreai-torch", minimum="0.4.3", tested="0.4.3", extra="coreai-export", runtime=False),
        Requirement("torch", minimum="2.9.0", tested="2.13.0", extra="coreai-export", runtime=False),
    )
    precisions = ("fp32", "fp16", "w8a16", "w4a16")
    realisations = dict.fromkeys(_OPS, ("sort_free",))

    def tolerance(self, precision: str) -> Tolerance:
        # As of the target coreml, which rounds at each op, and has the same weights in 8 bits.
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
        from edgewise.targets.coreai.lower import lower

        self.check()
        self.check_precision(precision)
        return lower(exported, folder, stem, precision, input_names, output_names)

    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        from edgewise.targets.coreai.session import CoreAISession

        self.check(runtime_only=True)
        return CoreAISession(files, threads=threads)
