"""Packages that are not what they should be: each fault is named, and nothing outside of the package is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli
from coreml_packages import ct, flexible, from_mil, mb, stateful, types

import edgewise
from edgewise.errors import InputError
from edgewise.targets.coreml.package import Package
from edgewise.targets.coreml.schema import MESSAGES, Model
from edgewise.targets.coreml.session import InterpreterSession

RNG = np.random.default_rng(5)
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def small(x: Any) -> Any:
    """Few ops, of many kinds."""
    y = mb.conv(x=x, weight=f(4, 2, 3, 3), bias=f(4), pad_type="custom", pad=[1, 1, 1, 1], strides=[2, 2])
    y = mb.reshape(x=y, shape=[1, 4, -1])
    y = mb.layer_norm(x=y, axes=[-1], gamma=f(9), beta=f(9))
    data = RNG.integers(-8, 8, (6, 9)).astype(np.int8)
    y = mb.linear(x=y, weight=mb.constexpr_blockwise_shift_scale(data=data, scale=f(6, 1)), bias=f(6))
    y = mb.softmax(x=mb.gelu(x=y, mode="EXACT"), axis=-1)
    y = mb.gather(x=y, indices=np.array([3, 0, 0], np.int32), axis=1)
    y = mb.concat(values=[y, mb.tile(x=mb.reduce_max(x=y, axes=[1], keep_dims=True), reps=[1, 2, 1])], axis=1)
    y = mb.slice_by_index(x=y, begin=[0, 1, 0], end=[1, 5, 6], stride=[1, 2, 1])
    values, indices = mb.topk(x=y, k=2, axis=-1)
    return mb.matmul(x=values, y=mb.cast(x=indices, dtype="fp32"), transpose_y=True)


def looping(x: Any) -> Any:
    def body(a: Any, n: Any) -> Any:
        return mb.add(x=a, y=x), mb.add(x=n, y=1.0)

    y, _ = mb.while_loop(_cond=lambda a, n: mb.less(x=n, y=3.0), _body=body, loop_vars=(x, 0.0))
    return mb.cond(
        pred=mb.greater(x=mb.reduce_sum(x=y, keep_dims=False), y=0.0),
        _true_fn=lambda: mb.pad(x=y, pad=[1, 1], mode="constant", constant_val=1.0),
        _false_fn=lambda: mb.tile(x=mb.slice_by_index(x=y, begin=[0, 0], end=[3, 3]), reps=[1, 2]),
    )


def various(x: Any) -> Any:
    """What `small` does not have, in half precision."""
    h = np.float16
    y = mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True)
    y = mb.conv_transpose(x=y, weight=f(2, 3, 3, 3).astype(h), strides=[2, 2], pad_type="valid")
    y = mb.resize_bilinear(x=y, target_size_height=4, target_size_width=5, sampling_mode="UNALIGN_CORNERS")
    y = mb.dequantize(input=mb.quantize(input=y, scale=h(0.1), output_dtype="int8"), scale=h(0.1))
    rows = mb.reshape(x=y, shape=[12, 5])
    lut = mb.constexpr_lut_to_dense(indices=UINT2, lut=f(1, 1, 4, 1).astype(h))
    sparse = mb.constexpr_sparse_to_dense(nonzero_data=f(3).astype(h), mask=MASK)
    rows = mb.add(x=mb.linear(x=rows, weight=lut), y=sparse)
    first, second = mb.split(x=rows, num_splits=2, axis=0)
    rows = mb.scatter(
        data=first,
        indices=np.array([0, 2, 2], np.int32),
        updates=mb.slice_by_size(x=second, begin=[0, 0], size=[3, 6]),
        axis=0,
        mode="add",
    )
    rows = mb.scatter_nd(
        data=rows,
        indices=np.array([[1], [4]], np.int32),
        updates=mb.gather_nd(x=second, indices=[[0], [5]]),
        mode="update",
    )
    rows = mb.mul(
        x=rows, y=mb.one_hot(indices=[0, 1, 2, 3, 4, 5], one_hot_vector_size=6, on_value=h(1), off_value=h(2))
    )
    rows = mb.reverse_sequence(
        x=mb.band_part(x=rows, lower=3, upper=2), lengths=[1, 2, 3, 4, 5, 6], seq_axis=1, batch_axis=0
    )
    q = mb.reshape(x=mb.pad(x=rows, pad=[0, 0, 1, 1], mode="reflect"), shape=[1, 2, 3, 8])
    return mb.scaled_dot_product_attention(query=q, key=q, value=mb.cumsum(x=q, axis=2))


UINT2 = RNG.integers(0, 4, (6, 5)).astype(types.nptype_from_builtin(types.uint2))
MASK = np.array([1, 0, 0, 1, 1, 0], np.uint8).astype(types.nptype_from_builtin(types.uint1))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_mil(tmp_path_factory.mktemp("small"), small, {"x": np.ones((1, 2, 6, 6), np.float32)})


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_mil(tmp_path_factory.mktemp("loop"), looping, {"x": np.ones((3, 4), np.float32)})


@pytest.fixture(scope="module")
def zoo(package: Path, loop: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small packages that together have most of what there is."""
    folder = tmp_path_factory.mktemp("zoo")
    others = from_mil(folder, various, {"x": np.ones((1, 2, 6, 6), np.float16)})
    return [package, loop, others, stateful(folder), flexible(folder, "range"), flexible(folder, "enumerated")]


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the model's message."""
    model = Model()
    model.ParseFromString((path / MODEL).read_bytes())
    change(model)
    (path / MODEL).write_bytes(model.SerializeToString())


