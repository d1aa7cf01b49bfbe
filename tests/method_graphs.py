"""A method as a graph of its own: captured on plain tensors, legalised, lowered, run, and compared with the eager call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import build
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.ops import apply
from edgewise.passes.legalise import Legalise, is_compression_op
from edgewise.passes.realisations import REALISATIONS

EVERY = ("openvino", "onnxruntime")
FORBIDDEN = ("nonzero", "masked_select", "scatter_reduce", "index_put")


class Call(nn.Module):
    def __init__(self, method: str, known: dict[str, Any]) -> None:
        super().__init__()
        self.call = partial(apply, method, **known)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x).tokens


def check_graph(
    method: str,
    known: dict[str, Any],
    target: str,
    folder: Path,
    protected: int = 0,
    count: int = 36,
    batches: tuple[int, ...] = (1, 2),
    width: int = 16,
) -> None:
    """Every realisation equals the eager call, and so does the artifact of the target."""
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, protected + count, width, generator=generator)
        model = Call(method, {**known, "protected": protected})
        expected = model(x)
        exported = torch.export.export(model, (x,), strict=False)
        names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
        assert not any(bad in name for bad in FORBIDDEN for name in names), names
        if target == EVERY[0]:
            for realisation in ("scatter", "topk", "sort_free"):
                legal = Legalise({op: (realisation, "scatter") for op in REALISATIONS})(exported).program
                assert not any(is_compression_op(n) for n in legal.graph.nodes)
                torch.testing.assert_close(legal.module()(x), expected, rtol=1e-5, atol=1e-5)
        chosen = targets.get(target)
        legal = Legalise(chosen.realisations)(exported).program
        files = chosen.lower(legal, folder, f"m{batch}", precision="fp32", input_names=["x"], output_names=["y"])
        with chosen.load(files, threads=1) as session:
            got = session.run({"x": x.numpy()})["y"]
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def check_export(family: str, spec: str, folder: Path, tokens_out: int) -> None:
    """The method in a small model of a family, on every target: as many tokens as expected, and lowering errors within 1e-4."""
    model, inputs = build(family, small=True)
    bundle = edgewise.export(model, folder / "b", example=inputs, targets=EVERY, compress=spec, cache=False)
    component = bundle.manifest.components[0]
    assert component.sites[-1].tokens_out == tokens_out
    rungs = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    assert {rung.name.split("/")[0] for rung in rungs} == set(EVERY)
    for rung in rungs:
        assert all(errors.relative is not None and errors.relative <= 1e-4 for errors in rung.outputs.values()), rung
