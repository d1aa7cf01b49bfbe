"""Who may import whom: data flows one way, imports the other, and a device needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgewise

PACKAGE = Path(edgewise.__file__).parent

# For every part of the package, the parts that it may import: at the top of its modules or inside of functions.
ALLOWED = {
    "schema": set(),
    "errors": set(),
    "document": {"errors"},
    "rows": {"errors"},
    "version": set(),
    "ops": set(),
    "passes": {"ops", "errors"},
    "demos": {"errors"},
    "bundle": {"errors", "schema", "document", "verify"},
    "verify": {"errors", "schema", "bundle", "targets", "demos", "calibration", "runtime", "rows"},
    "targets": {"errors", "schema", "bundle", "passes", "ops"},
    "bench": {"errors", "schema", "document", "bundle", "verify", "targets", "version"},
    "runtime": {"errors", "bundle", "targets"},
    "calibration": {"errors", "rows", "demos", "runtime", "passes", "ops"},
    "exporter": {
        *("errors", "schema", "document", "version", "bundle", "verify", "targets", "passes", "ops", "demos", "runtime"),
        "calibration",
    },
    "builder": {"errors", "schema", "document", "version", "bundle", "verify", "targets", "bench", "demos", "exporter"},
    "cli": {
        *("errors", "document", "version", "bundle", "verify", "targets", "bench", "runtime", "demos"),
        *("calibration", "exporter", "builder", "passes", "ops"),
    },
}
"""What makes artifacts (`lower`, `lint`) may look at passes and ops; what runs them may not, which the tests below see."""

HEAVY = {"torch", "transformers", "yaml", "onnx", "onnxscript", "openvino", "onnxruntime"}


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported; not of what is for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer that they reach"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"):
            yield from imports(node)


@pytest.mark.parametrize(("path", "part"), list(modules()), ids=lambda value: str(value).removeprefix(str(PACKAGE)))
def test_imports_follow_the_layers(path: Path, part: str) -> None:
    assert part in ALLOWED, f"{path} belongs to no layer: add it to this test and to the design"
    for name in imports(ast.parse(path.read_text())):
        words = name.split(".")
        if words[0] == "edgewise" and len(words) > 1:
            other = words[1]
            # A name of the package itself (`from edgewise import targets`) is a module here.
            assert other == part or other in ALLOWED[part], f"{path} imports {name}"


@pytest.mark.parametrize(
    "name",
    [
        *("edgewise", "edgewise.cli", "edgewise.demos", "edgewise.runtime"),
        *("edgewise.bench, edgewise.verify.bundle", "edgewise.bench.report, edgewise.builder.gates"),
    ],
)
def test_what_a_device_imports_is_light(name: str) -> None:
    code = f"import sys, {name}\nfound = {HEAVY!r} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_sessions_import_no_torch(target: str, digits: Path) -> None:
    """Loading, running, verifying and measuring an artifact imports its runtime, and nothing that makes artifacts."""
    code = f"""
import sys
import edgewise
from edgewise.bench import bench
from edgewise.verify.bundle import verify_bundle
bundle = edgewise.Bundle.open({str(digits)!r})
with edgewise.load(bundle, target={target!r}) as session:
    session.run(bundle.golden("vision_encoder").feeds(0))
verify_bundle(bundle, [{target!r}])
bench(bundle, [{target!r}], samples=1, seconds=0)
found = ({HEAVY!r} - {{{target!r}}}) & set(sys.modules)
assert not found, found
assert not [name for name in sys.modules if name.startswith(("edgewise.exporter", "edgewise.passes", "edgewise.ops"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_verbs_of_a_device_need_no_torch(digits: Path) -> None:
    """Every verb but those that look into models runs where torch cannot be imported."""
    verbs = [
        ["verify", str(digits), "--data", "demo:digits"],
        ["run", str(digits), "--inputs", "demo:digits[0]"],
        ["bench", str(digits), "--samples", "1", "--seconds", "0"],
        ["inspect", str(digits)],
        *(["targets"], ["models"], ["sys"], ["--version"], []),
    ]
    code = f"""
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "yaml"):
    sys.modules[name] = None  # importing it is an error
from edgewise.cli import main
for args in {verbs!r}:
    assert main(args) == 0, args
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_nothing_is_unpickled() -> None:
    """No module names pickle, and torch.load appears nowhere: weights are safetensors, or torch's restricted reader."""
    for path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert (getattr(node.value, "id", None), node.attr) != ("torch", "load"), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
