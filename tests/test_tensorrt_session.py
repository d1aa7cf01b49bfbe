"""The session of a device: engines that are kept and those that are not, copies and times, and what is said when something fails.

NVIDIA's parser and builder are the real ones; what needs a GPU is a double that is checked against NVIDIA's classes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import Cli
from tensorrt_cases import lowered
from test_tensorrt_rtx import model_of, needs_rtx
from tiny_programs import CASES, Case

from edgewise import targets
from edgewise.errors import InputError, MissingExtra
from edgewise.targets.tensorrt import cuda, plans, rtx, session
from edgewise.targets.tensorrt.session import TensorRTSession

pytestmark = needs_rtx
if rtx.installed():
    import tensorrt_double
    from tensorrt_double import Driver, TensorRT


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    torch.manual_seed(0)
    one = CASES["block"]()
    return one, lowered(one.exported, tmp_path_factory.mktemp("m"), outputs=len(one.expected))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(cuda, "_load", lambda: made)
    return made


@pytest.fixture
def trt(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """TensorRT 10.3 on an Orin, as a Jetson has it."""
    import torch._dynamo  # noqa: F401  looks for the package of this name when it is first imported

    made = TensorRT(driver)
    monkeypatch.setitem(sys.modules, "tensorrt", made)  # type: ignore[arg-type]
    monkeypatch.setattr(session, "installed", lambda: True)
    return made


def test_numbers_times_and_memory(program: tuple[Case, Path], trt: TensorRT, driver: Driver) -> None:
    one, path = program
    with targets.get("tensorrt").load([path]) as device:
        assert isinstance(device, TensorRTSession) and device.stand_in is None and device.stages() is None
        assert [info.name for info in device.inputs] == list(one.feeds)
        assert {i.name: (i.shape, i.dtype) for i in device.outputs} == {
            name: (value.shape, value.dtype.name) for name, value in one.expected.items()
        }
        for _ in range(2):  # the buffers are used again
            found = device.run(one.feeds)
            for name, expected in one.expected.items():
                np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
        stages = device.stages()
        assert stages is not None and {name: round(times[0] * 1e3) for name, times in stages.items()} == {
            "copy in": len(one.feeds), "compute": 5, "copy out": len(one.expected),
        }  # fmt: skip
        assert device.placement() == {"GPU": rtx.parse(path)}
        with pytest.raises(InputError, match="has shape"):
            device.run({name: value[..., :1].copy() for name, value in one.feeds.items()})
        assert driver.memory and driver.streams and driver.events
    assert not driver.memory and not driver.streams and not driver.events
    device.close()
    with pytest.raises(InputError, match="this session was closed"):
        device.run(one.feeds)


def test_an_engine_is_built_once(program: tuple[Case, Path], trt: TensorRT, driver: Driver, tmp_path: Path) -> None:
    one, source = program
    path = Path(shutil.copy(source, tmp_path))

    def load() -> None:
        with TensorRTSession(path, trt, cuda.Cuda()) as device:
            np.testing.assert_allclose(device.run(one.feeds)["o0"], one.expected["o0"], rtol=1e-4, atol=1e-5)

    def kept() -> list[Path]:
        return sorted(plans.folder().glob("*.engine"))

    load()
    load()
    (first,) = kept()
    assert trt.builds == 1 and "-sm87-Orin" in first.name
    # What is wrong with a kept engine is said, and it is built again.
    trt.__version__ = "10.7.0"
    with pytest.warns(UserWarning, match=r"built for tensorrt 10\.3\.0, and here is 10\.7\.0; it is built again"):
        load()
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match=r"\.engine is damaged; it is built again"):
        load()
    plans.note_of(first).write_text("{}")
    with pytest.warns(UserWarning, match="does not say what"):
        load()
    trt._plans.clear()  # TensorRT itself refuses it
    with pytest.warns(UserWarning, match="the plan is not one of this version; it is built again"):
        load()
    assert trt.builds == 5 and kept() == [first]
    # Another board, and another model: engines of their own. One that was copied under their name is found out.
    driver.name, driver.capability = b"Thor", (11, 0)
    load()
    (second,) = set(kept()) - {first}
    for file in (first, plans.note_of(first)):
        shutil.copy(file, str(file).replace(first.name, second.name))
    with pytest.warns(UserWarning, match="built for device sm87 Orin, and here is sm110 Thor"):
        load()
    from edgewise.targets.onnx.stream import _varint

    path.write_bytes(path.read_bytes() + b"\x1a" + _varint(4) + b"else")  # another name of the producer's version
    load()
    assert trt.builds == 8 and len(kept()) == 3
    assert json.loads(plans.note_of(second).read_text())["tensorrt"] == "10.7.0"


def test_weights_in_a_file_of_their_own(trt: TensorRT, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above 2 GB: they are part of what an engine is kept for, and their absence is named."""
    from edgewise.targets.onnx import lower

    monkeypatch.setattr(lower, "EXTERNAL_ABOVE", 10_000)
    torch.manual_seed(0)
    one = CASES["block"]()
    path = lowered(one.exported, tmp_path, outputs=len(one.expected))
    data = path.with_name(path.name + ".data")
    with TensorRTSession(path, trt, cuda.Cuda()) as device:
        np.testing.assert_allclose(device.run(one.feeds)["o0"], one.expected["o0"], rtol=1e-4, atol=1e-5)
    before = plans.digest(path)
    data.write_bytes(bytes(data.stat().st_size))
    assert plans.digest(path) != before
    data.unlink()
    with pytest.raises(InputError, match=r"TensorRT 10\.3\.0 cannot read .*\.onnx") as caught:
        TensorRTSession(path, trt, cuda.Cuda())
    assert data.name in str(caught.value)