def operations(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def op_named(model: Any, kind: str) -> Any:
    return next(one for one in operations(model) if one.type == kind)


def feeds(session: InterpreterSession) -> dict[str, np.ndarray]:
    return {info.name: np.ones(info.shape, info.dtype) for info in session.inputs}


def run(path: Path, **options: Any) -> dict[str, np.ndarray]:
    session = InterpreterSession(path, **options)
    return session.run(feeds(session))


def test_the_schema_is_that_of_coremltools() -> None:
    """Every field that is declared has the number, name and type that coremltools' own message classes have."""
    from coremltools import proto

    seen: set[str] = set()

    def compare(ours: Any, theirs: Any) -> None:
        if ours.name in seen:
            return
        seen.add(ours.name)
        for field in ours.fields:
            other = theirs.fields_by_number[field.number]
            assert (field.name, field.is_repeated) == (other.name, other.is_repeated), (ours.name, field.name)
            if field.message_type is not None:
                compare(field.message_type, other.message_type)
            else:
                assert field.type == other.type or (field.type, other.type) == (field.TYPE_INT32, field.TYPE_ENUM)

    compare(Model.DESCRIPTOR, proto.Model_pb2.Model.DESCRIPTOR)
    assert set(MESSAGES) <= seen


def test_types_have_the_numbers_of_coremltools() -> None:
    from coremltools import proto

    from edgewise.targets.coreml.interpreter.values import DTYPES

    names = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64"}
    for number, dtype in DTYPES.items():
        name = proto.MIL_pb2.DataType.Name(number)
        assert names.get(name, name.lower()) == dtype.name


def test_running_a_package_imports_neither_torch_nor_coremltools(package: Path) -> None:
    code = f"""
import sys
for name in ("torch", "coremltools", "transformers", "scipy"):
    sys.modules[name] = None  # importing it is an error
import numpy as np
from edgewise.targets.coreml.session import InterpreterSession
session = InterpreterSession({str(package)!r})
session.run({{info.name: np.ones(info.shape, info.dtype) for info in session.inputs}})
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ours_and_coremltools_classes_live_in_one_process(package: Path) -> None:
    spec = ct.utils.load_spec(str(package))
    assert spec.SerializeToString(deterministic=True) and run(package)


NO_MODEL = {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "com.apple.CoreML/none.mlmodel"}}}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"{}", "does not say where the model is"),
        (b'{"rootModelIdentifier": "a", "itemInfoEntries": {}}', "does not say where the model is"),
        (b'{"rootModelIdentifier": ["a"], "itemInfoEntries": {}}', "does not say where the model is"),
        (b'{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 5}}}', "path is 5"),
        (json.dumps(NO_MODEL).encode(), "No such file"),
        (b"x" * (2 << 20), "at most"),
        *(
            (
                json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": path}}}).encode(),
                "not allowed in a package",
            )
            for path in ("../../secret", "/etc/passwd", "a/../../../b", "", "a\\b", "C:/x", "a\0b", "./a")
        ),
    ],
)
def test_a_manifest_that_is_wrong(manifest: bytes, message: str, copy: Path) -> None:
    (copy / "Manifest.json").write_bytes(manifest)
    with pytest.raises(InputError, match=message):
        Package.open(copy)


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "no Manifest.json"),
        (Path(__file__), "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            Package.open(path)


@pytest.mark.parametrize("name", ["Manifest.json", MODEL, WEIGHTS, "Data/com.apple.CoreML/weights", "Data"])
def test_a_link_is_not_followed(name: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).rename(tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link"):
        run(copy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_waited_for(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    os.mkfifo(copy / WEIGHTS)
    with pytest.raises(InputError, match="not a plain file"):
        run(copy)


def test_a_model_that_is_not_a_protobuf(copy: Path) -> None:
    (copy / MODEL).write_bytes(b"\x0a\xff\xff\xff\xff\x0f")
    with pytest.raises(InputError, match="is not a Core ML model, or is damaged"):
        run(copy)


def test_a_message_that_is_nested_without_end(copy: Path) -> None:
    """Protobuf's parser stops at a depth of its own; blocks within blocks are such a message."""
    depth = 100_000
    data = b""
    for _ in range(200):
        data = b"\x22" + _varint(len(data)) + data  # Operation.blocks -> Block.operations -> ...
        data = b"\x1a" + _varint(len(data)) + data
    assert depth > len(data) > 200
    block = b"\x12" + _varint(len(data)) + data
    entry = b"\x0a\x01o" + block
    function = b"\x1a" + _varint(len(entry)) + entry
    entry = b"\x0a\x04main\x12" + _varint(len(function)) + function
    program = b"\x12" + _varint(len(entry)) + entry
    (copy / MODEL).write_bytes(b"\xb2\x1f" + _varint(len(program)) + program)
    with pytest.raises(InputError, match="is not a Core ML model, or is damaged"):
        run(copy)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_a_neural_network_is_no_ml_program(copy: Path) -> None:
    edit(copy, lambda model: model.ClearField("mlProgram"))
    with pytest.raises(InputError, match="holds no ML Program"):
        run(copy)


def test_weights_that_are_missing_or_cut_off(copy: Path) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"weight.bin: the blob at \d+ .*outside of the file"):
        run(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"cannot read .*weight.bin"):
        run(copy)


