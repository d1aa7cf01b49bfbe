"""Run an ONNX file with ONNX Runtime on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError
from edgewise.targets.base import Session, check_threads

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}
_ERRORS_ONLY = 3


class OnnxRuntimeSession(Session):
    """An ONNX Runtime session on the CPU provider."""

    def __init__(self, files: Sequence[Path], *, threads: int | None = None) -> None:
        import onnxruntime

        check_threads(threads)
        path = Path(files[0])
        options = onnxruntime.SessionOptions()
        # Shapes are static, so the memory plan of the first run holds for every run.
        options.enable_mem_pattern = True
        options.log_severity_level = _ERRORS_ONLY
        # For `placement`. Older versions take no notice of it.
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # ONNX Runtime's errors are direct children of Exception.
            raise InputError(f"ONNX Runtime cannot load {path}: {error}") from error
        self.inputs = tuple(_info(value, path) for value in self._session.get_inputs())
        self.outputs = tuple(_info(value, path) for value in self._session.get_outputs())
        self._names = [info.name for info in self.outputs]

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            raise InputError("this session was closed; load the artifact again")
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))

    def placement(self) -> dict[str, int] | None:
        """Nodes by execution provider, as the graph was divided among them. Older versions do not tell."""
        tell = getattr(self._session, "get_provider_graph_assignment_info", None)
        if tell is None or self.stand_in is not None:  # its units are not those of what it stands in for
            return None
        units: dict[str, int] = {}
        for part in tell():
            unit = part.ep_name.removesuffix("ExecutionProvider")
            units[unit] = units.get(unit, 0) + len(part.get_nodes())
        return units

    def close(self) -> None:
        self._session = None


def _info(value: Any, path: Path) -> TensorInfo:
    shape = tuple(value.shape)
    if value.type not in _DTYPES or not all(isinstance(size, int) for size in shape):
        raise InputError(
            f"{path} has '{value.name}' of type {value.type} and shape {shape}; artifacts are static"
        )
    return TensorInfo(name=value.name, shape=shape, dtype=_DTYPES[value.type])
