from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from edgewise import targets
from edgewise.bundle import TensorInfo
from edgewise.errors import InputError, MissingExtra
from edgewise.targets.base import Requirement, Session, check_threads, release


class Echo(Session):
    inputs = (
        TensorInfo(name="pixels", shape=(1, 2), dtype="float32"),
        TensorInfo(name="n", shape=(), dtype="int64"),
    )
    outputs = inputs

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert all(array.flags.c_contiguous and array.dtype.isnative for array in feeds.values())
        return feeds

    def close(self) -> None:
        pass


GOOD = {"pixels": np.ones((1, 2), np.float32), "n": np.array(3)}


def test_good_feeds_run_in_the_order_of_the_inputs() -> None:
    assert list(Echo().run(dict(reversed(GOOD.items())))) == ["pixels", "n"]


def test_strides_and_byte_order_are_made_plain() -> None:
    feeds = {"pixels": np.arange(4, dtype=">f4").reshape(2, 2).T[::2], "n": np.array(3)}
    assert Echo().run(feeds)["pixels"].tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({**GOOD, "pixel": GOOD["pixels"]}, "unknown input 'pixel': did you mean 'pixels'"),
        ({"pixels": GOOD["pixels"]}, "input 'n' is missing; the inputs are: pixels, n"),
        ({**GOOD, "pixels": [[1.0, 2.0]]}, "'pixels' is a list; give a numpy array"),
        ({**GOOD, "pixels": np.ones((2, 1), np.float32)}, r"has shape \(2, 1\); .* static shape \(1, 2\)"),
        ({**GOOD, "pixels": np.ones((1, 2))}, r"dtype float64 and must be float32; .*astype\('float32'\)"),
        ({**GOOD, "n": np.array([3])}, r"has shape \(1,\)"),
        ({**GOOD, "n": 3}, "is a int"),
        ({}, "is missing"),
    ],
)
def test_wrong_feeds_are_explained(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Echo().run(feeds)


def test_the_registry() -> None:
    assert targets.names() == tuple(sorted(targets.names()))
    assert {"openvino", "onnxruntime"} <= set(targets.names())
    for name in targets.names():
        assert targets.get(name).name == name
    with pytest.raises(InputError, match="unknown target 'openvno': did you mean 'openvino'"):
        targets.get("openvno")


@pytest.mark.parametrize("name", targets.names())
def test_each_target_says_what_it_is(name: str) -> None:
    target = targets.get(name)
    assert target.description and target.suffixes and target.precisions and target.requirements
    from edgewise.passes.legalise import REALISATIONS

    assert set(target.realisations) == set(REALISATIONS)
    for op, names in target.realisations.items():
        assert set(names) <= set(REALISATIONS[op])
    with pytest.raises(InputError, match="did you mean 'fp32'"):
        target.check_precision("fp33")


def test_a_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    need = Requirement("thing", minimum="1.2.0", tested="1.10.1", extra="x")

    def installed(version: str | None) -> None:
        def lookup(package: str) -> str:
            if version is None:
                raise metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(metadata, "version", lookup)

    installed(None)
    with pytest.raises(MissingExtra, match=r'thing is not installed; .*pip install "edgewise\[x\]"'):
        need.check()
    installed("1.1.9")
    with pytest.raises(MissingExtra, match=r"thing 1\.1\.9 is older than 1\.2\.0"):
        need.check()
    installed("1.9")
    assert need.check() == "thing 1.9 is installed; edgewise was tested with 1.10.1"
    for version in ("1.10.1", "1.10.1+cpu", "1.10.1.0"):
        installed(version)
        assert need.check() is None


def test_release_numbers_order_as_versions_do() -> None:
    assert release("1.9") < release("1.10") < release("1.10.1") < release("2.0rc1+cu12")
    assert release("1.2") == release("1.2.0")
    assert release("weird") == ()


def test_a_missing_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lookup(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", lookup)
    for name in targets.names():
        with pytest.raises(MissingExtra, match="not installed"):
            targets.get(name).load([tmp_path / "a"])
        assert targets.get(name).versions() == {}


def test_threads_are_checked() -> None:
    check_threads(None)
    check_threads(1)
    for threads in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="whole number"):
            check_threads(threads)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="logical CPUs"):
        check_threads(100_000)


def imported(code: str) -> set[str]:
    """Heavy modules that a fresh interpreter has imported after `code`."""
    heavy = "('torch', 'transformers', 'onnx', 'onnxscript', 'edgewise.exporter', 'edgewise.passes', 'edgewise.ops')"
    code = f"{code}\nimport sys\nprint(*[name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_the_device_half_imports_no_torch() -> None:
    code = (
        "import edgewise.bundle, edgewise.targets, edgewise.verify, edgewise.verify.bundle, edgewise.bench\n"
    )
    check = """
for name in edgewise.targets.names():
    try:
        edgewise.targets.get(name).check()
    except edgewise.errors.MissingExtra:
        assert name == "coreai"  # the extra `all` leaves it out
"""
    assert imported(code + check) == set()
