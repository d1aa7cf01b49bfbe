"""Load and run one artifact in a process of its own: what a cold load takes, and how much memory.

`python -m edgewise.bench.probe` reads a request on stdin and writes its answer on stdout, both one JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import edgewise
from edgewise.bundle.manifest import Artifact
from edgewise.bundle.reader import Bundle, read_manifest

_RUNS = 2
_LONGEST = 600.0


@dataclass(frozen=True)
class Probed:
    """Milliseconds of a cold load and the peak of resident bytes, or None and the reason."""

    cold_load_ms: float | None
    peak_memory_bytes: int | None
    reason: str | None = None


NOT_PROBED = Probed(None, None, "not measured: it was left out")


def probe(bundle: Bundle, artifact: Artifact, threads: int | None = None, units: str | None = None) -> Probed:
    """Measure in a new process, which this process waits for. A process that fails gives the reason, and no error."""
    request = {"bundle": str(bundle.path.resolve()), "artifact": artifact.label, "threads": threads, "units": units}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgewise.bench.probe"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_LONGEST,
            env=own_environment(),
        )
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return Probed(
                None, None, f"a process of its own ended with {done.returncode}: {lines[-1] if lines else ''}"
            )
        answer = json.loads(done.stdout.splitlines()[-1])
        return Probed(float(answer["cold_load_ms"]), answer["peak_memory_bytes"])
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError, TypeError) as error:
        return Probed(None, None, f"a process of its own gave no answer: {error}")


def own_environment() -> dict[str, str]:
    """The environment of a Python process that finds this edgewise, installed or not."""
    package = str(Path(edgewise.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])}


def main() -> None:
    from edgewise.bench import host
    from edgewise.targets import load

    request = json.loads(sys.stdin.read())
    folder = Path(request["bundle"])
    # Whoever asks has checked every digest; to check them again would read the files into memory.
    bundle = Bundle(folder, read_manifest(folder))
    artifact = next(one for one in bundle.manifest.targets if one.label == request["artifact"])
    drop_from_cache(bundle.file(name) for name in artifact.files)
    start = time.perf_counter()
    with load(bundle, artifact, threads=request["threads"], units=request["units"]) as session:
        cold = time.perf_counter() - start
        feeds = bundle.golden(artifact.role).feeds(0)
        for _ in range(_RUNS):
            session.run(feeds)
        answer = {"cold_load_ms": cold * 1e3, "peak_memory_bytes": host.peak_memory()}
    # Runtimes may have printed something; the answer is the last line.
    print("\n" + json.dumps(answer), flush=True)


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the system to forget what it holds of these files in memory, where it can be asked (Linux)."""
    if hasattr(os, "posix_fadvise"):
        for path in files:
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


if __name__ == "__main__":
    main()
