"""What the benchmark runner adds to a time.

    python benchmarks/bench_overhead.py [BUNDLE] [--samples 4000]

Without BUNDLE, `demo:digits` is exported with most of its tokens dropped, so that one inference takes about a
millisecond. A sample as the runner takes it (`edgewise bench`: sensors, its clock, the session) against the runtime's
own call in the same process, on the same loaded model: OpenVINO's request with its inputs in place and its outputs not
copied, `run` of ONNX Runtime's session. In turn, in an order that changes; medians, minimums, and the ratio of the
medians with its interval. Needs the extras `export`, `openvino`, `onnxruntime`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import edgewise
from edgewise.bench import sensors
from edgewise.bench.runner import _Run
from edgewise.bench.statistics import ratio_of_medians
from edgewise.bundle import Bundle
from edgewise.targets import choose, load


def overhead(bundle: Bundle, samples: int) -> None:
    sensor, _ = sensors.power()
    for artifact in choose(bundle):
        with load(bundle, artifact, threads=1) as session:
            golden = bundle.golden(artifact.role)
            bare = _bare(artifact.target, session, golden.feeds(0))
            if bare is None:
                continue
            run = _Run(bundle, artifact, session, golden, 0.0, sensors.Power(sensor))
            times = list[float]()

            def alone(bare: Callable[[], Any] = bare, times: list[float] = times) -> None:
                start = time.perf_counter()
                bare()
                times.append(time.perf_counter() - start)

            for number in range(samples + 50):
                # Who goes first changes, as the second finds its data in the caches.
                for call in (run.once, alone) if number % 2 else (alone, run.once):
                    call()
        ours, theirs = run.times[50:], times[50:]
        ratio, interval = ratio_of_medians(theirs, ours)
        # `ratio_of_medians` gives how many times faster the second is.
        print(
            f"{artifact.label}: bench {np.median(ours) * 1e3:.4f} ms (least {min(ours) * 1e3:.4f}), "
            f"bare {np.median(theirs) * 1e3:.4f} ms (least {min(theirs) * 1e3:.4f}), "
            f"ratio {1 / ratio:.4f} ({1 / interval.high:.4f} to {1 / interval.low:.4f}), "
            f"{samples} samples of each"
        )
    if sensor is not None:
        sensor.close()


def _bare(target: str, session: Any, feeds: dict[str, np.ndarray]) -> Callable[[], Any] | None:
    """The runtime's own call, on the same loaded model."""
    if target == "openvino":
        request = session._request
        for index, value in enumerate(feeds.values()):
            np.copyto(request.get_input_tensor(index).data, value)

        return lambda: request.infer(share_outputs=True)
    if target == "onnxruntime":
        inner = session._session
        return lambda: inner.run(None, feeds)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--samples", type=int, default=4000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overhead(Bundle.open(given.bundle) if given.bundle else millisecond(Path(folder)), given.samples)


def millisecond(folder: Path) -> Bundle:
    """A bundle whose inference takes about a millisecond."""
    spec = "topk@encoder.block[0]:keep=24"
    return edgewise.export("demo:digits", folder / "bundle", targets=["openvino", "onnxruntime"], compress=spec)


if __name__ == "__main__":
    main()
