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
    # Lists that grow, and boxes of images: none of the models that were tried has them.
    *("list_gather", "list_length", "list_read", "list_scatter", "list_write", "make_list"),
    *("affine", "crop_resize", "non_maximum_suppression", "conv_quantized"),
    "_const_symbolic",
}


def test_every_op_of_coremltools_is_known_or_listed() -> None:
    assert sorted(set(SSAOpRegistry.core_ops) - set(OPS) - NOT_KNOWN) == []
    assert sorted(set(OPS) - set(SSAOpRegistry.core_ops) - SAVED_AS_OTHERS) == []
    assert sorted(NOT_KNOWN & set(OPS)) == []


LOWERED = """
add reshape transpose matmul cast linear concat conv layer_norm gelu mul softmax expand_dims slice_by_index reduce_max equal
reduce_l2_norm real_div reduce_argmax tile reduce_sum squeeze topk scaled_dot_product_attention select split scatter
scatter_along_axis read_state coreml_update_state write_state greater_equal gather cos sin pow reduce_mean rsqrt slice_update
silu logical_not fill_like gather_along_axis quantize dequantize argsort sigmoid greater scatter_nd sub
constexpr_affine_dequantize constexpr_blockwise_shift_scale constexpr_lut_to_dense constexpr_sparse_to_dense
constexpr_sparse_blockwise_shift_scale crop resample conv_transpose
"""
"""What packages of the families, of the tools that compress weights, and of decoders with states were seen to have."""


def test_what_packages_have_is_known() -> None:
    assert sorted(set(LOWERED.split()) - set(OPS) - {"coreml_update_state"}) == []


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
