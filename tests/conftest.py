"""Fixtures that many tests share. Exports are made once for the whole run, into one cache of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Tests run beside one another: each takes one core, and tables are as wide as where no terminal is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)

# A run is the same every time; `HYPOTHESIS_PROFILE=search pytest` looks for inputs that no run has tried.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("search", max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

COMPRESS = "tome:keep=0.5"
TARGETS = ("openvino", "onnxruntime")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's cache out of the tests, and the tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("EDGEWISE_CACHE")
    os.environ["EDGEWISE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EDGEWISE_CACHE"]
    else:
        os.environ["EDGEWISE_CACHE"] = before


@dataclass(frozen=True)
class Said:
    """What one command line did: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    def refused(self, *words: str) -> str:
        """Check that it ended with exit code 2 and one clear message that holds `words`, and give the message."""
        assert self.code == 2, self
        assert "Traceback" not in self.err and "Traceback" not in self.out
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        message = self.err[self.err.index("error: ") :]
        assert "not an error that edgewise expects" not in message
        for word in words:
            assert word in message, (word, message)
        return message


Cli = Callable[..., Said]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process: `cli("export", "demo:digits", "-o", out)`."""
    from edgewise.cli import main

    def run(*args: object) -> Said:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def shell() -> Cli:
    """Run a command line in a process of its own. `before`: Python code that runs first, `env`: added variables."""
    import edgewise

    def run(*args: object, before: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> Said:
        code = f"{before}\nimport sys\nfrom edgewise.cli import main\nsys.exit(main())"
        command: Sequence[str] = [sys.executable, *(["-c", code] if before else ["-m", "edgewise.cli"])]
        # Where the package is not installed, it is found in the folder that the tests run in.
        path = [str(Path(edgewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [*command, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **(env or {})},
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def digits(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo:digits`, compressed, for both targets: the first export of the run, with an empty cache."""
    return _demo("digits", tmp_path_factory)


@pytest.fixture(scope="session")
def speech(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo:speech`, compressed, for both targets."""
    return _demo("speech", tmp_path_factory)


@pytest.fixture(scope="session")
def motion(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demo:motion`, compressed, for both targets."""
    return _demo("motion", tmp_path_factory)


def _demo(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import edgewise

    out = tmp_path_factory.mktemp("demo") / name
    edgewise.export(f"demo:{name}", out, targets=TARGETS, compress=COMPRESS)
    return out


TINY = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, n, c))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Tiny(nn.Module):
    """A small vision transformer: 4x4 patches and a class token, 17 tokens, two blocks."""

    def __init__(self, width=16, classes=5):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def make():
    torch.manual_seed(0)
    return Tiny().eval(), {"pixels": torch.randn(1, 3, 16, 16)}


def make_nan():
    model, inputs = make()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    return model, inputs


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 8)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x - 1


def make_branching():
    return Branching(), torch.randn(1, 8)


def make_failing():
    raise RuntimeError("the factory has a fault")


def make_chatty():
    print("a factory that prints")
    return make()
'''


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`py:tiny_models`, to be followed by `:factory`: a module in the current folder, which is a new one."""
    (tmp_path / "tiny_models.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("tiny_models", None)
    return "py:tiny_models"
