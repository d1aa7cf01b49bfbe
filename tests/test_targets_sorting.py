"""Stable sorts of which only the first entries are read, and topk, where values are equal: the lowest index comes first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import Tensor, nn

from edgewise import targets

COUNT = 3


class Sorted(nn.Module):
    """The first entries of a sort along one axis of `(8, 9, 7)`, by one of the ways to write it."""

    def __init__(self, way: str, dim: int, descending: bool) -> None:
        super().__init__()
        self.way, self.dim, self.descending = way, dim, descending

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.way == "topk":
            return tuple(x.topk(COUNT, self.dim, self.descending))
        if self.way == "argsort":
            return (_cut(x.argsort(dim=self.dim, descending=self.descending, stable=True), self.dim, 0, COUNT),)
        found = x.sort(dim=self.dim, descending=self.descending, stable=True)
        if self.way == "first":
            return _cut(found.values, self.dim, 0, COUNT), _cut(found.indices, self.dim, 0, COUNT)
        if self.way == "unlike":
            return _cut(found.values, self.dim, 0, COUNT), _cut(found.indices, self.dim, 0, COUNT + 1)
        return (_cut(found.indices, self.dim, COUNT, 9),)


def _cut(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, end),)]


def _counts(files: list[Path]) -> list[int]:
    """How many entries each TopK of an artifact finds."""
    if files[0].suffix == ".xml":
        nodes = openvino.Core().read_model(files[0]).get_ordered_ops()
        found = [node for node in nodes if node.get_type_name() == "TopK"]
        return [node.get_output_shape(0)[node.get_attributes()["axis"]] for node in found]
    graph = onnx.load(files[0]).graph
    values = {one.name: int(onnx.numpy_helper.to_array(one)[0]) for one in graph.initializer if list(one.dims) == [1]}
    return [values[node.input[1]] for node in graph.node if node.op_type == "TopK"]


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("dim", [1, -1, 0])
@pytest.mark.parametrize("way", ["argsort", "first", "topk", "unlike", "rest"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_only_what_is_read_is_sorted_and_ties_keep_their_order(
    target: str, way: str, dim: int, descending: bool, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    x = np.round(random.normal(size=(8, 9, 7)) * 1.5).astype(np.float32)
    x[0], x[1], x[2, 3:] = 0, -np.inf, -0.0
    model = Sorted(way, dim, descending).eval()
    exported = torch.export.export(model, (torch.from_numpy(x),), strict=False)
    expected = model(torch.from_numpy(x))
    names = [f"out{i}" for i in range(len(expected))]
    made = targets.get(target)
    files = made.lower(exported, tmp_path, "m", precision="fp32", input_names=["x"], output_names=names)
    whole = way in ("unlike", "rest")
    assert _counts(files) == [x.shape[dim] if whole else COUNT]

    order = np.argsort(-x if descending else x, axis=dim, kind="stable")
    first, last = (COUNT, x.shape[dim]) if way == "rest" else (0, COUNT + (way == "unlike"))
    indices = np.take(order, range(first, last), dim)
    values = np.take_along_axis(x, np.take(order, range(COUNT), dim), dim)
    wanted = [indices] if len(names) == 1 else [values, indices]
    found = made.load(files, threads=1).run({"x": x})
    for name, value in zip(names, wanted, strict=True):
        assert np.array_equal(found[name], value), name
