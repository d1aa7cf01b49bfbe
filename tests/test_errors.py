from __future__ import annotations

import pickle

import pytest

from edgewise.errors import CheckFailed, EdgewiseError, InputError, MissingExtra, Refused, unknown


def test_exit_codes_follow_the_command_line() -> None:
    assert CheckFailed("too far").exit_code == 1
    assert [kind("x").exit_code for kind in (InputError, MissingExtra, Refused)] == [2, 2, 2]
    assert all(issubclass(kind, EdgewiseError) for kind in (CheckFailed, InputError, MissingExtra, Refused))


@pytest.mark.parametrize(
    ("name", "nearest"), [("openvno", "openvino"), ("OPENVINO", "openvino"), ("onnx_runtime", "onnxruntime")]
)
def test_unknown_suggests_the_nearest_name(name: str, nearest: str) -> None:
    error = unknown("target", name, ["openvino", "onnxruntime"])
    assert str(error) == f"unknown target '{name}': did you mean '{nearest}'? known: onnxruntime, openvino"


def test_unknown_without_a_near_name_lists_what_is_known() -> None:
    assert str(unknown("target", "zzz", ["b", "a"])) == "unknown target 'zzz'; known: a, b"
    assert str(unknown("target", "zzz", [])) == "unknown target 'zzz'; none are known here"
    assert "unknown key '3'" in str(unknown("key", 3, ["a"]))


def test_refused_folds_its_fields_into_the_message() -> None:
    error = Refused("a mask meets the tokens", node="add_3", source="model.py:12", method="tome")
    assert str(error) == "cannot apply tome at node 'add_3': a mask meets the tokens\n  from model.py:12"
    assert (error.reason, error.node) == ("a mask meets the tokens", "add_3")
    assert str(Refused("no attention")) == "cannot compile this graph: no attention"


def test_refused_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Refused("why", node="n", source="s", method="m")))
    assert (error.reason, error.node, error.source, error.method) == ("why", "n", "s", "m")
