"""Run a package that edgewise made by Core ML itself, on a Mac.

By the API of coremltools 9.0 (`coremltools.models.MLModel`): https://apple.github.io/coremltools/docs-guides/source/model-prediction.html.
Imports it, and PyTorch with it where that is installed, when a package is loaded.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.errors import InputError, MissingExtra
from edgewise.targets.coreml.interpreter import Watch
from edgewise.targets.coreml.plan import NoPlan, placement
from edgewise.targets.coreml.ports import Port
from edgewise.targets.coreml.session import CoreMLSession

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ane": "CPU_AND_NE"}
"""The compute units that Core ML may use, and what coremltools calls them."""


def why_not() -> str | None:
    """Why Core ML cannot run here; None: it can."""
    if sys.platform != "darwin":
        return "Core ML runs on a Mac alone"
    try:
        import coremltools  # noqa: F401
    except ImportError as error:
        return f'coremltools, which Core ML is asked through, cannot be loaded ({error}): pip install "edgewise[coreml]"'
    return None


class PredictSession(CoreMLSession):
    """The same as `CoreMLSession`, computed by Core ML. `units`: see `UNITS`; None is `all`.

    Raises `MissingExtra` where Core ML cannot run, and `InputError` if it does not load the package.
    """

    stand_in = None

    def __init__(
        self, files: Sequence[Path], *, function: str | None = None, threads: int | None = None, units: str | None = None
    ) -> None:
        reason = why_not()
        if reason is not None:
            raise MissingExtra(reason)
        super().__init__(files, function=function, threads=threads)  # which compares the ports with the program
        self.units = units or "all"
        self._units = UNITS[self.units]
        self._model: Any = self._loaded()
        self._state: Any = None
        self.reset()

    def _loaded(self) -> Any:
        import coremltools as ct

        # Only packages of several functions are asked for one by name: systems before macOS 15 know no functions.
        function = self._session.function if self.package.model.description.functions else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what went wrong is the error below
            model = ct.models.MLModel(
                str(self.package.path), compute_units=ct.ComputeUnit[self._units], function_name=function
            )
        if model.__proxy__ is None:
            why = model._framework_error or "it is for a later system than this one"
            raise InputError(f"Core ML cannot load {self.package.path}: {' '.join(str(why).split())}")
        return model

    def _computed(self, stored: dict[str, np.ndarray], watch: Watch | None) -> dict[str, np.ndarray]:
        if watch is not None:  # Core ML shows no value on the way
            return super()._computed(stored, watch)
        if self._model is None:
            raise InputError("this session was closed; load the artifact again")
        given: dict[str, Any] = dict(stored)
        given |= {port.feature: _picture(stored[port.feature], port) for port in self.ports[0] if port.image}
        try:
            found = self._model.predict(given, self._state)
        except Exception as error:  # of whatever kind Core ML says it is
            raise InputError(f"Core ML cannot run {self.package.path}: {' '.join(str(error).split())}") from error
        return {name: np.asarray(value) for name, value in found.items()}

    def reset(self) -> None:
        super().reset()
        if self._session.states and self._model is not None:
            try:
                self._state = self._model.make_state()
            except Exception as error:  # of whatever kind Core ML says it is
                raise InputError(f"Core ML makes no state of {self.package.path}: {' '.join(str(error).split())}") from error

    def _store(self, states: dict[str, np.ndarray]) -> None:
        super()._store(states)
        if self._state is None:
            raise InputError("this session was closed; load the artifact again")
        for name, array in states.items():
            try:
                self._state.write_state(name, array)
            except Exception as error:  # of whatever kind Core ML says it is
                raise InputError(f"Core ML cannot write state '{name}' of {self.package.path}: {error}") from error

    def placement(self) -> dict[str, int] | None:
        try:
            return placement(self.package.path, self._session.function, self._units)
        except NoPlan as reason:
            self.no_placement = str(reason)
            return None

    def close(self) -> None:
        self._model = self._state = None
        super().close()


def _picture(pixels: np.ndarray, port: Port) -> Any:
    """Pixels `(1, channels, height, width)` as the image that coremltools takes."""
    from PIL import Image

    plain = pixels[0].astype(np.uint8)
    return Image.fromarray(plain.transpose(1, 2, 0), "RGB") if port.image == "RGB" else Image.fromarray(plain[0], "L")