def test_refusals(program: tuple[Case, Path], trt: TensorRT, driver: Driver, tmp_path: Path) -> None:
    one, path = program
    floats = 1
    bad = model_of(tmp_path / "s.onnx", "Det", {"x": (floats, [4, 4])}, (floats, []))
    with pytest.raises(InputError, match=r"TensorRT 10\.3\.0 cannot read .*s\.onnx:\n.*the parser has no such op\n    way round"):
        TensorRTSession(bad, trt, cuda.Cuda())
    many = model_of(tmp_path / "k.onnx", "TopK", {"x": (floats, [1, 6000])}, (7, [1, 5000]), constants={"k": [5000]})
    with pytest.raises(InputError, match=r"cannot build k\.onnx for sm87 Orin:\n.*3840"):
        TensorRTSession(many, trt, cuda.Cuda())
    assert not plans.folder().exists()
    for call in ("cuMemAlloc_v2", "cuEventCreate", "cuStreamCreate"):
        driver.fail = {call: 2}
        with pytest.raises(InputError, match=rf"CUDA: {call} failed with 2 \(out of memory\)"):
            TensorRTSession(path, trt, cuda.Cuda())
        driver.fail = {}
        assert not driver.memory and not driver.streams and not driver.events
    with TensorRTSession(path, trt, cuda.Cuda()) as device:
        trt.broken = True
        with pytest.raises(InputError, match=r"TensorRT 10\.3\.0 cannot run the engine: it gave no reason"):
            device.run(one.feeds)


def test_where_there_is_no_device(
    program: tuple[Case, Path], trt: TensorRT, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = program
    target = targets.get("tensorrt")
    monkeypatch.setattr(driver, "fail", {"cuInit": 100})
    with target.load([path]) as here:
        assert here.stand_in is not None and "there is no GPU that CUDA can use (CUDA: cuInit failed with 100" in here.stand_in
    trt.__version__ = "8.6.1"
    with target.load([path]) as here:
        assert here.stand_in is not None and "TensorRT 8.6.1 is older than 10.0" in here.stand_in
    assert target.versions(runtime_only=True) == {"onnxruntime": target.requirements[0].installed}
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with target.load([path]) as here:
        assert here.stand_in is not None and "is not NVIDIA's" in here.stand_in
    monkeypatch.setattr(session, "installed", lambda: False)
    with target.load([path]) as here:
        assert here.stand_in is not None and "the package tensorrt is not here" in here.stand_in
    # Neither one nor the other.
    monkeypatch.setattr(type(target.requirements[0]), "installed", property(lambda self: None))
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed; .*edgewise\[onnxruntime\]"):
        target.check(runtime_only=True)
    monkeypatch.setattr(session, "installed", lambda: True)
    assert target.check(runtime_only=True) == []


def test_no_driver() -> None:
    """What this machine itself says, or the session that it can make."""
    try:
        found = session.device()
    except session.NoDevice as reason:
        assert "there is no GPU that CUDA can use" in str(reason)
    else:
        assert found.capability.startswith("sm")


def test_bench_on_a_device(trt: TensorRT, tiny: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "b"
    made = cli("export", f"{tiny}:make", "--target", "tensorrt", "-o", out)
    assert made.code == 0 and trt.builds == 0, "an export builds nothing for the device that it runs on"
    options = ("--target", "tensorrt", "--samples", "4", "--seconds", "0", "--no-cold", "--json")
    (on_device,) = cli("bench", out, *options).document["measurements"]
    assert on_device["stand_in"] is None and on_device["runtime_versions"]["tensorrt"] == "10.3.0" and trt.builds == 1
    assert list(on_device["stages"]) == list(session.STAGES) and on_device["stages"]["compute"]["samples_ms"][0] == pytest.approx(5)
    assert on_device["accuracy"]["passed"] and on_device["placement"]["GPU"] > 0
    monkeypatch.setattr(session, "installed", lambda: False)
    (on_cpu,) = cli("bench", out, *options).document["measurements"]
    assert "the package tensorrt is not here" in on_cpu["stand_in"] and on_cpu["stages"] is None
    assert any("these are not the times of a device" in reason for reason in on_cpu["reasons"])


def test_the_double_has_nvidias_names() -> None:
    """Every method that the session may call of a double is one of NVIDIA's class; those of the parser and builder are real."""
    real = rtx.package()
    for double, name in ((tensorrt_double.Engine, "ICudaEngine"), (tensorrt_double.Context, "IExecutionContext")):
        ours = {word for word in vars(double) if not word.startswith("_")}
        assert ours and ours <= set(dir(getattr(real, name)))
    assert {"num_io_tensors", "num_layers"} <= set(dir(real.ICudaEngine)) and hasattr(real.Runtime, "deserialize_cuda_engine")
    for word in ("create_network", "create_builder_config", "build_serialized_network"):
        assert hasattr(real.Builder, word)
