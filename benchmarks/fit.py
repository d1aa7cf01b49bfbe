"""What fitted weights are worth: top-1 accuracy on the whole test split of the demo models, beside other methods of the same count.

    python benchmarks/fit.py
    python benchmarks/fit.py --model speech --site encoder.block[1] --keep 16
    python benchmarks/fit.py --model digits --calib train.npz

Without --calib the split is its own calibration data, in two halves: each is scored with weights that were fitted on the other (no
labels are used). `scores` is the mean squared error of the class scores against the uncompressed model, in units of their
variance. `start` are the weights before the fit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import edgewise
from edgewise import demos
from edgewise.exporter.compare import Data
from edgewise.exporter.fit import fit
from edgewise.exporter.sources import load_source
from edgewise.passes.program import Program

BATCH = 16
CASES = [("digits", "encoder.block[0]", 4), ("digits", "encoder.block[0]", 16), ("speech", "encoder.block[0]", 16),
         ("speech", "encoder.block[1]", 16)]
LEARNED = ("token-learner", "resampler")


def scores(program: Program, name: str, rows: np.ndarray) -> np.ndarray:
    (key, inputs), = demos.split(name).inputs.items()
    module, parts = program.module(), []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            chosen = rows[np.minimum(np.arange(start, start + BATCH), len(rows) - 1)]
            parts.append(module(**{key: torch.from_numpy(inputs[chosen])}).logits.numpy())
    return np.concatenate(parts)[: len(rows)]


def halves(name: str, calib: Path | None) -> Iterator[tuple[Data, np.ndarray]]:
    """Calibration data, and the rows of the split that are scored with it."""
    (key, inputs), = demos.split(name).inputs.items()
    rows = np.arange(len(inputs))
    if calib is not None:
        with np.load(calib, allow_pickle=False) as file:
            yield Data(calib.name, {key: file[key]}), rows
        return
    for half in (0, 1):
        yield Data(f"half {half} of demo:{name}", {key: inputs[half::2]}), rows[1 - half :: 2]


def case(name: str, site: str, keep: int, options: argparse.Namespace) -> None:
    source = load_source(f"demo:{name}", batch=BATCH)
    assert source.module is not None
    program = edgewise.capture(source.module, source.args, source.kwargs)
    labels = demos.split(name).labels
    rows = np.arange(len(labels))
    whole = scores(program, name, rows)

    def show(what: str, found: np.ndarray, seconds: float | None = None) -> None:
        error = float(((found - whole) ** 2).mean() / whole.var(0).mean())
        right = float((found.argmax(-1) == labels).mean())
        took = "" if seconds is None else f"{seconds:.0f} s"
        print(f"| demo:{name} | {site} | {keep} | {what} | {right:.2%} | {error:.4f} | {took} |", flush=True)

    show("uncompressed", whole)
    for method in ("random", "topk", "pool:kind=adaptive"):
        head, _, tail = method.partition(":")
        text = f"{head}@{site}:keep={keep}{',' * bool(tail)}{tail}"
        show(head, scores(edgewise.compress(program, text), name, rows))
    for method in LEARNED:
        spec = f"{method}@{site}:keep={keep}"
        fitted, start, seconds = np.zeros_like(whole), np.zeros_like(whole), 0.0
        with tempfile.TemporaryDirectory() as folder:
            for data, others in halves(name, options.calib):
                began = time.perf_counter()
                made = fit(program, [spec], data, samples=options.samples, steps=options.steps)
                seconds += time.perf_counter() - began
                for into, weights in ((start, made.start), (fitted, made.weights)):
                    file = Path(folder) / "w.safetensors"
                    save_file(weights, file)
                    into[others] = scores(edgewise.compress(program, f"{spec},weights={file}"), name, others)
        show(f"{method}, start", start)
        show(f"{method}, fitted", fitted, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=demos.names())
    parser.add_argument("--site", help="only this site; with --keep")
    parser.add_argument("--keep", type=int)
    parser.add_argument("--calib", type=Path, help="an .npz of inputs that are not in the split; with --model")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    if (options.site is None) != (options.keep is None) or (options.calib and options.model is None):
        parser.error("--site goes with --keep, and --calib with --model")
    chosen = [one for one in CASES if options.model in (None, one[0])]
    if options.site:
        chosen = [(name, options.site, options.keep) for name in dict.fromkeys(one[0] for one in chosen)]
    print("| model | site | keep | method | top-1 | scores | fit |\n|---|---|---|---|---|---|---|")
    for name, site, keep in chosen:
        case(name, site, keep, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
