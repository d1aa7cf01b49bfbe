"""TensorRT-RTX from PyPI: parse every artifact, and build engines for RTX PCs, on a machine that has no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewise.errors import InputError, MissingExtra, unknown
from edgewise.targets.base import Requirement
from edgewise.targets.tensorrt import engine, plans

if TYPE_CHECKING:
    from edgewise.targets.tensorrt.origin import Origin

EXTRA = "tensorrt-rtx"
BINDINGS = Requirement("tensorrt-rtx-cu12-bindings", minimum="1.7", tested="1.7.1.116", extra=EXTRA, runtime=False)
_MODULE = "tensorrt_rtx_bindings"

# The compute capability of a Jetson has no engine ahead of time: TensorRT-RTX is for PCs.
_JETSON = {"sm53": "Jetson Nano", "sm62": "Jetson TX2", "sm72": "Jetson Xavier", "sm87": "Jetson Orin", "sm101": "Jetson Thor",
           "sm110": "Jetson Thor"}  # fmt: skip


def installed() -> bool:
    """Whether the extra is installed in a version that works."""
    try:
        BINDINGS.check()
    except MissingExtra:
        return False
    return True


def package() -> Any:
    """The bindings. Raises `MissingExtra` if they are absent or too old."""
    BINDINGS.check()
    import importlib

    try:
        return importlib.import_module(_MODULE)
    except (ImportError, OSError) as error:
        raise MissingExtra(f'{_MODULE} cannot be loaded ({error}); install it with: pip install "edgewise[{EXTRA}]"') from error


def devices() -> tuple[str, ...]:
    """The compute capabilities that engines can be built for: `sm86`, ..."""
    names = [name for name in package().ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(name.lower() for name in sorted(names, key=lambda name: int(name[2:])))


def check_device(device: str) -> None:
    """Raise `InputError` unless engines can be built for a compute capability, with the nearest name."""
    if device in devices():
        return
    if device in _JETSON:
        raise InputError(
            f"device {device} is a {_JETSON[device]}, whose engine is built on the device: copy the bundle there and run "
            f"edgewise bench BUNDLE --target tensorrt"
        )
    raise unknown("device", device, devices())


def parse(path: Path, origins: Mapping[str, Origin] | None = None) -> int:
    """Parse an ONNX file with NVIDIA's parser; gives the number of layers. Raises `InputError` if the parser rejects it."""
    return engine.parse(package(), path, _describe(origins)).layers


def build(path: Path, device: str, origins: Mapping[str, Origin] | None = None) -> list[Path]:
    """Build the engine of an ONNX file for a compute capability, beside the file: `stem.sm86.engine`, and a note of what it is for.
    Gives both.

    Raises `InputError` if the device is unknown, or the parser or the builder rejects the file.
    """
    check_device(device)
    trt = package()
    network = engine.parse(trt, path, _describe(origins))
    config = network.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, device.upper()), 0)
    plan = engine.build(network, config, f"{path.name} for {device}", _describe(origins))
    out = path.with_name(f"{path.stem}.{device}.engine")
    plans.write(out, plan, {"device": device, "onnx": plans.digest(path), EXTRA: trt.__version__})
    return [out, plans.note_of(out)]


def check_engine(path: Path, device: str, onnx: Path) -> None:
    """Raise `InputError` if an engine is for another device, another version of TensorRT-RTX or another model, or damaged."""
    fault = plans.fault(path, {"device": device, EXTRA: package().__version__, "onnx": plans.digest(onnx)})
    if fault is not None:
        raise InputError(f"{fault}; export the model again with --device {device}")


def _describe(origins: Mapping[str, Origin] | None) -> engine.Describe | None:
    if origins is None:
        return None

    def describe(name: str, op: str) -> str | None:
        if name in origins:
            return str(origins[name])
        alike = [] if name else list(dict.fromkeys(str(origin) for origin in origins.values() if origin.onnx == op))
        more = f" and {len(alike) - _MOST} more" if len(alike) > _MOST else ""
        return " or ".join(alike[:_MOST]) + more or None

    return describe


_MOST = 3
