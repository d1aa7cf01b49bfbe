"""Builds that are killed at random moments: `python tests/build_kills.py 50 [SEED [FOLDER]]` takes a quarter of an hour.

Only kills that meet a running build count: a build that ends before its moment is looked at as a resumed one, and the next begins
from nothing. After every kill, whatever is there is whole: each bundle of the output and of the cache opens, and one in the cache
is the bundle that its key stands for. The resumed build has the bytes of one that nobody disturbed. Edgewise's own code is part of
the key: leave the checkout alone meanwhile, or run a copy.
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
from collections import Counter
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


def same(now: dict[str, bytes], good: dict[str, bytes]) -> None:
    """Raise an AssertionError that says which files differ, and where."""
    for name in sorted(now.keys() | good.keys()):
        one, two = now.get(name), good.get(name)
        if one is None or two is None:
            raise AssertionError(f"{name} is {'not there' if one is None else 'there, and should not be'}")
        if one != two:
            at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
            near = slice(max(0, at - 80), at + 80)
            raise AssertionError(f"{name} differs from byte {at} on: {one[near]!r}, and should be {two[near]!r}")


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


def workers(pid: int) -> list[int]:
    """The processes that a build started to build in, and that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if parent(path) == pid and b"edgewise.builder.worker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def parent(process: Path) -> int | None:
    """Of a process in /proc; None if it has ended. Raises OSError if it is not there."""
    state, number = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(number)


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return parent(Path(f"/proc/{pid}")) is not None
    return False


def check(builder: Builder, good: dict[str, bytes]) -> int:
    """Open every bundle that is there, and compare it; gives their number."""
    from edgewise.bundle import Bundle

    for path in bundles(builder.out):
        Bundle.open(path)
        same(files(path), {k.partition("/")[2]: v for k, v in good.items() if k.startswith(path.name + "/")})
    manifests = {value for name, value in good.items() if name.endswith("/manifest.json")}
    for path in bundles(builder.cache / "bundles"):
        Bundle.open(path)
        assert (path / "manifest.json").read_bytes() in manifests, path
    return len(bundles(builder.out))


def check_resumed(builder: Builder, statuses: dict[str, str], good: dict[str, bytes]) -> dict[str, int]:
    """Compare what a build that was resumed made with what one that nobody disturbed did; nothing else may be left."""
    from edgewise.exporter.cache import DEFAULT_LIMIT, tidy

    assert "failed" not in statuses.values(), statuses
    check(builder, good)
    same(files(builder.out), good)
    left = hidden(builder.out)
    swept = len(hidden(builder.cache) + hidden(builder.cache / "bundles"))
    tidy(builder.cache, DEFAULT_LIMIT)  # as the next entry would
    left += hidden(builder.cache) + hidden(builder.cache / "bundles")
    assert not left, left
    assert set(builder.finish(builder.start("--dry-run")).values()) == {"current"}
    return {"resumed": 1, "reused": sum(status != "built" for status in statuses.values()), "swept": swept}


def kill(process: subprocess.Popen[str], how: str, chance: random.Random) -> bool:
    """End all of a build, its parent, or one of its processes, at once. False if it was done before, or has no process yet."""
    if process.poll() is not None:
        return False
    if how == "child":
        found = workers(process.pid)
        if not found:
            return False
        os.kill(chance.choice(found), signal.SIGKILL)
        return True
    (os.killpg if how == "all" else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def run(folder: Path, tiny: str, kills: int, seed: int, most_in_a_row: int = 4) -> Counter[str]:
    """Kill running builds `kills` times at random moments: all of a build, its parent, or one of its processes.

    What was killed is resumed by the next build, which may be killed too, at most so often in a row.
    """
    chance = random.Random(seed)
    builder = Builder(folder, tiny)
    start = time.perf_counter()
    before = builder.finish(builder.start())
    longest = time.perf_counter() - start
    assert set(before.values()) == {"built"}, before
    good = files(builder.out)
    counts: Counter[str] = Counter()
    builder.clear()
    in_a_row = 0
    while counts["kills"] < kills or in_a_row:
        process = builder.start()
        # Half of the moments are late ones, when bundles are written: much of a build is the start of its processes.
        moment = chance.uniform(chance.choice((0, longest / 2)), longest)
        how = chance.choice(("all", "parent", "child"))
        hit = False
        if in_a_row < most_in_a_row and counts["kills"] < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            orphans = workers(process.pid)
            hit = kill(process, how, chance)
        if hit:
            counts.update(["kills", how, f"moment {4 * moment / longest:.0f}/4"])
            in_a_row += 1
            print(f"{counts['kills']}: {how} after {moment:.1f} of {longest:.1f} s", flush=True)
            if how == "parent":  # nobody reads what its processes say: they end by themselves
                ended = time.perf_counter() + 60
                while any(map(lives, orphans)):
                    assert time.perf_counter() < ended, "a process outlives the build that started it"
                    time.sleep(0.01)
            if how != "child":
                counts["found"] += check(builder, good)
                continue
        # It was let go on, it was done before its moment, or it lost one process: its bundle is tried once more.
        counts.update(check_resumed(builder, builder.finish(process), good))
        builder.clear()
        in_a_row = 0
    return counts


if __name__ == "__main__":
    import tempfile

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import TINY

    with tempfile.TemporaryDirectory() as temporary:
        number = int(sys.argv[1]) if len(sys.argv) > 1 else 50
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
        print(f"seed {seed}", flush=True)
        place = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(temporary)  # a folder that is given is kept
        print(dict(sorted(run(place / "build", TINY, number, seed).items())))
