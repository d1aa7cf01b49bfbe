"""Programs for tests of the target `tensorrt`: every method of the algebra on a small graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from method_graphs import Call
from torch import Tensor, nn

from edgewise import targets
from edgewise.ops import apply
from edgewise.passes.legalise import Legalise

COUNT, WIDTH = 36, 16


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attending(nn.Module):
    """A method whose attention and text are made from its input."""

    def __init__(self, method: str, known: dict[str, Any]) -> None:
        super().__init__()
        self.call: Callable[..., Any] = partial(apply, method, protected=1, **known)

    def forward(self, x: Tensor) -> Tensor:
        if self.call.args == ("trim",):
            return self.call(x, text=x[0, -2:]).tokens
        return self.call(x, queries=x, keys=x.flip(2)).tokens


ATTENDING: dict[str, dict[str, Any]] = {
    "topk": {"keep": 9},
    "fastervlm": {"keep": 9},
    "segment-topk": {"keep": 13, "segments": 5},
    "frame-topk": {"keep": 12, "frames": 6},
    "hired": {"keep": 14, "frames": 6},
    "vispruner": {"keep": 10},
    "visionzip": {"keep": 7, "context": 4},
    "frame-visionzip": {"keep": 12, "context": 1, "frames": 6},
    "prumerge": {"keep": 6, "uniform": 5, "neighbours": 8},
    "trim": {"keep": 9},
}
TEXT = {"text": draw(3, WIDTH)}
PLAIN: dict[str, dict[str, Any]] = {
    "random": {"keep": 9},
    "tome": {"r": 9},
    "tofu": {"keep": 20},
    "dpcknn": {"keep": 9},
    "text-topk": {"keep": 9, **TEXT},
    "divprune": {"keep": 9},
    "cdpruner": {"keep": 9, **TEXT},
    "evs": {"q": 0.5, "frames": 6},
    "dycoke": {"frames": 6},
    "vidcom2": {"frames": 6},
    "tome16": {"per_frame": 2, "heads": 2, "frames": 6},
    "tempme": {"keep": 12, "frames": 6},
    "framefusion": {"r": 15, "frames": 6},
    "adjacent": {"r": 7},
    "pool": {"grid": (6, 6)},
    "merge-grid": {"grid": (6, 6), "keep": 25},
    "unshuffle": {"grid": (6, 6)},
    "stack": {"factor": 5},
    "avgpool1d": {},
    "pool3d": {"grid": (4, 3, 3), "time": 3, "height": 2, "width": 2},
    "slowfast": {"grid": (4, 3, 3), "slow": 2, "fast": 2},
    "frame-pool": {"frames": 4},
}
IN_A_DECODER = ("fastv", "pyramiddrop", "sparsevlm", "dart")
WEIGHTED = ("token-learner", "resampler", "frame-resampler", "window-resampler", "conv1d")
METHODS = (*ATTENDING, *PLAIN, *IN_A_DECODER, *WEIGHTED)


def method(name: str, batch: int = 1) -> tuple[nn.Module, Tensor]:
    """A module that calls the method, and its input."""
    if name in ATTENDING:
        return Attending(name, ATTENDING[name]), draw(batch, 1 + COUNT, WIDTH, seed=batch)
    known = PLAIN.get(name, {})
    if name in IN_A_DECODER:
        known = {"keep": 9, "span": "3:30"}
        if name != "dart":
            known["attention"] = torch.rand(batch, 2, COUNT, COUNT, generator=torch.Generator().manual_seed(0))
        return Call(name, {**known, "protected": 0}), draw(batch, COUNT, WIDTH, seed=batch)
    if name == "conv1d":
        known = {"kernel": 3, "stride": 3, "weights": {"weight": draw(WIDTH, WIDTH, 3)}}
    elif name == "token-learner":
        known = {"keep": 5, "weights": {"in.weight": draw(12, WIDTH), "out.weight": draw(5, 12)}}
    elif name.endswith("resampler"):
        weights = {"queries": draw(5, 8), "k.weight": draw(8, WIDTH), "v.weight": draw(8, WIDTH, seed=6)}
        parts = {"frame-resampler": {"frames": 4, "per_frame": 5}}
        parts |= {"window-resampler": {"window": 8, "tail": "pad", "per_window": 5}}
        known = {"heads": 4, "weights": {**weights, "out.weight": draw(WIDTH, 8)}, **parts.get(name, {"keep": 5})}
    protected = 0 if name == "conv1d" else 1
    return Call(name, {**known, "protected": protected}), draw(batch, protected + COUNT, WIDTH, seed=batch)


def lowered(
    exported: torch.export.ExportedProgram, folder: Path, precision: str = "fp32", inputs: int = 1, outputs: int = 1
) -> Path:
    """The ONNX file of a program, whose compression ops are made legal first."""
    target = targets.get("tensorrt")
    names = [f"i{n}" for n in range(inputs)], [f"o{n}" for n in range(outputs)]
    legal = Legalise(target.realisations)(exported).program
    files = target.lower(legal, folder, f"m-{precision}", precision=precision, input_names=names[0], output_names=names[1])
    return files[0]
