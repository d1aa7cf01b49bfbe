"""Which unit Core ML means to run each operation of a package on: its compute plan, which only a Mac can make.

By the API of coremltools 9.0 (`coremltools.models.compute_plan`), over `MLComputePlan` of macOS 14.4:
https://apple.github.io/coremltools/docs-guides/source/mlmodel-utilities.html. Imports neither before it is asked.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_UNITS = {"MLCPUComputeDevice": "CPU", "MLGPUComputeDevice": "GPU", "MLNeuralEngineComputeDevice": "Neural Engine"}


class NoPlan(Exception):
    """There is no plan here, and why."""


def placement(package: Path, function: str, units: str = "ALL") -> dict[str, int]:
    """The number of operations of `function` by the unit that Core ML prefers for them, where those may be used that
    coremltools' `ComputeUnit` calls `units`. Operations without one, as constants, are left out. Raises `NoPlan`."""
    if sys.platform != "darwin":
        raise NoPlan("Core ML tells its plan on a Mac alone")
    try:
        from coremltools import ComputeUnit
        from coremltools.models.compute_plan import MLComputePlan
        from coremltools.models.utils import compile_model
    except ImportError as error:
        raise NoPlan(f"coremltools, which asks Core ML for its plan, cannot be loaded ({error})") from error
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        try:
            compiled = compile_model(str(package), destination_path=f"{folder}/{package.stem}.mlmodelc")
            plan = MLComputePlan.load_from_path(compiled, compute_units=ComputeUnit[units])
            program = plan.model_structure.program
        except Exception as error:  # of whatever kind Core ML says it is
            raise NoPlan(f"Core ML made no plan: {' '.join(str(error).split())}") from error
        if program is None or function not in program.functions:
            raise NoPlan(f"Core ML's plan has no function {function}")
        units = counted(plan, program.functions[function].block.operations)
    if not units:
        raise NoPlan("Core ML's plan names no unit")
    return units


def counted(plan: Any, operations: Iterable[Any]) -> dict[str, int]:
    """Operations by unit, those in the blocks of loops and conditions included, the most used first."""
    units: Counter[str] = Counter()
    left = list(operations)
    while left:
        operation = left.pop()
        for block in operation.blocks:
            left += block.operations
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is not None and usage.preferred_compute_device is not None:
            kind = type(usage.preferred_compute_device).__name__
            units[_UNITS.get(kind, kind)] += 1
    return dict(sorted(units.items(), key=lambda unit: (-unit[1], unit[0])))
