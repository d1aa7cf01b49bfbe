"""Models at their published sizes for TensorRT: what compression adds to the graph, and that NVIDIA's builder takes it.

    python benchmarks/tensorrt_models.py [--family vit] [--precision fp16] [--device sm86] [SPEC ...]

Each row: nodes of the ONNX file and how many more than without compression, layers that NVIDIA's parser makes of it, seconds and
megabytes of the engine for each device, and the largest relative error in ONNX Runtime. No GPU is needed. Without SPECs: several
methods at one site and at all. The models are those of `tests/families.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import onnx
from families import build

import edgewise
from edgewise.targets.tensorrt import rtx

SPECS = ("topk@encoder.block[5]:keep=0.5", "tome@encoder.block[5]:keep=0.5", "topk:keep=0.5", "tome:keep=0.5")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--family", default="vit")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--device", action="append")
    given = parser.parse_args()
    devices = given.device or ["sm86", "sm120"]
    print(f"| {given.family}, {given.precision} | nodes | added | layers | {' | '.join(devices)} | error |")
    print("|---|---|---|---|" + "---|" * (len(devices) + 1), flush=True)
    model, inputs = build(given.family, small=False)
    alone = 0
    for spec in ("", *given.specs):
        with tempfile.TemporaryDirectory() as folder:
            bundle = edgewise.export(model, Path(folder) / "b", example=inputs, targets=["tensorrt"], compress=spec or None,
                                     precision=given.precision, cache=False)  # fmt: skip
            path = bundle.file(bundle.manifest.targets[0].files[0])
            nodes = len(onnx.load(path, load_external_data=False).graph.node)
            alone = alone or nodes
            rungs = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
            error = max(one.relative or 0.0 for one in rungs[-1].outputs.values())
            cells = []
            for device in devices:
                start = time.perf_counter()
                size = rtx.build(path, device)[0].stat().st_size
                cells.append(f"{time.perf_counter() - start:.1f} s, {size / 1e6:.0f} MB")
            row = (spec or "none", nodes, f"{nodes / alone - 1:+.1%}", rtx.parse(path), *cells, f"{error:.1e}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
