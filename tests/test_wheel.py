"""What is in the wheel: all of the package, with its data, and nothing else. `wheel_smoke.py` installs it, extra by extra."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return path


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    package = {name: data for name, data in inside.items() if name.startswith("edgewise/")}
    others = {name.partition("/")[0] for name in inside if name not in package}
    assert len(others) == 1 and others.pop().endswith(".dist-info")
    sources = [path for path in (ROOT / "edgewise").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert package == {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources}
    # What a test of equality does not see if it is missing from both.
    for name in (
        "py.typed",
        "bench/schemas/record.json",
        "bench/schemas/comparison.json",
        *(f"demos/{demo}/model.safetensors" for demo in ("digits", "motion", "speech", "vqa")),
        *(f"demos/{demo}/split.npz" for demo in ("digits", "speech")),
        "demos/vqa/tokenizer.json",
    ):
        assert f"edgewise/{name}" in package, name
    assert len(wheel.read_bytes()) < 16 << 20


def test_the_metadata_names_every_extra_and_no_torch_in_the_base(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"export", "onnxruntime", "openvino", "coreml", "coreai", "tensorrt-rtx", "generate", "all", "test", "docs"} <= extras
    base = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(text.split("<")[0].split(">")[0].split("=")[0] for text in base) == [
        "numpy",
        "pydantic",
        "rich",
        "safetensors",
        "typer",
    ]
    assert metadata["Requires-Python"] == ">=3.10"