@pytest.mark.parametrize("offset", [1 << 20, (1 << 64) - 64, (1 << 64) - 1, 8])
def test_a_blob_outside_of_its_file(offset: int, copy: Path) -> None:
    def change(model: Any) -> None:
        value = next(
            one for one in operations(model) if one.type == "const" and one.attributes["val"].HasField("blobFileValue")
        ).attributes["val"]
        value.blobFileValue.offset = offset

    edit(copy, change)
    with pytest.raises(InputError, match=r"op .*lies outside of the file|does not start with the mark of a blob"):
        run(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("<I", 0, "mark of a blob"), ("4x<I", 4, "is of type int8, and the model says fp32")],
)
def test_a_blob_whose_header_is_wrong(field: str, value: int, message: str, copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    at = 4 if field.startswith("4x") else 0
    data[64 + at : 68 + at] = struct.pack("<I", value)
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match=message):
        run(copy)


@pytest.mark.parametrize(("at", "value"), [(8, 1 << 40), (16, 1 << 40), (16, (1 << 64) - 1), (8, 4)])
def test_a_blob_whose_size_or_place_is_wrong(at: int, value: int, copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[64 + at : 72 + at] = struct.pack("<Q", value)
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match=r"outside of the file|and the model says"):
        run(copy)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "@model_path/../../../../secret", "weights/weight.bin", "@model_path//etc/passwd"]
)
def test_weights_outside_of_the_package(name: str, copy: Path) -> None:
    def change(model: Any) -> None:
        for one in operations(model):
            if one.type == "const" and one.attributes["val"].HasField("blobFileValue"):
                one.attributes["val"].blobFileValue.fileName = name

    edit(copy, change)
    with pytest.raises(InputError, match=r"not allowed in a package|does not start with @model_path"):
        run(copy)


def test_an_op_that_is_not_known(copy: Path) -> None:
    def change(model: Any) -> None:
        op_named(model, "softmax").type = "hardmax"

    edit(copy, change)
    with pytest.raises(
        InputError, match=r"function 'main', op \d+ \(hardmax 'softmax_0'\): .*does not know the op 'hardmax'"
    ):
        InterpreterSession(copy)


def test_a_value_that_refers_to_itself_or_to_a_later_one(copy: Path) -> None:
    def to_itself(model: Any) -> None:
        op = op_named(model, "softmax")
        op.inputs["x"].arguments[0].name = op.outputs[0].name

    edit(copy, to_itself)
    with pytest.raises(
        InputError, match=r"\(softmax 'softmax_0'\): input 'x' is 'softmax_0', which nothing before it defines"
    ):
        InterpreterSession(copy)

    def to_a_later_one(model: Any) -> None:
        op_named(model, "softmax").inputs["x"].arguments[0].name = op_named(model, "matmul").outputs[0].name

    edit(copy, to_a_later_one)
    with pytest.raises(InputError, match="which nothing before it defines"):
        InterpreterSession(copy)


def test_a_name_that_is_defined_twice(copy: Path) -> None:
    def change(model: Any) -> None:
        op_named(model, "softmax").outputs[0].name = "x"

    edit(copy, change)
    with pytest.raises(InputError, match="defines the name 'x', which is there already"):
        InterpreterSession(copy)


