"""Builds that are killed at random moments: `python tests/build_kills.py 50` takes a quarter of an hour.

After every kill, whatever is there is whole: each bundle of the output and of the cache opens, and one in the cache is the bundle
that its key stands for. The resumed build has the bytes of one that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

RECIPE = """
model: py:tiny_models:make
targets: onnxruntime
matrix:
  compress: [null, "tome:r=1", "tome:r=2", "topk@encoder.block[0]:keep=4", "tome:r=3", pool]
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bundles(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class Builder:
    """Builds the recipe in `folder`, into `out`, with a cache of its own."""

    def __init__(self, folder: Path, tiny: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tiny_models.py").write_text(tiny)
        (folder / "recipe.yaml").write_text(RECIPE)
        self.folder, self.out, self.cache = folder, folder / "out", folder / "cache"

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgewise.cli", "build", "recipe.yaml", "-o", "out", "--jobs", "2", "--json", *flags]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "EDGEWISE_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True
        )

    def finish(self, process: subprocess.Popen[str]) -> dict[str, str]:
        """Wait for it; the status of every entry."""
        out, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return {entry["name"]: entry.get("status") or entry["state"] for entry in json.loads(out)["entries"]}

    def clear(self) -> None:
        for folder in (self.out, self.cache):
            shutil.rmtree(folder, ignore_errors=True)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text() if Path(f"/proc/{pid}").exists() else ""
    return [int(word) for word in text.split()]


def check(builder: Builder, good: dict[str, bytes]) -> int:
    """Open every bundle that is there, and compare it; gives their number."""
    from edgewise.bundle import Bundle

    for path in bundles(builder.out):
        Bundle.open(path)
        assert files(path) == {k.partition("/")[2]: v for k, v in good.items() if k.startswith(path.name + "/")}, path
    manifests = {value for name, value in good.items() if name.endswith("/manifest.json")}
    for path in bundles(builder.cache / "bundles"):
        Bundle.open(path)
        assert (path / "manifest.json").read_bytes() in manifests
    return len(bundles(builder.out))


def run(folder: Path, tiny: str, kills: int, seed: int) -> dict[str, int]:
    """Kill builds `kills` times: all of a build, its parent, or one of its processes. Every tenth time the build is resumed, and
    then starts from nothing again."""
    from edgewise.exporter.cache import DEFAULT_LIMIT, tidy

    chance = random.Random(seed)
    builder = Builder(folder, tiny)
    start = time.perf_counter()
    before = builder.finish(builder.start())
    longest = time.perf_counter() - start
    assert set(before.values()) == {"built"}, before
    good = files(builder.out)
    counts = {"kills": 0, "late": 0, "found": 0, "resumed": 0, "swept": 0}
    builder.clear()
    for number in range(kills):
        process = builder.start()
        # Half of the kills come late, when bundles are written: much of a build is the start of its processes.
        time.sleep(chance.uniform(longest / 2 if number % 2 else 0, longest))
        counts["late"] += process.poll() is not None
        how = ("all", "parent", "child")[number % 3]
        victims = children(process.pid)
        if how == "child" and victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
            builder.finish(process)  # its bundle is tried once more
        else:
            with contextlib.suppress(ProcessLookupError):  # it was done before it was killed
                (os.killpg if how == "all" else os.kill)(process.pid, signal.SIGKILL)
            process.communicate()
        counts["kills"] += 1
        counts["found"] += check(builder, good)
        if number % 10 == 9 or number == kills - 1:
            statuses = builder.finish(builder.start())
            counts["resumed"] += sum(status != "built" for status in statuses.values())
            now = files(builder.out)
            assert now == good, sorted(name for name in now.keys() | good.keys() if now.get(name) != good.get(name))
            left = hidden(builder.out)
            counts["swept"] += len(hidden(builder.cache) + hidden(builder.cache / "bundles"))
            tidy(builder.cache, DEFAULT_LIMIT)  # as the next entry would
            left += hidden(builder.cache) + hidden(builder.cache / "bundles")
            assert not left, left
            assert set(builder.finish(builder.start("--dry-run")).values()) == {"current"}
            builder.clear()
    return counts


if __name__ == "__main__":
    import tempfile

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import TINY

    with tempfile.TemporaryDirectory() as place:
        number = int(sys.argv[1]) if len(sys.argv) > 1 else 50
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
        print(f"seed {seed}", flush=True)
        print(run(Path(place) / "build", TINY, number, seed))
