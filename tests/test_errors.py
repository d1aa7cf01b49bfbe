from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from edgewise.errors import CheckFailed, EdgewiseError, InputError, MissingExtra, Refused, extras_named, unknown


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


def test_a_missing_module_names_its_extra() -> None:
    for module, extra in (("torch.export", "export"), ("openvino", "openvino")):
        with pytest.raises(MissingExtra, match=rf'pip install "edgewise\[{extra}\]"'), extras_named():
            raise ModuleNotFoundError("gone", name=module)
    for error in (ModuleNotFoundError("gone", name="nobody_knows"), ModuleNotFoundError("gone")):
        with pytest.raises(ModuleNotFoundError, match="gone"), extras_named():
            raise error


@pytest.mark.parametrize("hidden", [["torch", "transformers", "yaml", "onnx", "onnxscript"], ["transformers"]])
def test_the_python_interface_names_the_extra(hidden: list[str]) -> None:
    names = ["capture", "compress", "export", "Program"] if "torch" in hidden else []
    code = f"""
import sys
for name in {hidden!r}:
    sys.modules[name] = None  # importing it is an error
import edgewise
edgewise.load, edgewise.Bundle, edgewise.Session
for use in [*(lambda name=name: getattr(edgewise, name) for name in {names!r}), lambda: edgewise.export("some/model", "b")]:
    try:
        use()
    except edgewise.MissingExtra as error:
        assert 'pip install "edgewise[export]"' in str(error), error
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
