"""Every program on every target: the names, the numbers, the bytes, and what is said when it cannot be done."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_programs import CASES, Case, Unknown, case

from edgewise import targets
from edgewise.errors import InputError
from edgewise.exporter.half import rounded
from edgewise.targets.base import Session
from edgewise.verify import compare

NAMES = ("onnxruntime", "openvino")
LIMIT = 1e-5


@functools.cache
def program(name: str, precision: str = "fp32") -> Case:
    torch.manual_seed(0)
    return CASES[name]() if precision == "fp32" else halved(program(name))


def halved(one: Case) -> Case:
    """The case with the weights that half-precision storage leaves, and what these give."""
    exported = rounded(one.exported)
    args, kwargs = exported.example_inputs
    outputs = torch.utils._pytree.tree_leaves(exported.module()(*args, **kwargs))
    expected = {name: value.detach().numpy() for name, value in zip(one.expected, outputs, strict=True)}
    return Case(exported, one.feeds, expected)


def lowered(target: str, one: Case, folder: Path, precision: str = "fp32", stem: str = "m") -> list[Path]:
    return targets.get(target).lower(
        one.exported,
        folder,
        stem,
        precision=precision,
        input_names=one.input_names,
        output_names=one.output_names,
    )


Artifacts = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Files of a program on a target, made once: `artifact(target, name, precision)`."""

    @functools.cache
    def make(target: str, name: str, precision: str = "fp32") -> list[Path]:
        return lowered(target, program(name, precision), tmp_path_factory.mktemp(f"{target}-{name}"), precision)

    return make


