"""Every op of the interpreter, through a saved package: against coremltools' own inference of values, or against PyTorch."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_cases import Case
from coreml_cases_math import MATH
from coreml_cases_shape import SHAPES
from coreml_packages import ct, from_mil, mb

from edgewise.targets.coreml.interpreter import OPS
from edgewise.targets.coreml.session import InterpreterSession

CASES = [*MATH, *SHAPES]


def run(case: Case, folder: Path, *, half: bool = False) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the interpreter computes, and the reference."""
    arrays = {name: np.asarray(array) for name, array in case.arrays.items()}
    parameters = dict(case.parameters)
    if half:
        arrays = {name: _half(array) for name, array in arrays.items()}
        parameters = {name: _half(value) for name, value in parameters.items()}
    wanted: list[np.ndarray] = []

    def build(**inputs: Any) -> Any:
        op = getattr(mb, case.op)
        if case.reference is None:
            # All inputs are constants here, and coremltools computes the result; it may write to what it is given.
            known = {name: np.copy(_single(array)) for name, array in arrays.items()}
            given = {name: _single(value) for name, value in parameters.items()}
            result = op(**known, **given)
            for one in result if isinstance(result, (tuple, list)) else [result]:
                assert one.val is not None, f"coremltools does not infer the value of {case.op}"
                wanted.append(np.asarray(one.val))
        return op(**inputs, **parameters)

    session = InterpreterSession(from_mil(folder, build, arrays, getattr(ct.target, case.target)))
    # Core ML takes no truths and no small integers from outside: coremltools makes casts for them.
    feeds = {info.name: arrays[info.name].astype(info.dtype) for info in session.inputs}
    got = list(session.run(feeds).values())
    if case.reference is not None:
        tensors = {name: torch.from_numpy(_single(array)) for name, array in arrays.items()}
        given = {
            name: torch.from_numpy(_single(value)) if isinstance(value, np.ndarray) else value
            for name, value in parameters.items()
        }
        accepted = inspect.signature(case.reference).parameters if inspect.isfunction(case.reference) else {}
        given = {name: value for name, value in given.items() if name in accepted or "_" in accepted}
        result = case.reference(**tensors, **given)
        wanted = [one.numpy() for one in (result if isinstance(result, tuple) else (result,))]
    return got, wanted


def _half(value: Any) -> Any:
    if isinstance(value, float):
        return np.float16(value)
    return value.astype(np.float16) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def _single(value: Any) -> Any:
    if isinstance(value, np.float16):
        return np.float32(value)
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def names(cases: list[Case]) -> list[str]:
    return [f"{case.op}-{place}" for place, case in enumerate(cases)]


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_an_op_in_single_precision(case: Case, tmp_path: Path) -> None:
    got, wanted = run(case, tmp_path)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        if other.dtype.kind == "f":
            scale = max(1.0, float(np.abs(other).max(initial=0)))
            np.testing.assert_allclose(one.astype(np.float64), other, rtol=0, atol=case.tolerance * scale)
        else:
            np.testing.assert_array_equal(one, other)


HALF = [case for case in CASES if case.half and any(np.asarray(a).dtype == np.float32 for a in case.arrays.values())]


@pytest.mark.parametrize("case", HALF, ids=names(HALF))
def test_an_op_in_half_precision_is_rounded_once(case: Case, tmp_path: Path) -> None:
    """The result is that of single precision on the same halves, rounded: it differs by a unit in the last place where single
    precision itself was close to the middle of two halves."""
    got, wanted = run(case, tmp_path, half=True)
    for one, other in zip(got, wanted, strict=True):
        if other.dtype.kind != "f":
            np.testing.assert_array_equal(one, other)
            continue
        assert one.dtype == np.float16
        rounded = other.astype(np.float16)
        unit = np.spacing(np.maximum(np.abs(rounded), np.float16(1e-3)))
        off = np.abs(one.astype(np.float32) - rounded.astype(np.float32))
        assert (off <= unit * 1.01).all(), (one, rounded)
        assert (off > 0).mean() <= 0.05 or off.size < 40


def test_every_op_has_a_test() -> None:
    import test_coreml_constexpr
    import test_coreml_recurrent
    import test_coreml_structure

    others = (test_coreml_constexpr, test_coreml_recurrent, test_coreml_structure)
    tested = {case.op for case in CASES}.union(*(module.TESTED for module in others))
    assert sorted(set(OPS) - tested) == []
