"""Known families for TensorRT: exported with `tome` and `topk`, verified in ONNX Runtime, and built by NVIDIA's own builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, build
from tensorrt_cases import built, one_of_each
from test_tensorrt import check_file
from test_tensorrt_quantise import check_places

import edgewise
from edgewise.targets.tensorrt import rtx

SMALL = [name for name, one in FAMILIES.items() if one.small and one.refused is None]
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "w8a8": 1e-2}
"""Of the ladder; `w8a8` is made of the artifact in half precision, which is held to its own."""


def cases() -> list[tuple[str, str, str]]:
    """Every family with both methods, at two of the three precisions; `benchmarks/tensorrt_matrix.py` does all of them."""
    precisions = list(LIMITS)
    methods = ("tome", "topk")
    return [(name, spec, precisions[(n + m) % 3]) for n, name in enumerate(SMALL) for m, spec in enumerate(methods)]


@pytest.mark.parametrize(("family", "spec", "precision"), cases())
def test_families(family: str, spec: str, precision: str, tmp_path: Path) -> None:
    model, inputs = build(family, small=True)
    given: dict[str, Any] = {}
    if precision == "w8a8":
        inputs, given["calibration"] = one_of_each(inputs)
    bundle = edgewise.export(
        model, tmp_path / "b", example=inputs, targets=["tensorrt"], compress=f"{spec}:keep=0.5", precision=precision,
        cache=False, **given,
    )  # fmt: skip
    rungs = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    assert rungs[-1].threshold == LIMITS[precision] and rungs[-1].passed
    path = bundle.file(bundle.manifest.targets[0].files[0])
    check_file(path)
    if precision == "w8a8":
        check_places(path)
        assert [rung.passed for rung in bundle.manifest.verification if rung.kind == "quantisation"] == [None]
    if rtx.installed():
        assert built(path) > 10_000
