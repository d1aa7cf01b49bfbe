"""Which unit runs what, by Core ML's plan. Plans are made on a Mac alone: here they have the structures of coremltools, and units
that the test chose."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgewise import targets
from edgewise.targets.coreml.plan import NoPlan, placement

pytest.importorskip("coremltools")


class _Unit:
    """A compute device is made from Core ML's own handle, which is not here: only its class is asked for."""

    def __new__(cls, name: str | None) -> Any:
        from coremltools.models import compute_device

        return None if name is None else object.__new__(getattr(compute_device, name))


def _operation(name: str, *blocks: Any) -> Any:
    from coremltools.models.compute_plan import MLModelStructureProgramOperation

    return MLModelStructureProgramOperation(inputs={}, operator_name=name, outputs=[], blocks=list(blocks), __proxy__=None)


def _block(*operations: Any) -> Any:
    from coremltools.models.compute_plan import MLModelStructureProgramBlock

    return MLModelStructureProgramBlock(inputs=[], operations=list(operations), output_names=[])


UNITS = {"linear": "MLNeuralEngineComputeDevice", "topk": "MLCPUComputeDevice", "softmax": "MLGPUComputeDevice", "gather": None}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Mac with a package of one function, and what was compiled."""
    from coremltools.models import compute_plan, utils

    compiled: list[str] = []
    body = _block(_operation("topk"), _operation("linear"))
    main = _block(_operation("const"), _operation("linear"), _operation("softmax"), _operation("gather"), _operation("loop", body))
    structure = SimpleNamespace(program=SimpleNamespace(functions={"main": SimpleNamespace(inputs=[], block=main)}))

    def usage(operation: Any) -> Any:
        if operation.operator_name not in UNITS:
            return None
        unit = _Unit(UNITS[operation.operator_name])
        return compute_plan.MLComputePlanDeviceUsage(preferred_compute_device=unit, supported_compute_devices=[])

    def compile_model(model: str, destination_path: str) -> str:
        assert model.endswith(".mlpackage") and destination_path.endswith(".mlmodelc")
        compiled.append(model)
        return destination_path

    def load_from_path(path: str, compute_units: Any) -> Any:
        assert path.endswith(".mlmodelc") and compute_units.name == "ALL"
        return plan

    plan = SimpleNamespace(model_structure=structure, get_compute_device_usage_for_mlprogram_operation=usage)
    assert set(vars(plan)) <= set(dir(compute_plan.MLComputePlan)), "coremltools has no such thing"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(utils, "compile_model", compile_model)
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", load_from_path)
    return compiled


def test_operations_are_counted_by_unit(mac: list[str], tmp_path: Path) -> None:
    """Those of loops too; constants, and what Core ML says nothing of, are left out."""
    package = tmp_path / "m.mlpackage"
    assert placement(package, "main") == {"Neural Engine": 2, "CPU": 1, "GPU": 1}
    assert mac == [str(package)]
    with pytest.raises(NoPlan, match="no function other"):
        placement(package, "other")


def test_a_plan_that_core_ml_does_not_make(mac: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coremltools.models import compute_plan, utils

    def fail(*args: object, **kwargs: object) -> str:
        raise RuntimeError("Error compiling model:\n  it is too new")

    no_program = SimpleNamespace(model_structure=SimpleNamespace(program=None))
    with monkeypatch.context() as patch:
        patch.setattr(compute_plan.MLComputePlan, "load_from_path", lambda path, compute_units: no_program)
        with pytest.raises(NoPlan, match="no function main"):
            placement(tmp_path / "m.mlpackage", "main")
    monkeypatch.setattr(utils, "compile_model", fail)
    with pytest.raises(NoPlan, match="Core ML made no plan: Error compiling model: it is too new"):
        placement(tmp_path / "m.mlpackage", "main")


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_a_session_says_why_it_does_not_know(tmp_path: Path) -> None:
    """And what the interpreter does is no placement of Core ML's; nor what ONNX Runtime does one of TensorRT's."""
    pytest.importorskip("torch")
    from tiny_programs import CASES

    one = CASES["block"]()
    for name, why in (("coreml", "on a Mac alone"), ("tensorrt", "TensorRT did not run")):
        target = targets.get(name)
        files = target.lower(
            one.exported, tmp_path, name, precision="fp32", input_names=one.input_names, output_names=one.output_names
        )
        with target.load(files) as session:
            if name == "tensorrt" and session.stand_in is None:
                continue  # there is a GPU here
            assert session.placement() is None and why in session.no_placement
