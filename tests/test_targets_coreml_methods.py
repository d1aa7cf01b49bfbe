"""Methods as Core ML packages, one of each kind of selection and reduction; `benchmarks/target_methods.py` does all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_graphs import check_graph

pytest.importorskip("coremltools")

TEXT = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "merge into the nearest": ("tofu", {"keep": 8, "mode": "mlerp"}),
    "cluster": ("dpcknn", {"keep": 5}),
    "farthest points": ("divprune", {"keep": 4}),
    "determinant": ("cdpruner", {"keep": 4, "text": TEXT}),
    "change in time": ("framefusion", {"frames": 3, "r": 4}),
    "fixed map": ("pool", {"grid": (3, 4), "kind": "bilinear", "stride": 2}),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_method_computes_what_its_eager_call_does(case: str, tmp_path: Path) -> None:
    method, known = METHODS[case]
    check_graph(method, known, "coreml", tmp_path, protected=1, count=12, batches=(2,), width=16)


def test_greedy_picks_by_rows_that_are_gathered(tmp_path: Path) -> None:
    check_graph("divprune", {"keep": 4}, "coreml-topk", tmp_path, protected=1, count=12, batches=(2,))
