"""Run OpenVINO IR on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError
from edgewise.targets.base import Session, check_threads


class OpenVinoSession(Session):
    """A compiled OpenVINO model; one inference at a time."""

    def __init__(self, files: Sequence[Path], *, threads: int | None = None) -> None:
        import openvino

        check_threads(threads)
        path = Path(files[0])
        # On CPUs with bf16 or fp16 arithmetic, OpenVINO computes fp32 models in it unless it is told not to.
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        # Where weights alone are of 8 or 4 bits, it rounds activations to 8 as well, by ranges that it finds as it runs. They are
        # floating-point numbers unless the artifact says otherwise.
        config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = openvino.Core().compile_model(path, "CPU", config)
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot load {path}: {_last_line(error)}") from error
        self._request: Any = self._model.create_infer_request()
        self.inputs = tuple(_info(port) for port in self._model.inputs)
        self._places = [(info.name, self._request.get_input_tensor(i).data) for i, info in enumerate(self.inputs)]
        self.outputs = tuple(_info(port) for port in self._model.outputs)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._request is None:
            raise InputError("this session was closed; load the artifact again")
        # Copied into the request's own tensors: to hand an array over takes OpenVINO a tenth of a millisecond each time.
        for name, place in self._places:
            place[...] = feeds[name]
        # Not `start_async` and `wait`: to wake another thread and to be woken takes as long again.
        self._request.infer(share_outputs=True)
        return {info.name: self._request.get_output_tensor(index).data.copy() for index, info in enumerate(self.outputs)}

    def placement(self) -> dict[str, int] | None:
        if self._request is None:
            return None
        unit = ",".join(self._model.get_property("EXECUTION_DEVICES"))
        units: dict[str, int] = {}
        for node in self._model.get_runtime_model().get_ordered_ops():
            if node.get_type_name() in ("Parameter", "Result", "Constant"):
                continue
            units[unit] = units.get(unit, 0) + 1
        return units

    def close(self) -> None:
        self._places = []
        self._request = None
        self._model = None


def _info(port: Any) -> TensorInfo:
    dtype = np.dtype(port.get_element_type().to_dtype()).name
    return TensorInfo(name=port.get_any_name(), shape=tuple(port.get_shape()), dtype=dtype)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
