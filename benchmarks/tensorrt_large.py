"""A model beyond 2 GB for TensorRT: its weights go to a file of their own, and NVIDIA's parser and builder read both.

    python benchmarks/tensorrt_large.py [--gigabytes 2.2] [--precision fp32] [--device sm86] [FOLDER]

Prints the bytes of both files, the relative error in ONNX Runtime, layers, seconds and bytes of the engine, and what is said
when the file of weights is not there. Takes some eight times the size in memory and four times in FOLDER. The limit of the suite's
tests is lower (`edgewise.targets.onnx.lower.EXTERNAL_ABOVE`); this is the real one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import edgewise
from edgewise.errors import InputError
from edgewise.targets import get
from edgewise.targets.tensorrt import rtx
from edgewise.verify.metrics import compare

WIDTH = 4096


class Large(nn.Module):
    """Layers in a row, each of 64 MB in single precision."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--device", default="sm86")
    given = parser.parse_args()
    target, x = get("tensorrt"), torch.rand(1, WIDTH)
    size = WIDTH * WIDTH * (4 if given.precision == "fp32" else 2)
    torch.manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = Large(-int(-given.gigabytes * 1e9 // size)).eval()
        program = edgewise.capture(model, (x,))
        names = {"input_names": list(program.inputs), "output_names": list(program.output_names)}
        start = time.perf_counter()
        files = target.lower(program.exported, Path(folder), "large", precision=given.precision, **names)
        print(f"written and parsed in {time.perf_counter() - start:.0f} s:", {one.name: one.stat().st_size for one in files})
        with target.load(files, threads=1) as session:
            found = session.run({names["input_names"][0]: x.numpy()})
        print("relative error in ONNX Runtime:", compare(model(x).numpy(), found[names["output_names"][0]]).relative)
        del model, program, session
        print("layers:", rtx.parse(files[0]), flush=True)
        start = time.perf_counter()
        engine = rtx.build(files[0], given.device)[0]
        print(f"built for {given.device} in {time.perf_counter() - start:.0f} s: {engine.stat().st_size} bytes")
        files[1].unlink()
        try:
            rtx.parse(files[0])
        except InputError as error:
            print(f"without {files[1].name}: {error}")


if __name__ == "__main__":
    main()
