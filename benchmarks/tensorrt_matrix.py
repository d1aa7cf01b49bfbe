"""Everything that TensorRT is promised to take, exported, checked, run, parsed and built: families and methods at every precision.

    python benchmarks/tensorrt_matrix.py [--families] [--methods] [--precision w8a8] [--device sm86] [NAME ...]

Families are small ones of `tests/families.py`, each with `tome` and `topk`; methods are those of `tests/tensorrt_cases.py`, each on
a graph of its own in front of a linear layer. Each row: nodes of the file, layers that NVIDIA's parser makes of it, the largest
relative error in ONNX Runtime, seconds of the build for each device, and what failed. Exits with 1 if anything did. The error is
the one that the ladder holds to a threshold (`fp32` 1e-4, `fp16` 1e-2), against the program. At `w8a8` the half-precision file is
held to its own first, and the error of a family is that of 8 bits, which has no threshold: weights are random, and other tokens
are chosen. No GPU is needed; the extra `tensorrt-rtx` is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import onnx
import pytest
import tensorrt_cases
import torch
from families import FAMILIES, build

import edgewise
from edgewise import targets
from edgewise.errors import EdgewiseError
from edgewise.targets.tensorrt import rtx

PRECISIONS = ("fp32", "fp16", "w8a8")
SPECS = ("tome:keep=0.5", "topk:keep=0.5")
Made = tuple[Path, float]
"""A file, and its largest relative error."""
Make = Callable[[str, str, str, Path], Made]


def family(name: str, spec: str, precision: str, folder: Path) -> Made:
    """A family by a whole export, whose ladder raises what is over its threshold."""
    one = FAMILIES[name]
    model, inputs = build(name, one.small)
    given = {}
    if precision == "w8a8":
        inputs, given["calibration"] = tensorrt_cases.one_of_each(inputs)
    bundle = edgewise.export(model, folder / "b", example=inputs, targets=["tensorrt"], compress=spec, precision=precision,
                             cache=False, **given)  # fmt: skip
    kind = "quantisation" if precision == "w8a8" else "lowering"
    (*_, rung) = (rung for rung in bundle.manifest.verification if rung.kind == kind)
    return bundle.file(bundle.manifest.targets[0].files[0]), max(one.relative or 0.0 for one in rung.outputs.values())


def method(name: str, _: str, precision: str, folder: Path) -> Made:
    """A method in front of a layer, so that there is something to quantise and choices do not hang on it."""
    model, x = tensorrt_cases.headed(name)
    return tensorrt_cases.measured(model, x, precision, folder)


def attempt(make: Make, name: str, spec: str, precision: str, devices: list[str]) -> tuple[str, bool]:
    """One row, and whether all went well."""
    cells: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, error = make(name, spec, precision, Path(folder))
            onnx.checker.check_model(str(path), full_check=True)
            cells = [str(len(onnx.load(path).graph.node)), str(rtx.parse(path)), f"{error:.1e}"]
            for device in devices:
                start = time.perf_counter()
                rtx.build(path, device)
                cells.append(f"{time.perf_counter() - start:.1f} s")
            failed = ""
        except (EdgewiseError, AssertionError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    cells += ["-"] * (3 + len(devices) - len(cells))
    return "| " + " | ".join((name, spec, precision, *cells, failed)) + " |", not failed


def rows(given: argparse.Namespace) -> Iterable[tuple[Make, str, str]]:
    both = given.families == given.methods
    if given.families or both:
        for name, one in FAMILIES.items():
            if one.refused is None and (not given.names or name in given.names):
                yield from ((family, name, spec) for spec in SPECS)
    if given.methods or both:
        yield from ((method, name, "") for name in tensorrt_cases.METHODS if not given.names or name in given.names)


def main() -> int:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--device", action="append")
    given = parser.parse_args()
    devices = given.device or ["sm86", "sm120"]
    print(f"| program | compression | precision | nodes | layers | error | {' | '.join(devices)} | failed |")
    print("|---|---|---|---|---|---|" + "---|" * (len(devices) + 1), flush=True)
    done, bad = 0, 0
    for make, name, spec in rows(given):
        for precision in given.precision or PRECISIONS:
            try:
                text, well = attempt(make, name, spec, precision, devices)
            except pytest.skip.Exception as error:  # a folder of weights is missing
                print(f"| {name} | | | {error} |", flush=True)
                break
            done, bad = done + 1, bad + (not well)
            print(text, flush=True)
    print(f"{done} files, {targets.get('tensorrt').versions()[rtx.BINDINGS.package]}: {bad} failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
