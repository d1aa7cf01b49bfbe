"""Run an artifact with TensorRT on the GPU of this machine: build its engine once, keep it, and time it with CUDA's events."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError
from edgewise.targets.base import Session, release
from edgewise.targets.tensorrt import engine, plans
from edgewise.targets.tensorrt.cuda import Cuda

if TYPE_CHECKING:
    import tensorrt

MODULE, MINIMUM = "tensorrt", "10.0"
STAGES = ("copy in", "compute", "copy out")


class NoDevice(Exception):
    """TensorRT cannot run here, and why."""


def installed() -> bool:
    """Whether TensorRT's package is here. Nothing is imported."""
    return importlib.util.find_spec(MODULE) is not None


def version() -> str | None:
    """The version of TensorRT that `load` would use; None where it would not."""
    try:
        return str(package().__version__)
    except NoDevice:
        return None


def package() -> Any:
    """TensorRT. Raises `NoDevice` if it is absent, cannot be loaded, or is older than 10, which has strongly typed networks."""
    if not installed():
        raise NoDevice("the package tensorrt is not here")
    try:
        trt = importlib.import_module(MODULE)
    except (ImportError, OSError) as error:
        raise NoDevice(f"the package tensorrt cannot be loaded ({error})") from error
    if not hasattr(trt, "__version__") or not hasattr(trt, "Runtime"):
        raise NoDevice(f"the module tensorrt at {getattr(trt, '__file__', 'an unknown place')} is not NVIDIA's")
    if release(trt.__version__) < release(MINIMUM):
        raise NoDevice(f"TensorRT {trt.__version__} is older than {MINIMUM}")
    return trt


def device() -> Cuda:
    """The GPU. Raises `NoDevice` if there is none."""
    try:
        return Cuda()
    except (OSError, InputError) as error:
        raise NoDevice(f"there is no GPU that CUDA can use ({error})") from error


class TensorRTSession(Session):
    """An engine on the GPU. Its stages are the copy of the inputs, the engine, and the copy of the outputs, by CUDA's events."""

    def __init__(self, path: Path, trt: Any, cuda: Cuda) -> None:
        self._trt, self._cuda = trt, cuda
        self._memory: dict[str, int] = {}
        self._stream, self._events = 0, [0] * 4
        self._seconds: tuple[float, ...] | None = None
        self._log = engine.logger(trt)
        self._runtime: tensorrt.Runtime = trt.Runtime(self._log)
        self._engine: tensorrt.ICudaEngine = self._ready(Path(path))
        self._context: tensorrt.IExecutionContext | None = self._engine.create_execution_context()
        if self._context is None:
            raise InputError(self._said(f"cannot prepare {path}"))
        inputs: list[TensorInfo] = []
        outputs: list[TensorInfo] = []
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            shape = tuple(int(size) for size in self._engine.get_tensor_shape(name))
            info = TensorInfo(name=name, shape=shape, dtype=np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))).name)
            (inputs if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(info)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        try:
            self._stream = cuda.stream()
            self._events = [cuda.event() for _ in self._events]
            for info in (*self.inputs, *self.outputs):
                self._memory[info.name] = cuda.allocate(int(np.prod(info.shape, dtype=np.int64)) * np.dtype(info.dtype).itemsize)
                if not self._context.set_tensor_address(info.name, self._memory[info.name]):
                    raise InputError(self._said(f"does not take memory for '{info.name}'"))
        except InputError:
            self.close()
            raise

    def _ready(self, path: Path) -> tensorrt.ICudaEngine:
        """The engine that was kept, if it is for this device, version and file; otherwise a new one, which is kept."""
        here = f"{self._cuda.capability} {self._cuda.name}"
        facts = {"device": here, "tensorrt": str(self._trt.__version__), "onnx": plans.digest(path)}
        kept = plans.folder() / f"{facts['onnx'][:24]}-{re.sub(r'[^A-Za-z0-9]+', '-', here)}.engine"
        if kept.exists():
            fault = plans.fault(kept, facts)
            loaded = None if fault else self._runtime.deserialize_cuda_engine(kept.read_bytes())
            if loaded is not None:
                return loaded
            warnings.warn(f"{fault or self._said(f'cannot load {kept}')}; it is built again, which takes minutes", stacklevel=2)
        network = engine.parse(self._trt, path)
        config = network.builder.create_builder_config()
        plan = engine.build(network, config, f"{path.name} for {here}")
        plans.write(kept, plan, facts)
        loaded = self._runtime.deserialize_cuda_engine(plan)
        if loaded is None:
            raise InputError(self._said(f"cannot load the engine that it built of {path}"))
        return loaded

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._context is None:
            raise InputError("this session was closed; load the artifact again")
        cuda, (start, copied, done, end) = self._cuda, self._events
        results = {info.name: np.empty(info.shape, info.dtype) for info in self.outputs}
        cuda.record(start, self._stream)
        for name, array in feeds.items():
            cuda.to_device(self._memory[name], array, self._stream)
        cuda.record(copied, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise InputError(self._said("cannot run the engine"))
        cuda.record(done, self._stream)
        for name, array in results.items():
            cuda.to_host(array, self._memory[name], self._stream)
        cuda.record(end, self._stream)
        cuda.wait(self._stream)
        self._seconds = (cuda.seconds(start, copied), cuda.seconds(copied, done), cuda.seconds(done, end))
        return results

    def placement(self) -> dict[str, int] | None:
        """All of an engine runs on the GPU: layers, as TensorRT merged them."""
        return None if self._context is None else {"GPU": int(self._engine.num_layers)}

    def stages(self) -> dict[str, tuple[float, ...]] | None:
        return None if self._seconds is None else {name: (one,) for name, one in zip(STAGES, self._seconds, strict=True)}

    def close(self) -> None:
        self._context = None
        for address in self._memory.values():
            self._cuda.free(address)
        self._memory.clear()
        for event in filter(None, self._events):
            self._cuda.drop_event(event)
        if self._stream:
            self._cuda.drop_stream(self._stream)
        self._stream, self._events = 0, [0] * 4

    def _said(self, what: str) -> str:
        reasons = "; ".join(dict.fromkeys(self._log.messages)) or "it gave no reason"
        return f"{engine.name_of(self._trt)} {what}: {reasons}"
