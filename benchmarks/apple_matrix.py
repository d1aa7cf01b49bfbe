"""Families and methods as Core ML packages and Core AI models: each run here, held to the program, and to each other.

    python benchmarks/apple_matrix.py [--families] [--methods] [--real] [--precision fp16] [--target coreml-ane]
                                      [--log FILE] [NAME ...]

Families are those of `tests/families.py`, small ones or, with `--real`, at their published sizes and with real weights where they
are at hand, each with `tome` and `topk`, exported whole: the ladder holds `fp32` to 1e-4 and `fp16` to 2e-2, at the same choices
where scores are too near to tell. Methods are those of `tests/tensorrt_cases.py`, each on a graph of its own in front of a linear
layer, on the first of a few inputs without such a tie. Each row: the largest relative error of each artifact, and of the second
against the first. Exits with 1 if anything failed: over its threshold, or further apart than 1e-5 (`fp32`; 1e-4 with `--real`) or
2e-2 (`fp16`).

Apple's runtime takes seconds for a run at `fp16` on a CPU: with `--log` each row is also appended to a file of JSON lines, and what
is there and passed is not run again, so that the whole may be run in pieces, by name, or be stopped and started anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pytest
import tensorrt_cases
import torch
from families import FAMILIES, build

import edgewise
from edgewise import targets
from edgewise.errors import EdgewiseError
from edgewise.exporter.half import rounded
from edgewise.exporter.identity import code_digest
from edgewise.passes.legalise import Legalise
from edgewise.verify import compare
from edgewise.verify.bundle import SAME_CHOICES

SPECS = ("tome:keep=0.5", "topk:keep=0.5")
PRECISIONS = ("fp32", "fp16")
TRIES = 8
Outputs = dict[str, dict[str, np.ndarray]]
Row = tuple[dict[str, float], float | None, str]
"""Errors against the program by target, the error of the targets against each other, and what else is to say."""


def most(precision: str, real: bool) -> float:
    return 2e-2 if precision == "fp16" else 1e-4 if real else 1e-5


def apart(results: Outputs) -> float | None:
    """The largest relative error of the second target's outputs against the first's. None: there is one target."""
    if len(results) < 2:
        return None
    first, second = list(results.values())[:2]
    return max(compare(first[name], second[name]).relative or 0.0 for name in first)


def family(name: str, spec: str, precision: str, chosen: list[str], real: bool) -> Row:
    model, inputs = build(name, not real and FAMILIES[name].small)
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = edgewise.export(
            model, Path(folder) / "b", example=inputs, targets=chosen, compress=spec, precision=precision, cache=False
        )
        errors: dict[str, float] = {}
        for rung in bundle.manifest.verification:
            if rung.kind == "lowering":
                label = rung.name.split("/")[0]
                errors[label] = max(one.relative or 0.0 for one in rung.outputs.values())
                if rung.name.endswith(SAME_CHOICES):
                    notes.append(f"{label} at the same choices")
        # On the golden inputs, of which one may be a tie between two tokens: there two right artifacts choose differently.
        feeds = bundle.golden(bundle.manifest.components[0].role).inputs
        count = len(next(iter(feeds.values())))
        results: list[Outputs] = [{} for _ in range(count)]
        for target in chosen:
            with edgewise.load(bundle, target=target) as session:
                for place, one in enumerate(results):
                    one[target] = session.run({info.name: feeds[info.name][place] for info in session.inputs})
    found = [between for one in results if (between := apart(one)) is not None]
    if found and max(found) > most(precision, real):
        notes.append(f"a tie on {sum(one > most(precision, real) for one in found)} of {count} inputs")
    return errors, min(found, default=None), ", ".join(notes)


def method(name: str, _: str, precision: str, chosen: list[str], real: bool) -> Row:
    model, x = tensorrt_cases.headed(name)
    exported = torch.export.export(model, (x,), strict=False)
    exported = rounded(exported) if precision == "fp16" else exported
    wanted = exported.module()
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(map(targets.get, chosen)):
            legal = Legalise(one.realisations)(exported).program
            files = one.lower(
                legal, Path(folder) / str(number), "m", precision=precision, input_names=["x"], output_names=["y"]
            )
            sessions[one.name] = one.load(files)
        for tried in range(1, TRIES + 1):
            expected = wanted(x).detach().numpy()
            results = {target: session.run({"x": x.numpy()}) for target, session in sessions.items()}
            errors = {target: compare(expected, one["y"]).relative or 0.0 for target, one in results.items()}
            if max(errors.values()) <= most(precision, False):
                break
            x = tensorrt_cases.draw(*x.shape, seed=100 + tried).half().float()
        for session in sessions.values():
            session.close()
    if max(errors.values()) > most(precision, False):
        raise EdgewiseError(f"on each of {tried} inputs; of the last: {errors}")
    return errors, apart(results), f"input {tried}" if tried > 1 else ""


Make = Callable[[str, str, str, list[str], bool], Row]


def rows(given: argparse.Namespace) -> Iterator[tuple[Make, str, str]]:
    both = given.families == given.methods
    if given.methods or both:
        yield from ((method, name, "") for name in tensorrt_cases.METHODS if not given.names or name in given.names)
    if given.families or both:
        for name, one in FAMILIES.items():
            if one.refused is None and (not given.names or name in given.names):
                yield from ((family, name, spec) for spec in SPECS)


def logged(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows that were done before, by what they are of; the last one of each. A row that a run left half-written was not done."""
    if path is None or not path.exists():
        return {}
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")  # the next row begins a line
    return {row["of"]: row for row in map(json.loads, whole.splitlines())}


