"""The parts of TensorRT and of CUDA's driver that need a GPU, as doubles that are strict where the real ones are.

Logger, builder, network, parser and configuration are NVIDIA's own (TensorRT-RTX, which needs no GPU for them). The runtime, its
engine and its context are doubles that run the ONNX file with ONNX Runtime; the driver keeps "device" memory apart and does what is
put into a stream only when somebody waits for it.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from edgewise.targets.tensorrt import rtx


class Driver:
    """The calls of `libcuda` that a session makes."""

    def __init__(self, name: bytes = b"Orin", capability: tuple[int, int] = (8, 7)) -> None:
        self.name, self.capability = name, capability
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float | None] = {}
        self.clock, self.handles, self.ready = 0.0, 1000, False
        self.fail: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("cu") and name != "cuGetErrorString" and self.fail.get(name):
            return lambda *args: self.fail[name]
        return found

    def _handle(self) -> int:
        self.handles += 1
        return self.handles

    def cuInit(self, flags: int) -> int:
        self.ready = True
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"out of memory" if code == 2 else b"something else"
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0 if self.ready else 3

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = self._handle()
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0 if context.value else 201

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self.name[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        self.memory[ctypes.addressof(buffer)] = buffer
        address._obj.value = ctypes.addressof(buffer)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        return 0 if self.memory.pop(address.value, None) is not None else 1

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream._obj.value = self._handle()
        self.streams[stream._obj.value] = []
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        return 0 if self.streams.pop(stream.value, None) is not None else 400

    def cuEventCreate(self, event: Any, flags: int) -> int:
        event._obj.value = self._handle()
        self.events[event._obj.value] = None
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:
        if event.value not in self.events:
            return 400
        del self.events[event.value]
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        self.events[event.value] = None
        return self._later(stream, lambda: self.events.update({event.value: self.clock}))

    def cuEventElapsedTime(self, milliseconds: Any, first: Any, second: Any) -> int:
        start, end = self.events[first.value], self.events[second.value]
        if start is None or end is None:
            return 600  # not ready
        milliseconds._obj.value = (end - start) * 1e3
        return 0

    def cuMemcpyHtoDAsync_v2(self, address: Any, host: Any, size: Any, stream: Any) -> int:
        return self._copy(address.value, address.value, host.value, size.value, stream)

    def cuMemcpyDtoHAsync_v2(self, host: Any, address: Any, size: Any, stream: Any) -> int:
        return self._copy(address.value, host.value, address.value, size.value, stream)

    def _copy(self, device: int, to: int, source: int, size: int, stream: Any) -> int:
        if device not in self.memory or size > len(self.memory[device]):
            return 1

        def copy() -> None:
            ctypes.memmove(to, source, size)
            self.clock += 1e-3

        return self._later(stream, copy)

    def cuStreamSynchronize(self, stream: Any) -> int:
        for action in self.streams[stream.value]:
            action()
        self.streams[stream.value].clear()
        return 0

    def _later(self, stream: Any, action: Callable[[], None]) -> int:
        if stream.value not in self.streams:
            return 400
        self.streams[stream.value].append(action)
        return 0


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._addresses = engine, {}  # type: ignore[var-annotated]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or memory not in self._engine._driver.memory:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if set(self._addresses) != set(engine._tensors) or engine._trt.broken:
            return False
        driver = engine._driver
        driver.streams[stream_handle].append(self._run)
        return True

    def _run(self) -> None:
        feeds, engine = {}, self._engine
        for name, (mode, shape, dtype) in engine._tensors.items():
            if mode == "in":
                feeds[name] = np.empty(shape, dtype)
                ctypes.memmove(feeds[name].ctypes.data, self._addresses[name], feeds[name].nbytes)
        names = [name for name, (mode, _, _) in engine._tensors.items() if mode == "out"]
        for name, value in zip(names, engine._session.run(names, feeds), strict=True):
            value = np.ascontiguousarray(value)
            ctypes.memmove(self._addresses[name], value.ctypes.data, value.nbytes)
        engine._driver.clock += 5e-3


class Engine:
    """`ICudaEngine`."""

    def __init__(self, trt: Any, driver: Driver, file: str, tensors: dict[str, Any], layers: int) -> None:
        self._trt, self._driver, self._tensors = trt, driver, tensors
        self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.num_io_tensors, self.num_layers = len(tensors), layers

    def create_execution_context(self) -> Context:
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt.real.Dims(self._tensors[name][1])

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
        return getattr(self._trt.real.DataType, kinds[np.dtype(self._tensors[name][2]).name])

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if self._tensors[name][0] == "in" else self._trt.TensorIOMode.OUTPUT


class TensorRT(SimpleNamespace):
    """The module `tensorrt`: NVIDIA's own classes, but for what needs a GPU."""

    def __init__(self, driver: Driver, version: str = "10.3.0") -> None:
        real = rtx.package()
        known = ("ILogger", "NetworkDefinitionCreationFlag", "BuilderFlag", "TensorIOMode", "nptype")
        super().__init__(**{name: getattr(real, name) for name in known}, real=real, __version__=version, __name__="tensorrt")
        self.driver, self.broken, self.builds = driver, False, 0
        self._plans: dict[str, tuple[str, dict[str, Any], int]] = {}
        self._file = ""
        self.Builder, self.OnnxParser, self.Runtime = self._builder, self._parser, self._runtime

    def _builder(self, log: Any) -> Any:
        real = self.real.Builder(log)

        def config() -> Any:
            made = real.create_builder_config()
            # TensorRT builds for the GPU that is there; without one TensorRT-RTX has to be told.
            made.num_compute_capabilities = 1
            made.set_compute_capability(self.real.ComputeCapability.SM86, 0)
            return made

        def build(network: Any, config: Any) -> Any:
            self.builds += 1
            plan = real.build_serialized_network(network, config)
            if plan is not None:
                tensors: dict[str, Any] = {}
                ports = [("in", network.get_input(n)) for n in range(network.num_inputs)]
                ports += [("out", network.get_output(n)) for n in range(network.num_outputs)]
                for mode, value in ports:
                    tensors[value.name] = (mode, tuple(value.shape), np.dtype(self.nptype(value.dtype)))
                self._plans[hashlib.sha256(bytes(plan)).hexdigest()] = (self._file, tensors, network.num_layers)
            return plan

        return SimpleNamespace(create_network=real.create_network, create_builder_config=config, build_serialized_network=build)

    def _parser(self, network: Any, log: Any) -> Any:
        real = self.real.OnnxParser(network, log)

        def parse(model: str) -> bool:
            self._file = model
            return bool(real.parse_from_file(model))

        return _Parser(real, parse)

    def _runtime(self, log: Any) -> Any:
        def load(serialized_engine: bytes) -> Engine | None:
            known = self._plans.get(hashlib.sha256(serialized_engine).hexdigest())
            if known is None:
                log.log(self.ILogger.ERROR, "the plan is not one of this version")
                return None
            return Engine(self, self.driver, *known)

        return SimpleNamespace(deserialize_cuda_engine=load)


class _Parser:
    def __init__(self, real: Any, parse: Callable[[str], bool]) -> None:
        self._real, self.parse_from_file = real, parse

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
