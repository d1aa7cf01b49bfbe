"""Models at their published sizes for TensorRT: what compression adds to the graph, and that NVIDIA's builder takes it.

    python benchmarks/tensorrt_models.py [--family vit] [--precision fp16] [--device sm86] [--unverified] [SPEC ...]
    python benchmarks/tensorrt_models.py --family dinov2 --family whisper --weights FOLDER tome:keep=0.5

Each row: nodes of the ONNX file and how many more than without compression, layers that NVIDIA's parser makes of it, seconds and
megabytes of the engine for each device, and the largest relative error in ONNX Runtime. No GPU is needed. Without SPECs: several
methods at one site and at all. `--unverified` lowers and builds alone, which takes a quarter of the time and leaves out the error.
The models are those of `tests/families.py`; `dinov2` (S/14), `whisper` (tiny.en) and `kwt1` have the weights that `--weights` holds
(folders `dinov2_small_saliency`, `whisper_tiny_en`, `kwt1`) and are left out where it does not, the others random ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families
import onnx
import pytest

import edgewise
from edgewise.exporter.half import rounded
from edgewise.passes.legalise import Legalise
from edgewise.targets import get
from edgewise.targets.tensorrt import rtx

SPECS = ("topk@encoder.block[5]:keep=0.5", "tome@encoder.block[5]:keep=0.5", "topk:keep=0.5", "tome:keep=0.5")


def exported(model, inputs, spec: str, precision: str, place: Path) -> tuple[Path, str]:
    """The artifact of an export, and the error that its ladder found."""
    bundle = edgewise.export(model, place, example=inputs, targets=["tensorrt"], compress=spec or None, precision=precision,
                             cache=False)  # fmt: skip
    rungs = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    error = max(one.relative or 0.0 for one in rungs[-1].outputs.values())
    return bundle.file(bundle.manifest.targets[0].files[0]), f"{error:.1e}"


def lowered(model, inputs, spec: str, precision: str, place: Path) -> tuple[Path, str]:
    """The artifact alone."""
    target = get("tensorrt")
    program = edgewise.capture(model, *(((), inputs) if isinstance(inputs, dict) else (inputs,)))
    program = edgewise.compress(program, *([spec] if spec else []))
    legal = Legalise(target.realisations)(rounded(program.exported) if precision == "fp16" else program.exported).program
    place.mkdir()
    names = {"input_names": list(program.inputs), "output_names": list(program.output_names)}
    return target.lower(legal, place, "model", precision=precision, **names)[0], "-"


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--family", action="append")
    parser.add_argument("--weights", type=Path, default=families.SHARED / "models")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--device", action="append")
    parser.add_argument("--unverified", action="store_true")
    given = parser.parse_args()
    devices = given.device or ["sm86", "sm120"]
    families.SHARED = given.weights.resolve().parent
    assert (families.SHARED / "models").resolve() == given.weights.resolve(), "--weights is a folder called `models`"
    for family in given.family or ["vit"]:
        try:
            model, inputs = families.build(family, small=False)
        except pytest.skip.Exception as error:  # a folder of weights is missing
            print(f"{family} is left out: {error}\n", flush=True)
            continue
        table(family, model, inputs, given, devices)


def table(family: str, model, inputs, given: argparse.Namespace, devices: list[str]) -> None:
    print(f"| {family}, {given.precision} | nodes | added | layers | {' | '.join(devices)} | error |")
    print("|---|---|---|---|" + "---|" * (len(devices) + 1), flush=True)
    alone = 0
    for spec in ("", *given.specs):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "b"
            make = lowered if given.unverified else exported
            try:
                path, error = make(model, inputs, spec, given.precision, place)
            except edgewise.errors.Refused as refusal:
                print(f"| {spec} | refused: {str(refusal).split(': ')[1].split('. ')[0]} |", flush=True)
                continue
            nodes = len(onnx.load(path, load_external_data=False).graph.node)
            alone = alone or nodes
            cells = []
            for device in devices:
                start = time.perf_counter()
                size = rtx.build(path, device)[0].stat().st_size
                cells.append(f"{time.perf_counter() - start:.1f} s, {size / 1e6:.0f} MB")
            row = (spec or "none", nodes, f"{nodes / alone - 1:+.1%}", rtx.parse(path), *cells, error)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(flush=True)


if __name__ == "__main__":
    main()