def measured(make: Make, name: str, spec: str, precision: str, chosen: list[str], real: bool) -> tuple[list[str], bool]:
    """The cells of a row, and whether it failed. Raises what `pytest.skip` does where a folder of weights is missing."""
    torch.manual_seed(0)
    start = time.perf_counter()
    cells = ["-"] * (len(chosen) + 1)
    failed = True
    try:
        errors, between, note = make(name, spec, precision, chosen, real)
        cells = [f"{errors[target]:.1e}" for target in chosen] + ["-" if between is None else f"{between:.1e}"]
        # Two artifacts that chose other tokens than each other are both right, where each was held to its own choices.
        failed = "same choices" not in note and max(between or 0.0, *errors.values()) > most(precision, real)
    except Exception as error:  # one row that fails, for whatever reason, is told, and the others are run
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return [name, spec, precision, *cells, f"{time.perf_counter() - start:.0f}", ("failed: " if failed else "") + note], failed


def main() -> int:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--real", action="store_true", help="families at their published sizes")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--target", action="append", help="default: coreml and coreai; the first two are compared")
    parser.add_argument("--log", type=Path, help="JSON lines: rows are appended, and those that passed are not run again")
    given = parser.parse_args()
    chosen = given.target or ["coreml", "coreai"]
    print(f"| program | compression | precision | {' | '.join(chosen)} | apart | seconds | |")
    print("|---" * (6 + len(chosen)) + "|", flush=True)
    known = logged(given.log)
    done = bad = 0
    for make, name, spec in rows(given):
        for precision in given.precision or PRECISIONS:
            of = " ".join([make.__name__, name, spec, precision, *chosen, *["real"] * given.real, code_digest()[:12]])
            row = known.get(of)
            if row is None or row["failed"]:
                try:
                    cells, failed = measured(make, name, spec, precision, chosen, given.real)
                except pytest.skip.Exception as error:
                    print(f"| {name} | | | {error} |", flush=True)
                    break
                row = {"of": of, "cells": cells, "failed": failed}
                if given.log is not None:
                    with open(given.log, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            done, bad = done + 1, bad + row["failed"]
            print("| " + " | ".join(row["cells"]) + " |", flush=True)
    print(f"{done} programs on {', '.join(chosen)}: {bad} failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
