"""Every known family at its published size, exported to both targets: the errors of the artifacts against the compressed program.

    python benchmarks/families.py [NAME ...] [--compress tome:keep=0.5] [--compress topk:keep=0.5]
    python benchmarks/families.py --small --target coreml

The families are those of `tests/families.py`; real weights are used where they are at hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytest
import torch
from families import FAMILIES, build

import edgewise
from edgewise.verify.bundle import SAME_CHOICES


def row(name: str, spec: str, targets: list[str], small: bool = False) -> str:
    """One line of the table: tokens, and the largest relative error of each target's artifact."""
    model, inputs = build(name, small)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            bundle = edgewise.export(
                model, Path(folder) / "b", example=inputs, targets=targets, compress=spec, cache=False
            )
    except edgewise.EdgewiseError as error:
        return f"| {name} | {spec} | | {type(error).__name__}: {str(error).splitlines()[0]} |"
    manifest = bundle.manifest
    errors = {}
    for rung in manifest.verification:
        if rung.kind in ("lowering", "capture"):
            label = rung.name.split("/")[0] + (" at the same choices" if rung.name.endswith(SAME_CHOICES) else "")
            errors[label] = max(e.relative or 0.0 for e in rung.outputs.values())
    sites = manifest.components[0].sites
    figures = ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
    return (
        f"| {name} | {spec} | {sites[0].tokens_in} -> {sites[-1].tokens_out} | {figures} "
        f"({time.perf_counter() - start:.0f} s) |"
    )


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--compress", action="append")
    parser.add_argument("--target", action="append")
    parser.add_argument("--small", action="store_true", help="small variants, as the tests have them")
    options = parser.parse_args()
    print("| family | compression | tokens | largest relative error |\n|---|---|---|---|", flush=True)
    names = [name for name, one in FAMILIES.items() if one.refused is None and (one.small or not options.small)]
    for name in options.names or (names if options.small else list(FAMILIES)):
        for spec in options.compress or ["tome:keep=0.5", "topk:keep=0.5"]:
            try:
                print(row(name, spec, options.target or ["openvino", "onnxruntime"], options.small), flush=True)
            except pytest.skip.Exception as error:  # a folder of weights is missing
                print(f"| {name} | | | {error} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
