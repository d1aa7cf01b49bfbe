"""What the benchmark runner adds to a time, and whether it agrees with OpenVINO's own `benchmark_app`.

    python benchmarks/bench_overhead.py [BUNDLE] [--rounds 5]

Without BUNDLE, `demo:digits` is exported with most of its tokens dropped, so that one inference takes about a millisecond.

1. The median of `edgewise.bench` against that of a bare loop over the runtime's own call, in the same process, in turn.
2. The median of `edgewise.bench` against that of `benchmark_app` on the same IR, each a process of its own, in turn.

The lower of neighbouring noise is taken by ratios of medians of interleaved samples (1), and by the median over rounds of the ratio
(2). Needs the extras `export` and `openvino`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import edgewise
from edgewise.bench.probe import own_environment
from edgewise.bench.statistics import ratio_of_medians
from edgewise.bundle import Bundle
from edgewise.targets import choose, load


def overhead(bundle: Bundle, samples: int) -> None:
    """Ratios of `Session.run`, timed as the runner does, to the bare call of the runtime."""
    for artifact in choose(bundle):
        with load(bundle, artifact, threads=1) as session:
            feeds = bundle.golden(artifact.role).feeds(0)
            bare = _bare(artifact.target, session, feeds)
            if bare is None:
                continue
            times: tuple[list[float], list[float]] = ([], [])
            for call in (lambda: session.run(feeds), bare):  # noqa: B023 - called before the next turn
                for _ in range(20):
                    call()
            for number in range(samples):
                # Who goes first changes, as the second finds its data in the caches.
                order = (0, 1) if number % 2 else (1, 0)
                for which in order:
                    start = time.perf_counter()
                    if which == 0:
                        session.run(feeds)
                    else:
                        bare()
                    times[which].append(time.perf_counter() - start)
        ratio, interval = ratio_of_medians(*times)
        print(
            f"{artifact.label}: bench {np.median(times[0]) * 1e3:.4f} ms, bare {np.median(times[1]) * 1e3:.4f} ms, "
            f"ratio {ratio:.4f} ({interval.low:.4f} to {interval.high:.4f}), {samples} samples of each"
        )


def _bare(target: str, session: object, feeds: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    """The runtime's own call, on the same loaded model."""
    if target == "openvino":
        request, values = session._request, list(feeds.values())  # type: ignore[attr-defined]
        return lambda: request.infer(values, share_inputs=True)
    if target == "onnxruntime":
        inner = session._session  # type: ignore[attr-defined]
        return lambda: inner.run(None, feeds)
    return None


def agreement(bundle: Bundle, rounds: int, seconds: float) -> None:
    """Ratios of the runner's median to that of `benchmark_app`, with the same threads, precision and hint."""
    (artifact,) = choose(bundle, ["openvino"])
    program = shutil.which("benchmark_app") or str(Path(sys.executable).with_name("benchmark_app"))
    model = bundle.file(artifact.files[0])
    ratios, medians = [], []
    for number in range(rounds):
        pair = [
            lambda: _ours(bundle, seconds),
            lambda: _theirs(program, model, seconds),
        ]
        ours, theirs = (pair[0](), pair[1]()) if number % 2 else (pair[1](), pair[0]())[::-1]
        ratios.append(ours / theirs)
        medians.append((ours, theirs))
        print(f"  round {number}: bench {ours:.3f} ms, benchmark_app {theirs:.3f} ms, ratio {ours / theirs:.4f}")
    least = np.min(medians, axis=0)
    print(
        f"{artifact.label}: bench / benchmark_app over {rounds} rounds: median of the ratios {np.median(ratios):.4f}, "
        f"ratio of the least medians {least[0] / least[1]:.4f}"
    )


def _ours(bundle: Bundle, seconds: float) -> float:
    command = [
        sys.executable,
        "-m",
        "edgewise.cli",
        "bench",
        str(bundle.path),
        "--target",
        "openvino",
        "--threads",
        "1",
    ]
    command += ["--seconds", str(seconds), "--no-cold", "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own_environment())
    return float(json.loads(done.stdout)["measurements"][0]["latency"]["p50_ms"])


def _theirs(program: str, model: Path, seconds: float) -> float:
    command = [
        program,
        "-m",
        str(model),
        "-d",
        "CPU",
        "-hint",
        "none",
        "-api",
        "sync",
        "-t",
        str(max(1, round(seconds))),
    ]
    command += ["-infer_precision", "f32", "-nthreads", "1", "-nireq", "1", "-nstreams", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Median:\s+([\d.]+) (ms|us)", done.stdout)
    assert found, done.stdout
    return float(found.group(1)) / (1000 if found.group(2) == "us" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.bundle is None:
            where = Path(folder) / "bundle"
            edgewise.export(
                "demo:digits", where, targets=["openvino", "onnxruntime"], compress="topk@encoder.block[0]:keep=8"
            )
            bundle = Bundle.open(where)
        else:
            bundle = Bundle.open(given.bundle)
        overhead(bundle, given.samples)
        agreement(bundle, given.rounds, given.seconds)


if __name__ == "__main__":
    main()
