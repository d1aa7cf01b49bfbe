"""No graph that is lowered has a shape that depends on data: the rule, and every method under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewise import targets
from edgewise.ops import METHODS, apply
from edgewise.passes.legalise import Legalise
from edgewise.passes.lint import data_dependent
from edgewise.passes.realisations import REALISATIONS

BAD: dict[str, Any] = {
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index": lambda x: x[x > 0],
    "mask_of_rows": lambda x: x[:, x[0] > 0],
    "index_put": lambda x: torch.index_put(x, (x > 0,), torch.zeros(())),
    "unique": lambda x: x.unique(),
    "scatter_reduce": lambda x: x.scatter_reduce(1, x.long() * 0, x, "amax"),
    "repeat": lambda x: x[0].repeat_interleave(x[0].long() * 0 + 1),
    "item": lambda x: x * x.sum().item(),
}
GOOD: dict[str, Any] = {
    "where": lambda x: torch.where(x > 0, x, 0),
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "index": lambda x: x[:, torch.tensor([0, 2])],
    "repeat": lambda x: x.repeat_interleave(2, dim=0),
    "scatter_add": lambda x: x.scatter_add(1, x.long() * 0, x),
}


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def exported(function: Any, *tensors: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(Calls(function), tensors, strict=False)


@pytest.mark.parametrize("name", BAD)
def test_what_depends_on_data_is_named(name: str) -> None:
    program = exported(BAD[name], torch.rand(3, 4))
    found = data_dependent(program)
    assert found and all("test_lint.py" in line for line in found), found
    assert all(set(found) <= set(targets.get(target).lint(program)) for target in targets.names())
    assert data_dependent(program, ours=True) == []  # it is the model's own


def test_no_realisation_may_depend_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(score: Tensor, keep: int, protected: int) -> Tensor:
        best = torch.ops.edgewise.top_tokens(score, keep, protected)
        return best.scatter_reduce(1, best * 0, best, "amax")

    program = exported(lambda x: torch.ops.edgewise.top_tokens(x, 2, 0), torch.rand(3, 4))
    monkeypatch.setitem(REALISATIONS["top_tokens"], "loop", bad)
    with pytest.raises(AssertionError, match=r"static shapes: .* it scatters with a reduction"):
        Legalise({"top_tokens": ("loop",)})(program)


@pytest.mark.parametrize("name", GOOD)
def test_what_does_not_is_not(name: str) -> None:
    assert data_dependent(exported(GOOD[name], torch.rand(3, 4))) == []


# -- every method

GRID = (4, 6, 6)
COUNT = 144
KEEPS: dict[str, Any] = {
    "pool": {"stride": 2},
    "merge-grid": {"side": 3},
    "unshuffle": {"factor": 2},
    "stack": {"factor": 3},
    "avgpool1d": {"kernel": 2, "stride": 2},
    "conv1d": {"kernel": 3, "stride": 2},
    "token-learner": {"keep": 5},
    "resampler": {"keep": 5},
    "frame-resampler": {"per_frame": 3},
    "window-resampler": {"per_window": 2, "tail": "pad"},
    "pool3d": {"time": 2, "height": 3, "width": 3},
    "slowfast": {},
    "frame-pool": {},
    "evs": {"q": 0.5},
    "dycoke": {},
    "vidcom2": {"keep": 40},
    "tome16": {},
    "divprune": {"keep": 20},
    "cdpruner": {"keep": 20},
    "hired": {"keep": 40},
    "frame-topk": {"keep": 40},
    "frame-visionzip": {"keep": 40},
    "segment-topk": {"keep": 40},
}
"""Parameters that give a legal count, where three quarters of the tokens are none."""
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "conv1d": {"weight": (8, 8, 3)},
    "token-learner": {"out.weight": (5, 8)},
    "resampler": {"queries": (5, 8), "k.weight": (8, 8), "v.weight": (8, 8), "out.weight": (8, 8)},
}
for name, queries in (("frame-resampler", 3), ("window-resampler", 2)):
    WEIGHTS[name] = {**WEIGHTS["resampler"], "queries": (queries, 8)}


def arguments(name: str) -> dict[str, Any]:
    """What a method is called with, besides tokens, queries and keys."""
    entry = METHODS[name]
    known: dict[str, Any] = dict(KEEPS.get(name, {"keep": 0.75}))
    if "text" in entry.needs:
        known["text"] = torch.rand(3, 8)
    if {"grid", "frames"} & set(entry.needs):
        known["grid"] = GRID
    if "decoder" in entry.sites:
        known["span"] = f"4:{COUNT - 8}"
    return known


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_depends_on_data(name: str) -> None:
    entry, known = METHODS[name], arguments(name)
    x, keys = torch.rand(2, COUNT, 8), torch.rand(2, COUNT, 8)
    if name in WEIGHTS:
        known |= {"weights": {key: torch.rand(shape) for key, shape in WEIGHTS[name].items()}}

    def call(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        needed = {"queries": q, "keys": k} if {"queries", "attention"} & set(entry.needs) else {}
        return apply(name, x, **needed, **known).tokens

    program = exported(call, x, keys.flip(1), keys)
    for realised in ("topk", "sort_free"):
        legal = Legalise({op: (realised, "scatter") for op in REALISATIONS})(program).program
        assert data_dependent(legal) == []
    for target in targets.names():
        assert data_dependent(Legalise(targets.get(target).realisations)(program).program) == []
