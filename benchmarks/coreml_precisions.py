"""Accuracy of the demos at every precision of the target coreml, over the whole test split, in the interpreter.

    python benchmarks/coreml_precisions.py [--compress tome:keep=0.5] [--demos digits speech] [-o table.md]

Each package is exported, saved, and run from its files on every sample. The table gives how many are right, the difference to
fp32 in points, and the size of the package. w8a8 must be within 1 point of fp32, w4a16 within 2: else the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import edgewise
from edgewise import targets
from edgewise.verify.data import accuracy

ALLOWED = {"w8a8": 0.01, "w4a16": 0.02}
"""Points of top-1 accuracy that a precision may lose."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compress", default="tome:keep=0.5")
    parser.add_argument("--demos", nargs="+", default=["digits", "speech"])
    parser.add_argument("--precisions", nargs="+", default=list(targets.get("coreml").precisions))
    parser.add_argument("-o", "--out", type=Path)
    asked = parser.parse_args()
    lines = ["| demo | precision | right | of | points to fp32 | package |", "|---|---|---|---|---|---|"]
    missed = []
    for demo in asked.demos:
        best = None
        for precision in asked.precisions:
            score, size = measured(f"demo:{demo}", precision, asked.compress)
            best = score["top1"] if best is None else best
            points = 100 * (score["top1"] - best)
            names = (f"`demo:{demo}`", f"`{precision}`")
            cells = (*names, score["correct"], score["samples"], f"{points:+.2f}", f"{size / 2**20:.2f} MiB")
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
            if best - score["top1"] > ALLOWED.get(precision, 1):
                missed.append(f"demo:{demo} at {precision}")
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.out is not None:
        asked.out.write_text(text, "utf-8")
    if missed:
        print(f"beyond what is allowed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def measured(model: str, precision: str, compress: str) -> tuple[dict[str, float], int]:
    """The accuracy over the whole test split, and the bytes of the package."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = edgewise.export(model, Path(folder) / "b", targets=["coreml"], compress=compress, precision=precision, cache=False)
        (score,) = accuracy(bundle, model)
        (artifact,) = bundle.manifest.targets
        return score, sum(bundle.manifest.files[name].bytes for name in artifact.files)


if __name__ == "__main__":
    sys.exit(main())
