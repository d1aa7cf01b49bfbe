"""The target `tensorrt`: NVIDIA Jetson and RTX, through a strongly typed ONNX file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgewise.errors import MissingExtra
from edgewise.targets.base import Feeds, Lowering, Quantiser, Ranges, Requirement, Session, Target, Tolerance
from edgewise.targets.tensorrt import rtx
from edgewise.targets.tensorrt import session as device_session

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgewise.targets.tensorrt.origin import Origin


class TensorRT(Target):
    """One `.onnx` file, or two above 1.8 GB, that says the type of every operation with explicit casts: TensorRT builds a strongly
    typed network of it. With `fp16` matrix products and what lies between them compute in half precision; norms, softmax and
    all that scores and chooses tokens compute in single precision. `w8a8` is `fp16` whose layers compute in 8 bits; `w4a16` is
    `fp16` whose layers have weights of 4 bits."""

    name = "tensorrt"
    description = "strongly typed ONNX for TensorRT 10 and newer, on NVIDIA Jetson and RTX"
    suffixes = (".onnx",)
    requirements = (
        Requirement("onnxruntime", minimum="1.20.0", tested="1.32.0", extra="onnxruntime"),
        Requirement("onnx", minimum="1.17.0", tested="1.23.2", extra="export", runtime=False),
        Requirement("onnxscript", minimum="0.5.0", tested="0.7.2", extra="export", runtime=False),
        Requirement("torch", minimum="2.9.0", tested="2.13.0", extra="export", runtime=False),
    )
    precisions = ("fp32", "fp16", "w8a8", "w4a16")
    quantises = ("w8a8", "w4a16")
    quantises_from = "fp16"
    # TensorRT does not say which of equal values its TopK takes first, and takes no more than 3840 of them: choices are made
    # by comparison, which leaves no freedom. Rows are gathered.
    has_ranges = True
    realisations = {
        "top_tokens": ("sort_free", "scatter"),
        "bipartite_match": ("places", "sort_free", "scatter"),
        "take": ("topk", "scatter"),
        "merge": ("places", "topk", "scatter"),
        "order_tokens": ("sort_free", "scatter"),
        "farthest_points": ("loop", "topk", "scatter"),
        "determinantal": ("loop", "topk", "scatter"),
    }

    ahead_of_time = True

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self.devices = tuple(dict.fromkeys(devices))

    def tolerance(self, precision: str) -> Tolerance:
        """Of half-precision arithmetic, whose numbers have 11 bits, for all but `fp32`."""
        return Tolerance() if precision == "fp32" else Tolerance(relative=1e-2, near_tie=1e-2)

    def check(self, *, runtime_only: bool = False, precision: str | None = None) -> list[str]:
        if runtime_only and device_session.installed():
            return []  # it runs there, and where it cannot, `load` says what is missing
        warnings = super().check(runtime_only=runtime_only, precision=precision)
        if not runtime_only:
            try:
                drift = rtx.BINDINGS.check()
            except MissingExtra as missing:
                drift = f"not parsed by NVIDIA's parser: {missing}"
            warnings += [drift] if drift else []
        return warnings

    def versions(self, *, runtime_only: bool = False, precision: str | None = None) -> dict[str, str]:
        known = super().versions(runtime_only=runtime_only, precision=precision)
        if runtime_only:
            here = device_session.version()
            return known if here is None else {**known, device_session.MODULE: here}
        version = rtx.BINDINGS.installed
        return known if version is None else {**known, rtx.BINDINGS.package: version}

    def for_devices(self, devices: Sequence[str]) -> TensorRT:
        """Devices are compute capabilities of RTX PCs (`sm86`); raises `MissingExtra` without the extra `tensorrt-rtx`."""
        for device in devices:
            rtx.check_device(device)
        return TensorRT(devices)

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
        """See `Target.lower`. Where the extra `tensorrt-rtx` is installed the file is parsed by NVIDIA's parser; raises
        `InputError` if it is rejected."""
        from edgewise.targets.tensorrt.lower import lower

        self.check()
        self.check_precision(precision)
        files, origins = lower(exported, folder, stem, precision, input_names, output_names)
        return self._checked(files, origins)

    def quantiser(
        self,
        files: Sequence[Path],
        precision: str,
        feeds: Feeds | None,
        ranges: Ranges | None = None,
        made_of: Lowering | None = None,
    ) -> Quantiser:
        from edgewise.targets.onnx.quantiser import Kind, OnnxQuantiser
        from edgewise.targets.tensorrt.capabilities import FOUR_BITS_NEED
        from edgewise.targets.tensorrt.precision import FOUR_BITS

        self.check()
        quantiser = OnnxQuantiser(files, precision, feeds, Kind(self.name, FOUR_BITS), ranges)
        if precision == "w4a16":
            quantiser.notes += (FOUR_BITS_NEED,)
        return quantiser

    def ranges(self, files: Sequence[Path], feeds: Feeds) -> Ranges:
        from edgewise.targets.onnx.quantiser import ranges

        return ranges(files[0], feeds, self.name)

    def finish(self, files: Sequence[Path]) -> list[Path]:
        """Parsed by NVIDIA's parser where that is installed, and built for the devices."""
        return self._checked(list(files), None)

    def _checked(self, files: list[Path], origins: Mapping[str, Origin] | None) -> list[Path]:
        if rtx.installed() and not self.devices:
            rtx.parse(files[0], origins)
        for device in self.devices:
            files += rtx.build(files[0], device, origins)
        return files

    def load(self, files: Sequence[Path], *, threads: int | None = None) -> Session:
        """TensorRT where its package and a GPU are, and ONNX Runtime on the CPU elsewhere, which `stand_in` of the session says."""
        try:
            return device_session.TensorRTSession(Path(files[0]), device_session.package(), device_session.device())
        except device_session.NoDevice as reason:
            why = str(reason)
        super().check(runtime_only=True)
        session = self._on_the_cpu(files, threads)
        session.stand_in = f"ONNX Runtime on the CPU in the place of TensorRT ({why})"
        session.no_placement = "TensorRT did not run, and only it tells its layers"
        return session

    def rehearse(self, files: Sequence[Path], function: str | None = None) -> Session:
        return self._on_the_cpu(files, None)

    def _on_the_cpu(self, files: Sequence[Path], threads: int | None) -> Session:
        from edgewise.targets.onnxruntime.session import OnnxRuntimeSession

        return OnnxRuntimeSession(files, threads=threads)

    def command(self, files: Sequence[Path]) -> str:
        """Of `trtexec`, as it is on a Jetson. TF32 is off, as in engines that are built here."""
        path = Path(files[0])
        onnx, plan = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".plan").name))
        return f"trtexec --onnx={onnx} --stronglyTyped --noTF32 --saveEngine={plan} --useSpinWait --warmUp=500 --duration=5"

    def lint(self, exported: ExportedProgram, precision: str = "fp32") -> list[str]:
        from edgewise.targets.tensorrt.lint import lint

        # A graph whose shapes depend on data is not lowered at all.
        return super().lint(exported) or lint(exported, precision)

    def ops(self, files: Sequence[Path]) -> dict[str, int] | None:
        from edgewise.targets.onnx.ops import ops

        return ops(files[0])
