"""Packages run by Core ML on a Mac. There is none here: the classes are those of coremltools, and in the place of what lies behind
them, Core ML's own handle of a model, is the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image
from tiny_bundles import build as tiny
from tiny_programs import CASES, Case, case
from torch import Tensor, nn

from edgewise import bench, targets
from edgewise.bundle import Bundle, write_bundle
from edgewise.errors import InputError, MissingExtra
from edgewise.targets.coreml.join import join
from edgewise.targets.coreml.predict import PredictSession
from edgewise.targets.coreml.session import CoreMLSession, InterpreterSession

pytest.importorskip("coremltools")


class Handle:
    """What coremltools asks of Core ML's handle of a model (9.0, `coremlpython`)."""

    opened: list[tuple[str, str]] = []
    newest = 9
    fault: str | None = None

    def __init__(self, path: str, units: str, function: str, hints: dict[str, str], asset: object) -> None:
        assert hints == {} and asset is None
        if self.fault is not None:
            raise RuntimeError(self.fault)
        self.opened.append((units, function))
        self.session = InterpreterSession(path, function=function or None)

    @classmethod
    def maximum_supported_specification_version(cls) -> int:
        return cls.newest

    def newState(self) -> dict[str, np.ndarray]:
        return {name: np.zeros_like(value) for name, value in self.session.states.items()}

    def predict(self, data: dict[str, Any], state: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        feeds = {}
        for info in self.session.inputs:
            value = data[info.name]
            if isinstance(value, Image.Image):
                plain = np.asarray(value)
                value = plain.transpose(2, 0, 1)[None] if plain.ndim == 3 else plain[None, None]
            assert value.dtype != np.float16, "coremltools gives halves as float32"
            feeds[info.name] = value.astype(info.dtype)
        if self.session.states:
            assert state is not None
            self.session.reset(state)
        outputs = self.session.run(feeds)
        if state is not None:
            state.update(self.session.states)
        return outputs


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> type[Handle]:
    from coremltools.models import model

    class Fresh(Handle):
        opened = []

    assert "_MLModelProxy" in vars(model) and "_macos_version" in vars(model)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(model, "_MLModelProxy", Fresh)
    monkeypatch.setattr(model, "_is_macos", lambda: True)
    monkeypatch.setattr(model, "_macos_version", lambda: (15, 0))
    return Fresh


def lowered(one: Case, folder: Path, precision: str = "fp16", target: targets.Target | None = None) -> list[Path]:
    names = {"input_names": one.input_names, "output_names": one.output_names}
    return (target or targets.get("coreml")).lower(one.exported, folder, "m", precision=precision, **names)


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


ASKED = {None: "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ane": "CPU_AND_NE"}


@pytest.mark.parametrize("units", ASKED)
def test_core_ml_gets_and_gives_what_the_program_does(units: str | None, mac: type[Handle], tmp_path: Path) -> None:
    """Truth values, scalars, 64-bit numbers and halves among its inputs and outputs."""
    one = CASES["odd"]()
    target = targets.get("coreml")
    with (target if units is None else target.for_units(units)).load(lowered(one, tmp_path)) as session:
        assert isinstance(session, PredictSession) and session.stand_in is None and session.units == (units or "all")
        found = session.run(one.feeds)
        again = session.run(one.feeds)
    assert mac.opened == [(ASKED[units], "")]
    with target.rehearse([*tmp_path.rglob("Manifest.json")]) as interpreter:
        assert type(interpreter) is CoreMLSession and interpreter.units is None
        wanted = interpreter.run(one.feeds)
    same(found, wanted)
    same(again, wanted)
    with pytest.raises(InputError, match="closed"):
        session.run(one.feeds)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_function_is_asked_for_by_its_name(mac: type[Handle], tmp_path: Path) -> None:
    """Of packages of several alone; without a name it is the default one, which Core ML is told, too."""
    target = targets.get("coreml").for_functions()
    parts = {name: lowered(case(Scaled(factor), torch.ones(2)), tmp_path / name, target=target)
             for name, factor in (("slow", 2.0), ("fast", 3.0))}  # fmt: skip
    files = join(parts, tmp_path / "both.mlpackage")
    x = {"i0": np.ones(2, np.float32)}
    for name, value in ((None, 2.0), ("slow", 2.0), ("fast", 3.0)):
        with target.load_function(files, name) as session:
            same(session.run(x), {"o0": np.full(2, value, np.float32)})
    assert [function for _, function in mac.opened] == ["slow", "slow", "fast"]
    with pytest.raises(InputError, match="did you mean 'fast'"):
        target.load_function(files, "fst")


@pytest.mark.parametrize(("colour", "channels"), [("RGB", 3), ("grayscale", 1)])
def test_pictures_are_given_as_images(colour: str, channels: int, mac: type[Handle], tmp_path: Path) -> None:
    """As those of coremltools, which it checks for their kind; channels and rows stay where they are."""
    one = case(Scaled(0.5), torch.zeros(1, channels, 4, 6))
    files = lowered(one, tmp_path, "fp32", targets.get("coreml").for_images({"i0": colour}))
    pixels = np.random.default_rng(0).integers(0, 256, (1, channels, 4, 6)).astype(np.float32)
    with targets.get("coreml").load(files) as session:
        same(session.run({"i0": pixels}), {"o0": pixels / 2})
        with pytest.raises(InputError, match="whole numbers from 0 to 255"):
            session.run({"i0": pixels + 0.5})


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.total.copy_(self.total + x)
        return self.total * 1.0


def test_states_last_until_a_reset(mac: type[Handle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(Sum(), torch.ones(2))
    one.exported.state_dict["total"].zero_()  # which the run that gave its outputs left
    files = lowered(one, tmp_path)
    x = {"i0": np.array([1, 2], np.float32)}
    with targets.get("coreml").load(files) as session:
        made = [session.run(x)["o0"][1] for _ in range(3)]
        session.reset()
        made.append(session.run(x)["o0"][1])
    assert made == [2, 4, 6, 2]
    from coremltools.models import model

    monkeypatch.setattr(model, "_macos_version", lambda: (14, 0))
    with pytest.raises(InputError, match=r"Core ML makes no state of .*macOS 15"):
        targets.get("coreml").load(files)


def test_what_core_ml_does_not_load_or_run_is_told(mac: type[Handle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = CASES["block"]()
    files = lowered(one, tmp_path)
    target = targets.get("coreml")
    session = target.load(files)

    def fails(self: Handle, data: object, state: object) -> object:
        raise RuntimeError("Error computing:\n no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Handle, "predict", fails)
        with pytest.raises(InputError, match=r"Core ML cannot run .*m\.mlpackage: Error computing: no memory"):
            session.run(one.feeds)
    mac.fault = "Error compiling model:\n out of space"
    with pytest.raises(InputError, match=r"Core ML cannot load .*m\.mlpackage: Error compiling model: out of space"):
        target.load(files)
    mac.fault, mac.newest = None, 5
    with pytest.raises(InputError, match="it is for a later system than this one"):
        target.load(files)
    with pytest.raises(InputError, match=r"compute units 'cpu-an'.*did you mean 'cpu-ane'"):
        target.for_units("cpu-an")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    kinds = (("coreml", "fp32"), ("openvino", "fp32"))
    return write_bundle(tmp_path_factory.mktemp("predict") / "b", tiny(CASES["block"](), kinds))


def test_bench_measures_core_ml_with_its_units(mac: type[Handle], bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other targets run as ever; the plan is asked for the same units."""
    from edgewise.targets.coreml import predict

    asked = []
    monkeypatch.setattr(predict, "placement", lambda path, function, units: asked.append((function, units)) or {"CPU": 3})
    record = bench.bench(bundle, samples=2, seconds=0, warmup=0, cold=False, units="cpu-ane")
    apple, other = record.measurements
    assert (apple.units, apple.stand_in, apple.placement) == ("cpu-ane", None, {"CPU": 3})
    assert asked == [("main", "CPU_AND_NE")] and mac.opened == [("CPU_AND_NE", "")] * 2
    assert other.units is None and apple.accuracy is not None and apple.accuracy.passed
    with pytest.raises(InputError, match="leave out --units"):
        bench.bench(bundle, ["openvino"], samples=1, seconds=0, cold=False, units="cpu-ane")


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_units_are_refused_where_core_ml_does_not_run(bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="Core ML runs on a Mac alone"):
        bench.bench(bundle, ["coreml"], samples=1, seconds=0, cold=False, units="cpu")
    failed = cli("bench", bundle.path, "--units", "gpu", "-o", tmp_path / "r.json")
    assert failed.code == 2 and "did you mean" in failed.err and not (tmp_path / "r.json").exists()
    with pytest.raises(MissingExtra, match="Mac alone"):
        PredictSession([bundle.file(name) for name in bundle.manifest.targets[0].files])
    record = bench.bench(bundle, ["coreml"], samples=1, seconds=0, warmup=0, cold=False)
    assert record.measurements[0].units is None and record.measurements[0].stand_in is not None
