from __future__ import annotations

import numpy as np
import pytest

from edgewise.errors import InputError
from edgewise.verify import Rung, judge

ONE = {"y": np.array([1.0, 2.0])}


def test_a_rung_passes_up_to_its_threshold() -> None:
    value = {"y": np.array([1.0, 2.5])}
    assert judge("a", "b", "lowering", ONE, value, threshold=0.25).passed is True
    assert judge("a", "b", "lowering", ONE, value, threshold=0.24).passed is False
    assert judge("a", "b", "lowering", ONE, value).passed is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    value = {"y": np.array([1.0, bad])}
    assert judge("a", "b", "capture", ONE, value, threshold=1e9).passed is False
    assert judge("a", "b", "capture", value, value, threshold=1e9).passed is False


def test_an_unknown_relative_error_never_passes() -> None:
    zero = {"y": np.zeros(2)}
    assert judge("a", "b", "lowering", zero, ONE, threshold=1e9).passed is False
    assert judge("a", "b", "lowering", zero, zero, threshold=0.0).passed is True


def test_one_bad_output_fails_the_rung() -> None:
    reference = {"y": np.ones(2), "z": np.ones(2)}
    value = {"y": np.ones(2), "z": np.zeros(2)}
    rung = judge("a", "b", "lowering", reference, value, threshold=0.1)
    assert rung.passed is False
    assert (rung.outputs["y"].relative, rung.outputs["z"].relative) == (0.0, 1.0)


def test_the_intended_error_has_no_threshold() -> None:
    assert judge("tome", "model", "compression", ONE, ONE, kept_overlap=0.5).kept_overlap == 0.5
    with pytest.raises(InputError, match="compression"):
        judge("tome", "model", "compression", ONE, ONE, threshold=0.1)


def test_outputs_must_have_the_same_names() -> None:
    with pytest.raises(InputError, match="outputs"):
        judge("a", "b", "lowering", ONE, {"z": ONE["y"]}, threshold=0.1)
    with pytest.raises(InputError, match="outputs"):
        judge("a", "b", "lowering", {}, {}, threshold=0.1)


def test_a_rung_survives_json() -> None:
    rung = judge("a", "b", "lowering", ONE, {"y": np.array([np.nan, 1.0])}, threshold=0.1, note="n")
    assert Rung.model_validate_json(rung.model_dump_json()) == rung
