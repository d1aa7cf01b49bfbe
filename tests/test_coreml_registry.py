"""The table of ops against that of coremltools: names of inputs, which are required, and defaults."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from coreml_packages import ct  # noqa: F401
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from edgewise.targets.coreml.interpreter import OPS

# What a program keeps in blocks instead of inputs, or what is made of two ops when a program is saved.
BLOCKS = {"cond": {"pred"}, "while_loop": {"loop_vars"}}
SAVED_AS_OTHERS = {"write_state"}
NOT_KNOWN = {
    # Random numbers have no result to be checked.
    *("random_bernoulli", "random_categorical", "random_normal", "random_uniform"),
    # Lists that grow, and sampling of images: none of the models that were tried has them.
    *("list_gather", "list_length", "list_read", "list_scatter", "list_write", "make_list"),
    *("affine", "crop", "crop_resize", "non_maximum_suppression", "resample", "conv_quantized"),
    "_const_symbolic",
}


def test_every_op_of_coremltools_is_known_or_listed() -> None:
    assert sorted(set(SSAOpRegistry.core_ops) - set(OPS) - NOT_KNOWN) == []
    assert sorted(set(OPS) - set(SSAOpRegistry.core_ops) - SAVED_AS_OTHERS) == []
    assert sorted(NOT_KNOWN & set(OPS)) == []


@pytest.mark.parametrize("name", sorted(set(OPS) - SAVED_AS_OTHERS))
def test_inputs_and_defaults_are_those_of_coremltools(name: str) -> None:
    op = OPS[name]
    parameters = inspect.signature(op.function).parameters
    required = []
    for version in SSAOpRegistry.core_ops[name].values():
        types = {key: one for key, one in version.input_spec.input_types.items() if not key.startswith("_")}
        assert set(types) <= op.inputs, f"{name} has inputs that the interpreter does not take"
        required.append({key for key, one in types.items() if not one.optional})
        for key, value in _defaults(version).items():
            if key == "validate_indices":
                assert parameters[key].default is None  # which says that the program has no such input
            elif value is not None and key in op.inputs:
                assert np.asarray(parameters[key].default).tolist() == pytest.approx(np.asarray(value).tolist()), (
                    name,
                    key,
                )
    # What every version requires is required; what some version lacks may be left out.
    always = set.intersection(*required)
    assert op.required <= always | BLOCKS.get(name, set()), name


def _defaults(version: Any) -> dict[str, Any]:
    """The defaults of an op that do not depend on its other inputs."""
    try:
        return dict(version.default_inputs(version.__new__(version)).items())
    except AttributeError:
        return {}
