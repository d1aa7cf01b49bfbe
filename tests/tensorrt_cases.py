"""Programs for tests of the target `tensorrt`: every method of the algebra on a small graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from method_graphs import Call
from torch import Tensor, nn

from edgewise import targets
from edgewise.exporter.half import rounded
from edgewise.ops import apply
from edgewise.passes.legalise import Legalise
from edgewise.targets.tensorrt import engine, rtx
from edgewise.verify.metrics import compare

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


class Headed(nn.Module):
    """A method, and a linear layer behind it: what can be quantised, while nothing rounds what the method chooses by."""

    def __init__(self, inner: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(inner(x).shape[-1], 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def headed(name: str) -> tuple[nn.Module, Tensor]:
    """A method in front of a layer, and its input, whose numbers half precision holds."""
    torch.manual_seed(0)
    model, x = method(name)
    x = x.half().float()
    return Headed(model, x).eval().requires_grad_(False), x


LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "w8a8": 5e-2}


def measured(model: nn.Module, x: Tensor, precision: str, folder: Path) -> tuple[Path, float]:
    """The file of a model, and its relative error in ONNX Runtime, which is within `LIMITS`."""
    target = targets.get("tensorrt")
    exported = rounded(torch.export.export(model, (x,), strict=False))
    path = lowered(exported, folder, "fp32" if precision == "fp32" else "fp16")
    if precision == "w8a8":
        quantiser = target.quantiser([path], precision, [{"i0": x.numpy()}])  # type: ignore[arg-type]
        assert quantiser.layers
        (path,) = target.finish(quantiser.write(folder / "q", "m"))
    with target.load([path], threads=1) as session:
        errors = compare(exported.module()(x).numpy(), session.run({"i0": x.numpy()})["o0"])
    assert errors.finite and errors.relative is not None and errors.relative <= LIMITS[precision], (precision, errors)
    return path, errors.relative


def built(path: Path, devices: tuple[str, ...] = ("sm86", "sm120")) -> int:
    """Bytes of the engine of a file that is for several devices, in the time of one."""
    trt = rtx.package()
    network = engine.parse(trt, path)
    config = network.builder.create_builder_config()
    config.num_compute_capabilities = len(devices)
    for place, device in enumerate(devices):
        config.set_compute_capability(getattr(trt.ComputeCapability, device.upper()), place)
    return len(engine.build(network, config, f"{path.name} for {', '.join(devices)}"))


def one_of_each(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The inputs of a family with one sample each, and several samples to calibrate with."""
    single = {name: value[:1] for name, value in inputs.items()}
    return single, {name: value.numpy().repeat(3, axis=0) for name, value in single.items()}


def lowered(
    exported: torch.export.ExportedProgram, folder: Path, precision: str = "fp32", inputs: int = 1, outputs: int = 1
) -> Path:
    """The ONNX file of a program, whose compression ops are made legal first."""
    target = targets.get("tensorrt")
    names = [f"i{n}" for n in range(inputs)], [f"o{n}" for n in range(outputs)]
    legal = Legalise(target.realisations)(exported).program
    files = target.lower(legal, folder, f"m-{precision}", precision=precision, input_names=names[0], output_names=names[1])
    return files[0]