def loaded(target: str, files: list[Path]) -> Session:
    return targets.get(target).load(files, threads=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", NAMES)
def test_the_artifact_computes_the_program(
    target: str, name: str, precision: str, artifact: Artifacts
) -> None:
    one = program(name, precision)
    with loaded(target, artifact(target, name, precision)) as session:
        for info, array in zip(session.inputs, one.feeds.values(), strict=True):
            assert (info.shape, info.dtype) == (array.shape, array.dtype.name)
        assert [info.name for info in session.inputs] == one.input_names
        assert [info.name for info in session.outputs] == one.output_names
        outputs = session.run(one.feeds)
    for key, expected in one.expected.items():
        assert (outputs[key].shape, outputs[key].dtype) == (expected.shape, expected.dtype)
        errors = compare(expected, outputs[key])
        assert errors.relative is not None and errors.relative <= LIMIT, (key, errors)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", NAMES)
def test_two_lowerings_are_byte_identical(
    target: str, precision: str, artifact: Artifacts, tmp_path: Path
) -> None:
    first = artifact(target, "block", precision)
    artifact(target, "odd", precision)  # counters of names go on in between
    for path in lowered(target, program("block", precision), tmp_path, precision):
        assert path.read_bytes() == first[0].with_name(path.name).read_bytes()


AGAIN = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
from pathlib import Path
import torch, tiny_programs
from test_targets_lowering import NAMES, lowered
for target in NAMES:
    torch.manual_seed(0)
    lowered(target, tiny_programs.block(), Path({folder!r}))
"""


def test_another_process_and_folder_give_the_same_bytes(artifact: Artifacts, tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = AGAIN.format(here=str(here), root=str(here.parent), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(list(tmp_path.iterdir())) == 3
    for path in [path for target in NAMES for path in artifact(target, "block")]:
        data = path.read_bytes()
        assert data == (tmp_path / path.name).read_bytes()
        for secret in (str(path.parent), str(here), "site-packages", "tiny_programs", ".py"):
            assert secret.encode() not in data


@pytest.mark.parametrize("target", NAMES)
def test_fp16_halves_the_weights(target: str, tmp_path: Path) -> None:
    wide = halved(case(torch.nn.Linear(512, 512), torch.randn(1, 512)))
    sizes = [
        sum(path.stat().st_size for path in lowered(target, wide, tmp_path, precision, precision))
        for precision in ("fp32", "fp16")
    ]
    assert sizes[1] < 0.53 * sizes[0]


@pytest.mark.parametrize("target", NAMES)
def test_fp16_stores_without_loss(target: str, tmp_path: Path) -> None:
    """Rounded weights, and those that half precision cannot hold: too large, infinite, or not rounded at all."""
    layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
    layers[0].weight.data[3, 3] = 1e6
    layers[1].weight.data[:, 5] = 1e-7  # below the normal numbers of half precision
    one = halved(case(torch.nn.Sequential(*layers), torch.randn(1, 32)))
    one.exported.state_dict["3.weight"].data[0, 0] = 1 / 3
    one.exported.state_dict["2.bias"].data[0] = 1 / 3
    expected = one.exported.module()(torch.from_numpy(one.feeds["i0"])).detach().numpy()
    with loaded(target, lowered(target, one, tmp_path, "fp16")) as session:
        errors = compare(expected, session.run(one.feeds)["o0"])
    assert errors.relative is not None and errors.relative < 1e-6
    sizes = {precision: lowered(target, one, tmp_path, precision, precision) for precision in ("fp32", "fp16")}
    saved = [sum(path.stat().st_size for path in sizes[precision]) for precision in ("fp32", "fp16")]
    assert saved[0] > saved[1]


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("room", [0.1, 0.9])
def test_a_full_disk_is_an_os_error(target: str, room: float, artifact: Artifacts, tmp_path: Path) -> None:
    files = artifact(target, "block")
    # With 0.9 OpenVINO has room for the weights, and not for the graph.
    size = int(sum(path.stat().st_size for path in files) * room)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root")
    try:
        with pytest.raises(OSError, match="No space left"):
            lowered(target, program("block"), tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) in ([], [".onnx"])
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("target", NAMES)
def test_the_program_is_not_changed(target: str, tmp_path: Path) -> None:
    one = program("block")
    before = (str(one.exported.graph), {key: value.clone() for key, value in one.exported.state_dict.items()})
    lowered(target, one, tmp_path, "fp16")
    assert str(one.exported.graph) == before[0]
    assert all(torch.equal(value, one.exported.state_dict[key]) for key, value in before[1].items())


@pytest.mark.parametrize("target", NAMES)
def test_names_may_be_those_of_values_inside(target: str, tmp_path: Path) -> None:
    one = program("block")
    inner = [node.name for node in one.exported.graph.nodes if node.op == "call_function"]
    names = [inner[3], "head.weight", *inner[-2:]]
    for input_name, *output_names in (
        names[:3],
        names[1:4],
        ("linear", "image", "linear_1"),
        ("o1", "i0", "o0"),
    ):
        files = targets.get(target).lower(
            one.exported, tmp_path, "m", precision="fp32", input_names=[input_name], output_names=output_names
        )
        with targets.get(target).load(files) as session:
            outputs = session.run({input_name: one.feeds["i0"]})
        assert list(outputs) == output_names
        for got, expected in zip(outputs.values(), one.expected.values(), strict=True):
            assert np.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("target", NAMES)
def test_wrong_names_are_refused(target: str, tmp_path: Path) -> None:
    one = program("block")
    for inputs, outputs in (
        (["a"], ["b"]),
        (["a", "b"], ["c", "d"]),
        (["a"], ["b", "b"]),
        ([""], ["b", "c"]),
    ):
        with pytest.raises(InputError, match=f"target {target}"):
            targets.get(target).lower(
                one.exported, tmp_path, "m", precision="fp32", input_names=inputs, output_names=outputs
            )
    with pytest.raises(InputError, match="unknown precision"):
        lowered(target, one, tmp_path, "int3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", NAMES)
def test_an_op_without_a_rule_is_named(target: str, tmp_path: Path) -> None:
    one = case(Unknown(), torch.randn(3))
    with pytest.raises(InputError, match=f"target {target} cannot lower this program: .*bessel_j0") as caught:
        lowered(target, one, tmp_path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("target", NAMES)
def test_programs_that_are_not_static_or_keep_state(target: str, tmp_path: Path) -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x + self.count

    with pytest.raises(InputError, match="writes to count"):
        lowered(target, case(Counter(), torch.ones(2)), tmp_path)
    linear = torch.nn.Linear(4, 4)
    dynamic = torch.export.export(linear, (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(InputError, match="dynamic shape"):
        targets.get(target).lower(
            dynamic, tmp_path, "m", precision="fp32", input_names=["a"], output_names=["b"]
        )


@pytest.mark.parametrize("target", NAMES)
def test_lowering_says_nothing(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(target, program("odd"), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level


@pytest.mark.parametrize("target", NAMES)
def test_results_belong_to_the_caller(target: str, artifact: Artifacts) -> None:
    one = program("block")
    with loaded(target, artifact(target, "block")) as session:
        first = session.run(one.feeds)
        kept = first["o0"].copy()
        session.run({"i0": one.feeds["i0"] + 1})
        assert np.array_equal(first["o0"], kept)
        first["o0"][:] = 0


@pytest.mark.parametrize("target", NAMES)
def test_a_closed_session_says_so(target: str, artifact: Artifacts) -> None:
    session = loaded(target, artifact(target, "block"))
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(program("block").feeds)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "cut"])
def test_files_that_cannot_be_loaded(target: str, damage: str, artifact: Artifacts, tmp_path: Path) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in artifact(target, "block")]
    if damage == "missing":
        files[0].unlink()
    else:
        data = files[0].read_bytes()
        files[0].write_bytes({"empty": b"", "noise": b"\xff" * 500, "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(InputError, match="cannot load"):
        targets.get(target).load(files)


@pytest.mark.parametrize("target", NAMES)
def test_a_session_imports_no_torch(target: str, artifact: Artifacts, tmp_path: Path) -> None:
    from test_targets_base import imported

    one = program("block")
    files = [str(path) for path in artifact(target, "block")]
    np.save(tmp_path / "x.npy", one.feeds["i0"])
    code = f"""
import numpy, pathlib
from edgewise import targets
session = targets.get({target!r}).load([pathlib.Path(path) for path in {files!r}], threads=1)
assert session.run({{"i0": numpy.load({str(tmp_path / "x.npy")!r})}})["o1"].shape == (1, 10)
session.placement()
"""
    assert imported(code) == set()


def test_openvino_reads_most_programs_without_decomposing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgewise.targets.openvino import graph

    def never(exported: object) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(graph, "decomposed", never)
    for name in ("block", "masked_block", "merge", "odd", "convolutions", "synonyms"):
        lowered("openvino", program(name), tmp_path)


def test_onnx_exports_most_programs_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.onnx import export

    def never(exported: object) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(export, "decompose", never)
    for name in ("merge", "synonyms"):
        lowered("onnxruntime", program(name), tmp_path)


def test_openvino_keeps_equal_constants_once(tmp_path: Path) -> None:
    """Equal in type, shape and bits: not zeros of other signs, and not what a result is."""
    import openvino
    from openvino import opset13 as opset

    from edgewise.targets.openvino.lower import save

    x = opset.parameter([2], np.float32, name="x")
    arrays = [np.float32([0, 1]), np.float32([0, 1]), np.float32([-0.0, 1]), np.float32([[0, 1]]), np.float32([np.nan, 1])]
    made = [opset.add(x, opset.constant(one)) for one in arrays]
    made += [opset.divide(opset.constant(one), opset.constant(np.float32([0, 0]))) for one in arrays[1:3]]
    whole = opset.add(opset.convert(x, np.int32), opset.constant(np.int32([0, 1])))
    results = [opset.result(one) for one in [*made, whole, opset.constant(arrays[0])]]
    for i, result in enumerate(results):
        result.output(0).get_tensor().set_names({f"y{i}"})
    model = openvino.Model(results, [x])
    before = openvino.Core().compile_model(model, "CPU")({"x": np.float32([3, -0.0])})
    files = save(model, tmp_path, "m")
    after = openvino.Core().compile_model(files[0], "CPU")({"x": np.float32([3, -0.0])})
    for i in range(len(results)):
        np.testing.assert_array_equal(before[f"y{i}"], after[f"y{i}"])
        assert (np.signbit(before[f"y{i}"]) == np.signbit(after[f"y{i}"])).all()
    kept = [node.data for node in openvino.Core().read_model(files[0]).get_ops() if node.get_type_name() == "Constant"]
    assert len(kept) == 7  # of 11
    assert [one.dtype for one in kept].count(np.dtype(np.int32)) == 1


def test_large_onnx_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.onnx import lower

    monkeypatch.setattr(lower, "EXTERNAL_ABOVE", 10_000)
    one = program("block")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files = lowered("onnxruntime", one, tmp_path / folder)
    assert [path.name for path in files] == ["m.onnx", "m.onnx.data"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    with targets.get("onnxruntime").load(files) as session:
        assert np.allclose(session.run(one.feeds)["o0"], one.expected["o0"], atol=1e-5)


def test_streamed_onnx_is_what_protobuf_writes(artifact: Artifacts) -> None:
    import onnx

    model = onnx.load(artifact("onnxruntime", "block", "fp16")[0])
    assert model.ParseFromString(model.SerializeToString()) == len(model.SerializeToString())
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names)) > 5
    onnx.checker.check_model(model, full_check=True)


def test_rules_of_the_exporter_are_read_once() -> None:
    """And what others see of the exporter is as it was."""
    from torch.onnx._internal.exporter import _registration

    from edgewise.targets.onnx import export

    apis = _registration.onnxscript_apis
    before = apis.get_torchlib_ops
    with export._rules_read_once():
        first = apis.get_torchlib_ops()
        assert len(first) > 300 and apis.get_torchlib_ops() is first
    with export._rules_read_once():
        assert apis.get_torchlib_ops() is first
    assert apis.get_torchlib_ops is before
    with pytest.raises(ZeroDivisionError), export._rules_read_once():
        _ = 1 / 0
    assert apis.get_torchlib_ops is before
