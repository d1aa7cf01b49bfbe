"""The few calls of CUDA's driver that a session makes: memory, copies, a stream and events.

The driver's library comes with every GPU, and its names do not change between versions of CUDA: no package is needed.
https://docs.nvidia.com/cuda/cuda-driver-api
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edgewise.errors import InputError

LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME = 256


class Cuda:
    """The first GPU. Raises `OSError` if there is no driver, `InputError` if there is no GPU or a call fails."""

    def __init__(self, library: Any = None) -> None:
        self._library = _load() if library is None else library
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)
        name = ctypes.create_string_buffer(_NAME)
        self._call("cuDeviceGetName", name, _NAME, self._device)
        self.name = name.value.decode("utf-8", "replace")
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            number = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, self._device)
            numbers.append(number.value)
        self.capability = f"sm{numbers[0]}{numbers[1]}"
        """The compute capability: `sm87` for Jetson Orin."""

    def allocate(self, size: int) -> int:
        """The address of so many bytes on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(handle), 1)  # does not wait for the default stream
        return handle.value or 0

    def drop_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def event(self) -> int:
        handle = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(handle), 0)
        return handle.value or 0

    def drop_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        """Let an event happen when all that the stream was given before is done."""
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def seconds(self, first: int, second: int) -> float:
        """Between two events that happened."""
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(first), ctypes.c_void_p(second))
        return milliseconds.value * 1e-3

    def to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a plain array. It must live until the stream is done."""
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy into a plain array. It must live until the stream is done."""
        self._call(
            "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def wait(self, stream: int) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            known = self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value is not None
            reason = (text.value or b"").decode("utf-8", "replace") if known else "unknown error"
            raise InputError(f"CUDA: {name} failed with {code} ({reason})")


def _load() -> Any:
    failure: OSError | None = None
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            failure = failure or error
    assert failure is not None
    raise failure
