"""States: tensors that are kept between calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.targets.coreml.interpreter.registry import op


@op("read_state")
def read_state(input: Any) -> np.ndarray:
    """What the state holds now. A later write puts another array in, and leaves this one as it is."""
    array: np.ndarray = input.array
    return array


@op("write_state")
def write_state(input: Any, data: np.ndarray) -> None:
    input.array = input.type.settle(data)
