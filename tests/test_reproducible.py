"""The same recipe gives the same bytes; the cache is never wrong; a killed export leaves a whole bundle or none."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMPRESS, TARGETS, TINY, Cli

import edgewise


def files(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}


def same(first: Path, second: Path) -> None:
    a, b = files(first), files(second)
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []


def test_two_exports_are_byte_identical(shell: Cli, digits: Path, tmp_path: Path) -> None:
    """The first was made in this process with an empty cache; the second in another one, with other hashes and
    without a cache."""
    flags = [flag for target in TARGETS for flag in ("--target", target)]
    args = ("export", "demo:digits", "-o", tmp_path / "b", "--compress", COMPRESS, *flags, "--no-cache", "--quiet")
    said = shell(*args, env={"PYTHONHASHSEED": "77"}, cwd=tmp_path)
    assert said.code == 0, said.err
    same(digits, tmp_path / "b")


def test_a_cache_hit_gives_the_same_bundle(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.onnxruntime import OnnxRuntime
    from edgewise.targets.openvino import OpenVino

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the artifact was lowered again")

    for target in (OnnxRuntime, OpenVino):
        monkeypatch.setattr(target, "lower", never)
    edgewise.export("demo:digits", tmp_path / "b", targets=TARGETS, compress=COMPRESS)
    same(digits, tmp_path / "b")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, empty."""
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def export(tiny: str, out: Path, **changes: object) -> Path:
    given = {"targets": ["onnxruntime"], "compress": "tome:r=2", **changes}
    edgewise.export(f"{tiny}:make", out, **given)  # type: ignore[arg-type]
    return out


def test_what_is_exported_is_part_of_the_key(tiny: str, cache: Path, tmp_path: Path) -> None:
    """Every change that makes another artifact makes another entry, and no other change does."""
    entries = [0]
    for number, changes in enumerate(
        [
            {},
            {"compress": "tome:r=3"},
            {"compress": "tome:r=2,prop_attn=false"},
            {"compress": "topk@encoder.block[0]:keep=12"},
            {"precision": "fp16"},
            {"targets": ["openvino"]},
            {"input_shapes": {"pixels": (2, 3, 16, 16)}},
        ]
    ):
        export(tiny, tmp_path / f"b{number}", **changes)
        entries.append(len(list(cache.iterdir())))
    assert entries == list(range(len(entries)))
    same(tmp_path / "b0", export(tiny, tmp_path / "again"))
    assert len(list(cache.iterdir())) == entries[-1]
    # Other weights of the same graph.
    (tmp_path / "tiny_models.py").write_text(TINY.replace("manual_seed(0)", "manual_seed(1)"))
    sys.modules.pop("tiny_models")
    export(tiny, tmp_path / "other")
    assert len(list(cache.iterdir())) == entries[-1] + 1


def test_a_damaged_entry_is_made_anew(tiny: str, cache: Path, tmp_path: Path) -> None:
    good = export(tiny, tmp_path / "good")
    (entry,) = cache.iterdir()
    artifact = next(path for path in entry.iterdir() if path.suffix == ".onnx")
    data = artifact.read_bytes()
    index = next(path for path in entry.iterdir() if path.suffix == ".json")
    leaving = json.dumps({"../../good/manifest.json": "0" * 64}).encode()
    for path, damage in ((artifact, data[:100] + b"x" + data[101:]), (index, b"{"), (index, leaving)):
        path.write_bytes(damage)
        same(good, export(tiny, tmp_path / "again"))
        assert artifact.read_bytes() == data


def test_a_cache_that_cannot_be_written_is_no_error(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "file" / "cache"))
    export(tiny, tmp_path / "b")
    edgewise.Bundle.open(tmp_path / "b")


KILLS = 12

DRIVER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
place, kills, source = Path(sys.argv[2]), int(sys.argv[3]), random.Random(sys.argv[4])
import edgewise, edgewise.exporter.export, edgewise.exporter.sources, tiny_models, onnxruntime

def export(number):
    edgewise.export("py:tiny_models:make", place, targets=["onnxruntime"], compress=f"tome:r={number % 3 + 1}")

def child(number):
    pid = os.fork()
    if pid == 0:
        try:
            export(number)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return pid

# What is imported and cached before the fork, the children need not do again.
model, inputs = tiny_models.make()
edgewise.compress(edgewise.capture(model, (), inputs), "tome:r=1")
for _ in range(2):
    start = time.perf_counter()
    assert os.waitpid(child(0), 0)[1] == 0
    longest = time.perf_counter() - start
good = place.parent.with_name("good")
shutil.copytree(place, good)
killed = 0
for number in range(kills):
    # Half of the kills meet no bundle, and half meet an old one.
    shutil.rmtree(place, ignore_errors=True)
    before = number % 2 == 1
    if before:
        shutil.copytree(good, place)
    pid = child(number + 1)
    time.sleep(source.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    if place.exists():
        edgewise.Bundle.open(place)
    else:
        assert not before, "the old bundle is gone"
assert os.waitpid(child(0), 0)[1] == 0
edgewise.Bundle.open(place)
left = [path.name for path in place.parent.iterdir() if path != place]
assert not left, left
print(killed)
"""


def test_a_killed_export_leaves_a_whole_bundle_or_none(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "tiny_models.py").write_text(TINY)
    seed = str(random.randrange(10**6))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "code"), str(tmp_path / "place" / "bundle"), str(KILLS), seed],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EDGEWISE_CACHE": str(tmp_path / "cache")},
        timeout=600,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    assert int(done.stdout.split()[-1]) >= KILLS // 2
