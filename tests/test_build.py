"""Builds: every bundle is made once, what changes is made again and nothing else, and nothing that is broken is left."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Cli

import edgewise
from edgewise.builder import build as builder
from edgewise.builder import key
from edgewise.builder.build import Planned, build, plan, select
from edgewise.builder.key import Keys
from edgewise.builder.processes import build_all
from edgewise.builder.task import Outcome, Task, build_one
from edgewise.errors import InputError
from edgewise.exporter.matrix import Entry, read_recipes
from edgewise.exporter.recipe import Gates, Recipe

MATRIX = """
model: py:tiny_models:make
targets: [onnxruntime]
matrix:
  compress: [null, "tome:r=2", pool]
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_turn(tasks: Sequence[Task], jobs: int, tell: object) -> Iterator[Outcome]:
    """An engine without processes, which would import torch anew."""
    for task in tasks:
        yield build_one(task)


@pytest.fixture
def recipe(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A matrix of three tiny models, and an empty cache; builds run in this process."""
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "__kwdefaults__", {**(build.__kwdefaults__ or {}), "engine": in_turn})
    path = tmp_path / "matrix.yaml"
    path.write_text(MATRIX)
    return path


def states(cli: Cli, recipe: Path, *flags: object) -> dict[str, str]:
    """What a build would do."""
    said = cli("build", recipe, "-o", "out", "--dry-run", "--json", "--quiet", *flags)
    assert said.code == 0, said.err
    return {entry["name"]: entry["state"] for entry in said.document["entries"]}


def statuses(cli: Cli, recipe: Path, *flags: object, code: int = 0) -> dict[str, str]:
    """What a build did."""
    said = cli("build", recipe, "-o", "out", "--json", "--quiet", *flags)
    assert said.code == code, said.err
    return {entry["name"]: entry["status"] for entry in said.document["entries"]}


def all_are(state: str) -> dict[str, str]:
    return dict.fromkeys(("plain", "tome-r=2", "pool"), state)


def test_what_is_there_is_not_built_again(cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(cli, recipe) == all_are("new")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    assert statuses(cli, recipe) == all_are("built")
    first = files(tmp_path / "out")
    assert {"plain.cdx.json", "plain.provenance.json"} <= set(first)
    # The same bundle as that of an export; and its recipe gives the same bytes again.
    out = tmp_path / "exported"
    edgewise.export("py:tiny_models:make", out, targets=["onnxruntime"], compress="tome:r=2", cache=False)
    assert files(out) == files(tmp_path / "out" / "tome-r=2")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a bundle was built again")

    monkeypatch.setattr("edgewise.builder.task.build_one", never)
    monkeypatch.setattr(sys.modules[__name__], "build_one", never)
    assert statuses(cli, recipe) == all_are("current")
    # A bundle that is gone, or damaged, comes from the cache.
    shutil.rmtree(tmp_path / "out" / "pool")
    artifact = next((tmp_path / "out" / "plain").rglob("*.onnx"))
    artifact.write_bytes(artifact.read_bytes()[:-1])
    assert statuses(cli, recipe) == {**all_are("current"), "pool": "cached", "plain": "cached"}
    assert files(tmp_path / "out") == first
    replayed = cli("build", tmp_path / "out" / "tome-r=2", "-o", "again", "--json", "--quiet").document["entries"]
    assert [(entry["name"], entry["status"]) for entry in replayed] == [("make", "cached")]
    assert files(tmp_path / "again" / "make") == files(out)


def test_a_damaged_cache_is_no_hit(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert statuses(cli, recipe, "--only", "p*") == {"plain": "built", "pool": "built"}
    first = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    for entry in (tmp_path / "cache" / "bundles").iterdir():
        report = entry / "report.html"
        report.write_text(report.read_text() + " ")
    assert statuses(cli, recipe, "--only", "p*") == {"plain": "built", "pool": "built"}
    assert files(tmp_path / "out") == first


def test_a_change_builds_what_depends_on_it(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert statuses(cli, recipe) == all_are("built")
    recipe.write_text(MATRIX.replace("tome:r=2", "tome:r=3"))
    assert states(cli, recipe) == {"plain": "current", "tome-r=3": "new", "pool": "current"}
    recipe.write_text(MATRIX.replace("null", "{compress: null, seed: 1}"))
    assert states(cli, recipe) == {**all_are("current"), "plain": "new"}
    # Limits decide no bytes.
    recipe.write_text(MATRIX + "gates: {size: 1 MiB}\n")
    assert states(cli, recipe) == all_are("current")
    recipe.write_text(MATRIX + "batch: 2\n")
    assert states(cli, recipe) == all_are("new")
    recipe.write_text(MATRIX)
    sys.modules.pop("tiny_models")
    (tmp_path / "tiny_models.py").write_text(TINY.replace("manual_seed(0)", "manual_seed(1)"))
    assert states(cli, recipe) == all_are("new")


def test_one_that_fails_keeps_no_other(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(MATRIX.replace('"tome:r=2"', "tomme:r=2"))
    found = statuses(cli, recipe, code=2)
    assert found == {"plain": "built", "tomme-r=2": "failed", "pool": "built"}
    said = cli("build", recipe, "-o", "out")
    assert said.code == 2 and "did you mean 'tome'" in said.out and "Traceback" not in said.err
    assert not (tmp_path / "out" / "tomme-r=2").exists()


def test_what_cannot_be_built_is_said_first(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    for text, words in (
        (MATRIX.replace("onnxruntime", "onnxruntme"), ["onnxruntme", "did you mean 'onnxruntime'"]),
        (MATRIX + "precision: fp61\n", ["fp61", "did you mean 'fp16'"]),
        (MATRIX.replace(":make", ":mak"), ["'mak'", "did you mean 'make'"]),
        (MATRIX.replace("py:tiny_models:make", "no/such/model"), ["no/such/model"]),
        (MATRIX + "presicion: fp16\n", ["matrix.yaml:6", "did you mean 'precision'"]),
    ):
        recipe.write_text(text)
        cli("build", recipe, "-o", "out").refused(*words)
        assert not (tmp_path / "out").exists()
    recipe.write_text(MATRIX)
    cli("build", recipe, "-o", "out", "--only", "poool").refused("'poool'", "did you mean 'pool'")


def test_a_pattern_takes_the_baseline_with_it() -> None:
    recipe = Recipe(model="m", targets=("openvino",))
    entries = [Entry(name, recipe, Gates(baseline="base" if name != "base" else None)) for name in ("base", "a", "b")]
    assert [entry.name for entry in select(entries, ["a"])] == ["base", "a"]
    assert select(entries, []) == entries


MODEL = Path(edgewise.__file__).parent / "demos" / "digits"


def test_every_part_of_the_key_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe, weights, files that specs name, versions of tools, edgewise's own code, flags."""
    monkeypatch.chdir(tmp_path)
    model, weights = tmp_path / "model", tmp_path / "w.npy"
    shutil.copytree(MODEL, model)
    weights.write_bytes(b"one")
    recipe = Recipe(model=str(model), targets=("onnxruntime",), compress=("conv1d:weights=w.npy,stride=2",))
    known = {Keys().of(recipe): "as it was"}

    def miss(what: str, changed: Recipe = recipe, **flags: bool) -> None:
        key = Keys(**flags).of(changed)
        assert key not in known, (what, known[key])
        known[key] = what

    changes: dict[str, Any] = {
        "model": "demo:digits",
        "compress": ("pool",),
        "targets": ("openvino",),
        "precision": "fp16",
        "devices": ("sm86",),
        "input_shapes": {"pixel_values": (1, 1, 56, 56)},
        "batch": 2,
        "seed": 1,
        "calibration": "demo:digits",
    }
    for name in Recipe.model_fields:
        miss(name, recipe.model_copy(update={name: changes.get(name, 7)}))
    miss("flags", trust_remote_code=True)
    miss("other flags", weights_only=True)
    weights.write_bytes(b"two")
    miss("a file of a spec")
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    miss("configuration")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    miss("one bit of the weights")
    (model / "more.json").write_text("{}")
    miss("a new file")
    from edgewise.builder import key

    for package in ("torch", "onnxruntime", "transformers", "onnx"):
        with monkeypatch.context() as patched:
            real = key.metadata.version
            patched.setattr("importlib.metadata.version", lambda name, own=package, real=real: "0.0" if name == own else real(name))
            miss(f"version of {package}")
    for name, value in (("code_digest", lambda: "other"), ("__version__", "9.9")):
        with monkeypatch.context() as patched:
            patched.setattr(key, name, value)
            miss(name)
    with monkeypatch.context() as patched:
        patched.setattr(key.platform, "machine", lambda: "riscv64")
        miss("machine")
    assert Keys().of(recipe) in known and known[Keys().of(recipe)] == "a new file"


@pytest.mark.parametrize("data", ["pictures", "pictures/list.csv", "arrays.npz"])
def test_data_is_part_of_the_key(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is below a folder, and what a manifest names beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("pictures/a.png", "pictures/list.csv", "arrays.npz"):
        (tmp_path / name).write_bytes(b"one")
    recipe = Recipe(model="demo:digits", targets=("onnxruntime",), precision="w8a8", calibration=data)
    before = Keys().of(recipe)
    assert Keys().of(recipe) == before
    (tmp_path / ("arrays.npz" if data == "arrays.npz" else "pictures/a.png")).write_bytes(b"two")
    assert Keys().of(recipe) != before


HELPED = """
import importlib, json, os
import torch
from helpers.sizes import WIDTH
def make():
    torch.manual_seed(0)
    scale = json.load(open("scale.json"))["scale"]
    open(f"written-{id(scale)}-{len(os.listdir('.'))}", "w").close()
    late = importlib.import_module("late").BIAS
    layer = torch.nn.Linear(WIDTH, 2)
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
        def forward(self, x):
            return self.layer(x) * scale + late
    return Model(), torch.ones(1, WIDTH)
"""


def test_the_code_and_files_of_a_factory_are_part_of_the_key(tmp_path: Path) -> None:
    """Also what only shows in what the model computes: a number from a file, or from a module that is imported late."""
    package = tmp_path / "helpers"
    package.mkdir()
    contents = {
        "factory.py": HELPED,
        "helpers/__init__.py": "",
        "helpers/sizes.py": "from .deep import WIDTH",
        "helpers/deep.py": "WIDTH = 4",
        "scale.json": '{"scale": 2}',
        "late.py": "BIAS = 1",
        "unrelated.py": "x = 1",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    driver = tmp_path / "driver.py"
    # Processes of their own would show it best and take longest: modules are forgotten instead.
    driver.write_text("""
import sys
from edgewise.builder.key import Keys
from edgewise.exporter import identity
from edgewise.exporter.recipe import Recipe
def key():
    for name in [n for n in sys.modules if n.split(".")[0] in ("factory", "helpers", "late")]:
        del sys.modules[name]
    identity._opened.clear()
    return Keys().of(Recipe(model="py:factory:make", targets=("onnxruntime",)))
keys = [key()]
assert key() == keys[0]
code = (("factory.py", "+ late", "- late"), ("helpers/deep.py", "4", "5"), ("late.py", "1", "7"))
for name, old, new in (*code, ("scale.json", "2", "3")):
    text = open(name).read().replace(old, new)
    open(name, "w").write(text + " ")
    keys.append(key())
assert len(set(keys)) == len(keys), keys
open("unrelated.py", "w").write("x = 2")
assert key() == keys[-1]
""")
    package_root = str(Path(edgewise.__file__).parents[1])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_copies_inside_a_package_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray and setuptools put folders of their own copies on the path once they are imported: in one process, not in another."""

    def found(*folders: Path) -> dict[str, str | None]:
        key._installed.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "path", [*map(str, folders), *sys.path])
            try:
                return key.installed()
            finally:
                key._installed.cache_clear()

    library = tmp_path / "site-packages"
    for folder, name in ((library, "ours-1.0"), (library / "ray" / "thirdparty", "copied-2.0"), (tmp_path / "more", "added-3.0")):
        (folder / f"{name}.dist-info").mkdir(parents=True)
    before = found(library)
    assert before["ours"] == "1.0" and "numpy" in before
    assert found(library / "ray" / "thirdparty", library) == before
    assert found(tmp_path / "more", library) == {**before, "added": "3.0"}


def test_what_changes_while_it_is_built_is_not_remembered(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entries = read_recipes(recipe).entries[:1]
    planned = plan(entries, tmp_path / "out", keys=Keys())
    stale = [Planned(one.entry, "0" * 64, "new") for one in planned]
    (outcome,) = build(stale, tmp_path / "out")
    assert (outcome.status, outcome.code) == ("failed", 2) and "has changed since the build began" in outcome.message
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache" / "bundles").exists()


def test_processes_build_and_a_killed_one_is_replaced(recipe: Path, tmp_path: Path) -> None:
    """A real process; the first is ended from inside, as the system would for want of memory."""
    (tmp_path / "ends.py").write_text(
        TINY + "\nimport os, pathlib, signal\nmark = pathlib.Path('mark')\ndef ending():\n    if os.environ.get('ENDS') and not "
        "mark.exists():\n        mark.touch()\n        os.kill(os.getpid(), signal.SIGKILL)\n    return make()\n"
        "def dying():\n    if os.environ.get('ENDS'):\n        os.kill(os.getpid(), signal.SIGKILL)\n    return make()\n"
    )
    recipe.write_text("targets: onnxruntime\nmatrix:\n  model: [py:ends:ending, py:ends:dying]\n")
    planned = plan(read_recipes(recipe).entries, tmp_path / "out", keys=Keys())
    os.environ["ENDS"] = "1"
    try:
        ended, died = build(planned, tmp_path / "out", engine=build_all, jobs=1)
    finally:
        del os.environ["ENDS"]
    assert ended.status == "built", ended
    assert (died.status, died.code) == ("failed", 2) and "signal 9" in died.message
    edgewise.Bundle.open(tmp_path / "out" / "ending")
    assert not (tmp_path / "out" / "dying").exists()


DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import build_kills, edgewise.exporter.export, onnxruntime
from edgewise.builder.build import build, plan
from edgewise.builder.key import Keys
from edgewise.builder.task import build_one
from edgewise.exporter.matrix import read_recipes

folder, kills, chance = Path(sys.argv[2]), int(sys.argv[3]), random.Random(sys.argv[4])
tiny = (folder / "tiny_models.py").read_text()
builder = build_kills.Builder(folder, tiny)
(folder / "recipe.yaml").write_text(sys.argv[5])
os.chdir(folder)
entries = read_recipes("recipe.yaml").entries

def once():
    planned = plan(entries, builder.out, keys=Keys())
    done = build(planned, builder.out, engine=lambda tasks, jobs, tell: map(build_one, tasks))
    return [one.status for one in done]

def child():
    pid = os.fork()
    if pid == 0:
        os._exit(0 if "failed" not in once() else 1)
    return pid

first = once()
assert set(first) == {"built"}, first
good = build_kills.files(builder.out)
builder.clear()
# The first build also warms up: how long one takes is learned from those that end.
start = time.perf_counter()
assert set(once()) == {"built"}
longest = time.perf_counter() - start
builder.clear()
killed = tries = 0
while killed < kills:
    tries += 1
    assert tries < 10 * kills, "builds end before they are killed"
    start = time.perf_counter()
    pid = child()
    time.sleep(chance.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    killed += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or status == 0
    build_kills.check(builder, good)
    if not os.WIFSIGNALED(status):
        longest = min(longest, time.perf_counter() - start)
        builder.clear()
once()
build_kills.same(build_kills.files(builder.out), good)
assert set(once()) == {"current"}
print(killed)
"""


def test_a_killed_build_leaves_nothing_broken(tmp_path: Path) -> None:
    """A handful of kills; `python tests/build_kills.py 50` does more, with processes."""
    matrix = MATRIX.replace(", pool", "")
    (tmp_path / "tiny_models.py").write_text(TINY)
    seed, kills = str(random.randrange(10**6)), 4
    tests = str(Path(__file__).parent)
    package_root = str(Path(edgewise.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, tests, str(tmp_path), str(kills), seed, matrix],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "EDGEWISE_CACHE": str(tmp_path / "cache"),
        },
        timeout=600,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    assert int(done.stdout) == kills


def test_the_engine_is_the_processes_one() -> None:
    """What the tests above replace."""
    assert (build.__kwdefaults__ or {})["engine"] is build_all is builder.build_all
    with pytest.raises(InputError):
        read_recipes("no-such-recipe.yaml")
