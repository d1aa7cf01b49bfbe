"""What 8 bits cost the demo models on TensorRT: accuracy over the whole test split in ONNX Runtime, bytes, and engines.

    python benchmarks/tensorrt_demos.py [--compress tome:keep=0.5] [--device sm86] [DEMO ...]

Each row: correct samples at `fp32` and at `w8a8`, bytes of both files and their ratio, megabytes of the engine for each device. The
engines are built with the extra `tensorrt-rtx`; no GPU is needed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import edgewise
from edgewise.targets.tensorrt import rtx
from edgewise.verify.data import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", nargs="*", default=["digits", "speech"])
    parser.add_argument("--compress", default="tome:keep=0.5")
    parser.add_argument("--device", action="append")
    given = parser.parse_args()
    devices = given.device or ["sm86", "sm120"]
    print(f"| demo, `{given.compress}` | samples | `fp32` | `w8a8` | bytes | bytes | share | {' | '.join(devices)} |")
    print("|---|---|---|---|---|---|---|" + "---|" * len(devices), flush=True)
    for name in given.demos:
        with tempfile.TemporaryDirectory() as folder:
            paths, scores = [], []
            for precision in ("fp32", "w8a8"):
                bundle = edgewise.export(f"demo:{name}", Path(folder) / precision, targets=["tensorrt"], compress=given.compress,
                                         precision=precision, cache=False)  # fmt: skip
                paths.append(bundle.file(bundle.manifest.targets[0].files[0]))
                scores.append(accuracy(bundle, f"demo:{name}")[0])
            sizes = [path.stat().st_size for path in paths]
            engines = [f"{rtx.build(paths[1], device)[0].stat().st_size / 1e6:.1f} MB" for device in devices]
        right = [f"{one['top1']:.2%}" for one in scores]
        row = (name, scores[0]["samples"], *right, *sizes, f"{sizes[1] / sizes[0]:.1%}", *engines)
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
