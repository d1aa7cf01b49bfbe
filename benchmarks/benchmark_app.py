"""Whether `edgewise bench` agrees with OpenVINO's own `benchmark_app`, on the same IR.

    python benchmarks/benchmark_app.py [BUNDLE] [--rounds 9] [--seconds 4]

Without BUNDLE, `demo:digits` is exported so that one inference takes about a millisecond, and whole. Each is a process
of its own, in turn, with one thread, one stream, single precision and synchronous calls. Printed are, over the rounds,
the median of the ratios of the medians, the ratio of the least medians, and the ratio of the least times.
`benchmark_app` times a loop that sets no inputs and reads no outputs. Needs the extras `export` and `openvino`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import edgewise
from edgewise.bench.probe import own_environment
from edgewise.bundle import Bundle
from edgewise.targets import choose


def agreement(bundle: Bundle, rounds: int, seconds: float) -> None:
    """Ratios of the runner's times to those of `benchmark_app`, with the same threads, precision and hint."""
    (artifact,) = choose(bundle, ["openvino"])
    program = shutil.which("benchmark_app") or str(Path(sys.executable).with_name("benchmark_app"))
    model = bundle.file(artifact.files[0])
    pairs = []
    for number in range(rounds):
        if number % 2:
            ours, theirs = _ours(bundle, seconds), _theirs(program, model, seconds)
        else:
            theirs, ours = _theirs(program, model, seconds), _ours(bundle, seconds)
        pairs.append((*ours, *theirs))
        times = f"bench {ours[0]:.3f} ms, benchmark_app {theirs[0]:.3f} ms"
        print(f"  round {number}: {times}, ratio {ours[0] / theirs[0]:.4f}", flush=True)
    ratios = [ours / theirs for ours, _, theirs, _ in pairs]
    least = np.min(pairs, axis=0)
    print(
        f"{bundle.path.name} {artifact.label}: bench / benchmark_app over {rounds} rounds: "
        f"median of the ratios {np.median(ratios):.4f}, "
        f"ratio of the least medians {least[0] / least[2]:.4f}, of the least times {least[1] / least[3]:.4f}",
        flush=True,
    )


def _ours(bundle: Bundle, seconds: float) -> tuple[float, float]:
    """Median and least time in milliseconds."""
    command = [sys.executable, "-m", "edgewise.cli", "bench", str(bundle.path), "--target", "openvino", "--threads", "1"]
    command += ["--seconds", str(seconds), "--no-cold", "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own_environment())
    latency = json.loads(done.stdout)["measurements"][0]["latency"]
    return float(latency["p50_ms"]), float(latency["min_ms"])


def _theirs(program: str, model: Path, seconds: float) -> tuple[float, float]:
    command = [program, "-m", str(model), "-d", "CPU", "-hint", "none", "-api", "sync", "-t", str(max(1, round(seconds)))]
    command += ["-infer_precision", "f32", "-nthreads", "1", "-nireq", "1", "-nstreams", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return _said("Median", done.stdout), _said("Min", done.stdout)


def _said(name: str, text: str) -> float:
    found = re.search(rf"{name}:\s+([\d.]+) (ms|us)", text)
    assert found, text
    return float(found.group(1)) / (1000 if found.group(2) == "us" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.bundle is not None:
            agreement(Bundle.open(given.bundle), given.rounds, given.seconds)
            return
        for name, compress in (("millisecond", "topk@encoder.block[0]:keep=24"), ("whole", None)):
            bundle = edgewise.export("demo:digits", Path(folder) / name, targets=["openvino"], compress=compress)
            agreement(bundle, given.rounds, given.seconds)


if __name__ == "__main__":
    main()
