"""Ops that take lists, make shapes, branch, loop or keep state, and functions of a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_packages import ct, flexible, from_mil, mb, stateful
from torch import nn

from edgewise.errors import InputError
from edgewise.targets.coreml.schema import Model
from edgewise.targets.coreml.session import InterpreterSession, functions

RNG = np.random.default_rng(11)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


A, B, C = f(2, 3, 4), f(2, 3, 4), f(2, 5, 4)

LISTS: list[tuple[str, Callable[..., Any], list[np.ndarray], Callable[..., np.ndarray]]] = [
    ("concat", lambda a, b: mb.concat(values=[a, b], axis=1), [A, C], lambda a, b: np.concatenate([a, b], 1)),
    (
        "concat",
        lambda a, b: mb.concat(values=[a, b], axis=1, interleave=True),
        [A, B],
        lambda a, b: np.stack([a, b], 2).reshape(2, 6, 4),
    ),
    ("stack", lambda a, b: mb.stack(values=[a, b], axis=-1), [A, B], lambda a, b: np.stack([a, b], -1)),
    (
        "einsum",
        lambda a, b: mb.einsum(values=(a, b), equation="bkhc,bchq->bkhq"),
        [f(2, 6, 4, 3), f(2, 3, 4, 5)],
        lambda a, b: np.einsum("bkhc,bchq->bkhq", a, b),
    ),
    (
        "einsum",
        lambda a, b: mb.einsum(values=(a, b), equation="nchw,nwhu->nchu"),
        [f(2, 3, 1, 5), f(1, 5, 4, 6)],
        lambda a, b: np.einsum("nchw,nwhu->nchu", np.repeat(a, 4, 2), np.repeat(b, 2, 0)),
    ),
    (
        "fill",
        lambda a, b: mb.fill(shape=mb.shape(x=a), value=2.5),
        [A, B],
        lambda a, b: np.full(a.shape, 2.5, np.float32),
    ),
    (
        "range_1d",
        lambda a, b: mb.range_1d(start=a, end=b, step=-3),
        [np.int32([9])[0], np.int32([-2])[0]],
        lambda a, b: np.arange(9, -2, -3),
    ),
    (
        "reshape_like",
        lambda a, b: mb.reshape_like(x=a, ref_tensors=(b, b), begins=[1, 0], ends=[0, 1], end_masks=[True, False]),
        [f(6, 4), f(4, 3, 2)],
        lambda a, b: a.reshape(3, 2, 4),
    ),
    (
        "space_to_batch",
        lambda a, b: mb.space_to_batch(x=a, block_shape=[2, 3], paddings=[[1, 0], [0, 2]]),
        [np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4), A],
        lambda a, b: np.stack([np.pad(a[0, 0], ((1, 0), (0, 2)))[r::2, c::3] for r in range(2) for c in range(3)])[
            :, None
        ],
    ),
    (
        "batch_to_space",
        lambda a, b: mb.batch_to_space(
            x=mb.space_to_batch(x=a, block_shape=[2, 3], paddings=[[1, 0], [0, 2]]),
            block_shape=[2, 3],
            crops=[[1, 0], [0, 2]],
        ),
        [f(2, 3, 5, 7), A],
        lambda a, b: a,
    ),
    (
        "cond",
        lambda a, b: mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=a, keep_dims=False), y=0.0),
            _true_fn=lambda: mb.add(x=a, y=b),
            _false_fn=lambda: mb.sub(x=a, y=b),
        ),
        [np.abs(A), B],
        lambda a, b: a + b,
    ),
    (
        "cond",
        lambda a, b: mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=a, keep_dims=False), y=0.0),
            _true_fn=lambda: mb.add(x=a, y=b),
            _false_fn=lambda: mb.sub(x=a, y=b),
        ),
        [-np.abs(A), B],
        lambda a, b: a - b,
    ),
    (
        "while_loop",
        lambda a, b: mb.while_loop(
            _cond=lambda x, n: mb.less(x=n, y=5.0),
            _body=lambda x, n: (mb.mul(x=x, y=b), mb.add(x=n, y=1.0)),
            loop_vars=(a, 0.0),
        )[0],
        [A, B],
        lambda a, b: a * b**5,
    ),
]


def _branches(a: Any, b: Any) -> Any:
    """Two branches and what is outside of them use the same names for different things, as a program may."""
    return mb.cond(
        pred=mb.greater(x=mb.reduce_sum(x=a, keep_dims=False), y=0.0),
        _true_fn=lambda: mb.add(x=a, y=mb.const(val=2.0, name="left")),
        _false_fn=lambda: mb.add(x=a, y=mb.const(val=3.0, name="right")),
    )


TESTED = {name for name, *_ in LISTS} | {"const", "classify", "read_state", "write_state"}


@pytest.mark.parametrize(
    ("name", "build", "arrays", "reference"), LISTS, ids=[f"{one[0]}-{i}" for i, one in enumerate(LISTS)]
)
def test_an_op_of_lists_shapes_or_blocks(
    name: str, build: Callable[..., Any], arrays: list[np.ndarray], reference: Callable[..., Any], tmp_path: Path
) -> None:
    feeds = dict(zip("ab", map(np.asarray, arrays), strict=True))
    if name == "range_1d":  # Core ML has no scalar inputs
        session = InterpreterSession(
            from_mil(
                tmp_path,
                lambda a, b: build(mb.squeeze(x=a), mb.squeeze(x=b)),
                {k: v.reshape(1) for k, v in feeds.items()},
            )
        )
        (got,) = session.run({k: v.reshape(1) for k, v in feeds.items()}).values()
    else:
        session = InterpreterSession(from_mil(tmp_path, build, feeds))
        (got,) = session.run(feeds).values()
    assert any(step.kind == name for step in _steps(session))
    np.testing.assert_allclose(got, reference(*arrays), rtol=1e-5, atol=1e-6)


def _steps(session: InterpreterSession) -> list[Any]:
    return list(session.program.block.steps)


def test_values_are_freed_after_their_last_use(tmp_path: Path) -> None:
    """A chain of twenty ops never holds more than its input and two links."""

    def build(a: Any) -> Any:
        for _ in range(20):
            a = mb.add(x=a, y=1.0)
        return a

    array = f(1 << 14)
    path = from_mil(tmp_path, build, {"a": array})
    limit = 3 * array.nbytes + 4096
    np.testing.assert_allclose(
        InterpreterSession(path, max_bytes=limit).run({"a": array}).popitem()[1], array + 20, rtol=1e-6
    )
    with pytest.raises(InputError, match=r"op \d+ \(add .*bytes"):
        InterpreterSession(path, max_bytes=array.nbytes + 4096).run({"a": array})


def test_states_are_kept_between_runs_and_reset(tmp_path: Path) -> None:
    path = stateful(tmp_path)
    session = InterpreterSession(path)
    assert [info.name for info in session.inputs] == ["x0"]
    (name,) = session.states
    x = np.array([1, 2, 3], np.float16)
    for times in (1, 2, 3):
        assert session.run({"x0": x}).popitem()[1].tolist() == (2 * times * x).tolist()
        assert session.states[name].dtype == np.float16 and session.states[name].tolist() == (times * x).tolist()
    session.reset()
    assert session.states[name].tolist() == [0, 0, 0]
    session.reset({name: x})
    assert session.run({"x0": x}).popitem()[1].tolist() == (4 * x).tolist()
    with pytest.raises(InputError, match="unknown state 'other'"):
        session.reset({"other": x})
    with pytest.raises(InputError, match=f"state '{name}': .*declared"):
        session.reset({name: x[:2]})


def test_every_function_of_a_package_runs(tmp_path: Path) -> None:
    paths = {}
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        (tmp_path / name).mkdir()
        paths[name] = from_mil(tmp_path / name, lambda x, factor=factor: mb.mul(x=x, y=factor), {"x": f(4)})
    description = ct.utils.MultiFunctionDescriptor()
    for name, path in paths.items():
        description.add_function(str(path), src_function_name="main", target_function_name=name)
    description.default_function_name = "triple"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(description, str(both))
    assert functions(both) == ("triple", "double")
    x = f(4)
    for function, factor in (("double", 2), ("triple", 3), (None, 3)):
        np.testing.assert_allclose(
            InterpreterSession(both, function=function).run({"x": x}).popitem()[1], x * factor, rtol=1e-6
        )
    with pytest.raises(InputError, match="unknown function 'tripel': did you mean 'triple'"):
        InterpreterSession(both, function="tripel")


def test_a_classifier_gives_its_label_and_probabilities(tmp_path: Path) -> None:
    class Scores(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.softmax(-1)

    exported = torch.export.export(Scores(), (torch.zeros(1, 3),)).run_decompositions({})
    model = ct.convert(
        exported,
        inputs=[ct.TensorType(name="x", shape=(1, 3))],
        classifier_config=ct.ClassifierConfig(["cat", "dog", "eel"]),
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    path = tmp_path / "classifier.mlpackage"
    model.save(str(path))
    out = InterpreterSession(path).run({"x": np.array([[0, 2, 1]], np.float32)})
    label, probabilities = out.values()
    assert label.item() == "dog"
    np.testing.assert_allclose(probabilities, torch.tensor([0.0, 2, 1]).softmax(0), rtol=1e-6)


@pytest.mark.parametrize("kind", ["enumerated", "range"])
def test_shapes_that_may_vary(kind: str, tmp_path: Path) -> None:
    path = flexible(tmp_path, kind)
    session = InterpreterSession(path)
    assert session.inputs[0].shape == (2, 3)
    for size in ((2, 3), (4, 5)):
        x = f(*size)
        np.testing.assert_allclose(session.run({"x": x}).popitem()[1], 2 * x.sum(-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"input 'x' has shape \(5, 5\); this package takes"):
        session.run({"x": f(5, 5)})


def test_an_image_is_fed_as_an_array(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    exported = torch.export.export(Mean(), (torch.zeros(1, 3, 4, 6),)).run_decompositions({})
    model = ct.convert(
        exported,
        inputs=[ct.ImageType(name="image", shape=(1, 3, 4, 6), scale=1 / 127.5, bias=[-1, -1, -1])],
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
    )
    path = tmp_path / "image.mlpackage"
    model.save(str(path))
    session = InterpreterSession(path)
    assert session.inputs[0].meaning == "an image, RGB, 0 to 255"
    pixels = RNG.integers(0, 256, session.inputs[0].shape).astype(session.inputs[0].dtype)
    np.testing.assert_allclose(
        session.run({"image": pixels}).popitem()[1], (pixels / 127.5 - 1).mean((2, 3)), atol=1e-5
    )


def test_names_in_blocks_are_their_own(tmp_path: Path) -> None:
    path = from_mil(tmp_path, _branches, {"a": A, "b": B})
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    data = file.read_bytes()
    assert data.count(b"left") and data.count(b"right")
    model = Model()
    model.ParseFromString(data)
    _rename(model.mlProgram.functions["main"], {"left": "same", "right": "same"})
    file.write_bytes(model.SerializeToString())
    session = InterpreterSession(path)
    for sign, added in ((1, 2.0), (-1, 3.0), (1, 2.0)):
        x = sign * np.abs(A)
        np.testing.assert_allclose(session.run({"a": x, "b": B}).popitem()[1], x + np.float32(added), rtol=1e-6)


def _rename(function: Any, names: dict[str, str]) -> None:
    pending = list(function.block_specializations.values())
    while pending:
        for op in pending.pop().operations:
            pending.extend(op.blocks)
            for output in op.outputs:
                output.name = names.get(output.name, output.name)
            for argument in op.inputs.values():
                for binding in argument.arguments:
                    binding.name = names.get(binding.name, binding.name)


def test_a_loop_keeps_no_more_than_a_round(tmp_path: Path) -> None:
    """A variable of the loop that its body does not use counts once, whatever the number of rounds."""
    array = f(1 << 12)

    def build(a: Any) -> Any:
        body = lambda x, unused, n: (mb.add(x=x, y=1.0), unused, mb.add(x=n, y=1.0))  # noqa: E731
        return mb.while_loop(_cond=lambda x, unused, n: mb.less(x=n, y=100.0), _body=body, loop_vars=(a, a, 0.0))[0]

    session = InterpreterSession(from_mil(tmp_path, build, {"a": array}), max_bytes=8 * array.nbytes)
    np.testing.assert_allclose(session.run({"a": array}).popitem()[1], array + 100, rtol=1e-5)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_beyond_its_axis(index: int, tmp_path: Path) -> None:
    """Until iOS 16 a negative index counts from the end; later, the result is not defined."""
    x = f(3, 4)
    indices = np.array([0, index], np.int32)
    for target in (ct.target.iOS16, ct.target.iOS17):
        session = InterpreterSession(
            from_mil(tmp_path, lambda x, i: mb.gather(x=x, indices=i, axis=0), {"x": x, "i": indices}, target)
        )
        if index < 0 and target == ct.target.iOS16:
            assert session.run({"x": x, "i": indices}).popitem()[1].tolist() == x[[0, -1]].tolist()
        else:
            with pytest.raises(InputError, match=rf"\(gather 'gather_0'\): the index {index} is beyond an axis of 3"):
                session.run({"x": x, "i": indices})
