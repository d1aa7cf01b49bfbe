"""Run a Core AI model with Apple's runtime."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgewise.bundle.manifest import TensorInfo
from edgewise.errors import InputError
from edgewise.targets.base import Session, check_threads
from edgewise.targets.coreml.ports import METADATA_KEY, Port, parse

T = TypeVar("T")

_REST = 0.3
"""Seconds."""


def _rest() -> None:
    """Let the runtime's threads finish before the interpreter ends. After a run they still ask for its lock, to release things of
    Python; one that asks too late is unwound by the C library, for which the runtime (1.0.0b3) ends the process with SIGABRT."""
    gc.collect()
    time.sleep(_REST)


class CoreAISession(Session):
    """The function `main` of a model, on the CPU. `threads` is checked and not used: the runtime has no such option.

    The runtime is asynchronous: its calls are made on a loop in a thread of their own, so that a session works inside of a
    program's own loop, too.
    """

    no_placement = "Apple's runtime tells no unit of its operations"

    def __init__(self, files: Sequence[Path], *, threads: int | None = None) -> None:
        from coreai.authoring import AIModelAsset

        check_threads(threads)
        atexit.unregister(_rest)  # once, however many sessions there are
        atexit.register(_rest)
        path = Path(files[0]).parent
        self._ports = _read(path)
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edgewise-coreai", daemon=True)
        self._thread.start()
        self._executable: Any = None
        try:
            asset = AIModelAsset.load(path)
            self._executable = asset.executable()
            model = self._wait(self._executable.__aenter__())
            with _silent():
                self._function: Any = model.load_function("main")
            described = self._function.desc
            self._dtypes = {n: np.dtype(described.input_descriptor(n).dtype) for n in described.input_names}
        except Exception as error:
            # The runtime's errors are direct children of Exception.
            self.close()
            raise InputError(f"Core AI cannot load {path}: {error}") from error
        self.inputs, self.outputs = (
            tuple(TensorInfo(name=port.name, shape=port.shape, dtype=port.dtype) for port in ports)
            for ports in self._ports
        )

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from coreai.runtime import NDArray

        if self._loop is None:
            raise InputError("this session was closed; load the artifact again")
        inputs, outputs = self._ports
        given = {p.feature: NDArray(_fed(feeds[p.name], p, self._dtypes[p.feature])) for p in inputs}
        results = self._wait(self._function(given))
        return {port.name: np.array(results[port.feature].numpy(), dtype=port.dtype) for port in outputs}

    def close(self) -> None:
        if self._loop is None:
            return
        if self._executable is not None:
            self._wait(self._executable.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the runtime writes to the process's own stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _read(path: Path) -> tuple[list[Port], list[Port]]:
    """The ports of a model that edgewise made. Raises `InputError` if it is another or damaged: the runtime ends the whole
    process when its program is not what it should be."""
    try:
        stated = json.loads((path / "metadata.json").read_text("utf-8"))
        program, digest = (path / "main.mlirb").read_bytes(), (path / "main.hash").read_bytes()
        inputs, outputs, _ = parse(stated["creatorDefinedMetadata"][METADATA_KEY])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"Core AI cannot load {path}: it is no model that edgewise made, or damaged: {error}"
        ) from error
    if hashlib.sha256(program).digest() != digest:
        raise InputError(f"Core AI cannot load {path}: its program is not the one that its digest is of; copy it again")
    return inputs, outputs


def _fed(array: np.ndarray, port: Port, dtype: np.dtype[Any]) -> np.ndarray:
    """An input in the type that the model takes. Raises `InputError` if a whole number does not fit."""
    stored = array.astype(dtype)
    if array.dtype.kind in "iu" and not np.array_equal(stored, array):
        raise InputError(f"input '{port.name}' has numbers beyond the range of {dtype}, which the model holds")
    return stored