def test_a_loop_without_end(loop: Path, tmp_path: Path) -> None:
    assert run(loop).popitem()[1].shape == (3, 6)
    copy = Path(shutil.copytree(loop, tmp_path / "copy.mlpackage"))

    def change(model: Any) -> None:
        for one in op_named(model, "while_loop").blocks[0].operations:
            if one.type == "less":
                one.type = "greater_equal"
                one.inputs["y"].arguments[0].name = one.inputs["x"].arguments[0].name

    edit(copy, change)
    with pytest.raises(InputError, match="the program did not end after 5000 ops"):
        run(copy, max_steps=5000)


def test_huge_shapes_are_refused_before_they_are_made(copy: Path) -> None:
    def change(model: Any) -> None:
        op = op_named(model, "tile")
        for dimension in op.outputs[0].type.tensorType.dimensions:
            dimension.constant.size = 1 << 40

    edit(copy, change)
    with pytest.raises(InputError, match=r"\(tile .*it needs \d+ bytes beside"):
        run(copy)


def test_an_op_may_not_make_more_than_it_declares(copy: Path) -> None:
    """The repetitions ask for terabytes, and the declared shape stays small."""

    def change(model: Any) -> None:
        name = op_named(model, "tile").inputs["reps"].arguments[0].name
        const = next(one for one in operations(model) if one.type == "const" and one.outputs[0].name == name)
        const.attributes["val"].immediateValue.tensor.ints.values[:] = [1 << 20, 1 << 10, 1 << 10]

    edit(copy, change)
    with pytest.raises(
        InputError, match=r"\(tile .*its output would be of shape .*, and is declared as fp32\[1, 2, 6\]"
    ):
        run(copy)


@pytest.mark.parametrize("field", ["shape", "type"])
def test_a_declared_type_that_is_wrong(field: str, copy: Path) -> None:
    def change(model: Any) -> None:
        tensor = op_named(model, "gelu").outputs[0].type.tensorType
        if field == "shape":
            tensor.dimensions[1].constant.size = 5
        else:
            tensor.dataType = 23

    edit(copy, change)
    with pytest.raises(
        InputError, match=r"\(gelu 'gelu_0'\): it was computed as float32\[1, 4, 6\], and is declared as"
    ):
        run(copy)


def test_inputs_that_do_not_fit(package: Path) -> None:
    session = InterpreterSession(package)
    good = feeds(session)
    for bad, message in (
        ({}, "input 'x' is missing"),
        ({"y": good["x"]}, "unknown input 'y'"),
        ({"x": good["x"][:, :1]}, r"shape \(1, 1, 6, 6\)"),
        ({"x": good["x"].astype(np.float64)}, "must be float32"),
    ):
        with pytest.raises(InputError, match=message):
            session.run(bad)
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(good)


def test_the_verb_run(package: Path, copy: Path, tmp_path: Path, cli: Cli) -> None:
    x = f(1, 2, 6, 6)
    np.savez(tmp_path / "x.npz", x=x)
    said = cli("run", package, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz", "--json")
    assert said.code == 0 and said.document["role"] == "main"
    (name,) = said.document["outputs"]
    with np.load(tmp_path / "y.npz") as file:
        np.testing.assert_array_equal(file[name], InterpreterSession(package).run({"x": x})[name])
    cli("run", package, "--inputs", tmp_path / "x.npz", "--role", "mian").refused(
        "unknown function 'mian': did you mean 'main'"
    )
    cli("run", package, "--inputs", tmp_path / "x.npz", "--target", "openvino").refused("is a Core ML package")
    for verb in (("bench", package), ("inspect", package), ("lint", package, "--target", "coreml")):
        cli(*verb).refused("is a Core ML package", "`edgewise run` runs it")
    np.savez(tmp_path / "bad.npz", x=x[:, :1])
    cli("run", package, "--inputs", tmp_path / "bad.npz").refused("input 'x' has shape (1, 1, 6, 6)")
    (copy / WEIGHTS).write_bytes(b"short")
    cli("run", copy, "--inputs", tmp_path / "x.npz").refused("weight.bin", "outside of the file")
    cli("run", tmp_path / "none.mlpackage", "--inputs", tmp_path / "x.npz").refused("does not exist")


def test_damaged_packages_end_in_an_error_of_ours(zoo: list[Path]) -> None:
    """Some thousands of packages with flipped bits, cut and spliced files, and changed fields: see `coreml_fuzz.py`."""
    script = Path(__file__).with_name("coreml_fuzz.py")
    path = [str(Path(edgewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(script), "1", "2400", *map(str, zoo)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    # Some damage does no harm, most does; if nothing ran, or nothing was refused, the fuzzer would test nothing.
    assert sum(results.values()) == 2400 and results["ran"] > 100 and results["refused"] > 1000
