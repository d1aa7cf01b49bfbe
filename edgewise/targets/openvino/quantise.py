"""Quantise OpenVINO IR with NNCF: the layers, and nothing else.

The node of a layer bears its name (see `edgewise.passes.layers`), and NNCF is told to leave out every other node. So scores, norms,
softmax and what compression chooses with stay in floating point; the artifact is checked for it afterwards.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgewise.errors import InputError
from edgewise.targets.base import Feeds, Quantiser, Ranges, layer_of
from edgewise.targets.openvino.lower import graphs, halve, number_nodes, save
from edgewise.targets.openvino.smooth import smooth
from edgewise.targets.scales import STRENGTH

GROUP = 32
"""Inputs of a layer that share a scale at four bits."""
_QUANTISE = "FakeQuantize"
# What leaves values as they are: a quantisation in front of it may be meant for what is behind it.
_MOVES = ("Convert", "Gather", "Reshape", "Slice", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze", "VariadicSplit")


def quantiser(files: Sequence[Path], precision: str, feeds: Feeds | None, ranges: Ranges | None) -> Quantiser:
    """See `Target.quantiser`."""
    import openvino

    model = openvino.Core().read_model(files[0])
    if precision == "w8a8":
        assert feeds is not None
        return _Activations(model, feeds, ranges)
    return _Weights(model, 8 if precision == "w8a16" else 4)


class _OpenVino(Quantiser):
    def __init__(self, model: Any) -> None:
        named = [layer_of(node.get_friendly_name()) for node in model.get_ordered_ops()]
        self.layers = tuple(dict.fromkeys(name for name in named if name is not None))
        self._model = model

    def write(self, folder: Path, stem: str, floating: Collection[str] = ()) -> list[Path]:
        model = self._made(floating)
        with contextlib.suppress(KeyError):
            del model.rt_info["nncf"]  # a list of all the nodes that are not layers
        number_nodes(model)  # what NNCF adds is named by counters that go on
        halve(model)
        folder.mkdir(parents=True, exist_ok=True)
        return save(model, folder, stem)

    def _made(self, floating: Collection[str]) -> Any:
        raise NotImplementedError

    def _others(self, floating: Collection[str] = ()) -> Any:
        """All nodes of the model but the layers that are to be quantised, as NNCF takes it."""
        names = [
            node.get_friendly_name()
            for graph in graphs(self._model)
            for node in graph.get_ordered_ops()
            if node.get_type_name() not in ("Constant", "Parameter", "Result")
        ]
        left = [name for name in names if (layer := layer_of(name)) is None or layer in floating]
        return _nncf().IgnoredScope(names=left, validate=False)


class _Weights(_OpenVino):
    """Weights of 8 bits with a scale for each output, or of 4 bits with one for each group of inputs."""

    def __init__(self, model: Any, bits: int) -> None:
        super().__init__(model)
        self._bits = bits

    def _made(self, floating: Collection[str]) -> Any:
        nncf = _nncf()
        model = self._model.clone()
        if set(self.layers) <= set(floating):
            return model
        with _quiet(), _named("quantise the weights"):
            if self._bits == 8:
                mode = nncf.CompressWeightsMode.INT8_SYM
                return nncf.compress_weights(model, mode=mode, ignored_scope=self._others(floating))
            # Layers whose inputs no group divides get 8 bits.
            fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE)
            return nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_SYM,
                ratio=1.0,
                group_size=GROUP,
                all_layers=True,
                backup_mode=nncf.BackupMode.INT8_SYM,
                ignored_scope=self._others(floating),
                advanced_parameters=fallback,
            )


class _Activations(_OpenVino):
    """Weights and activations of 8 bits. NNCF smooths the activations' outliers into the weights (SmoothQuant: Xiao et al., arXiv
    2211.10438); or it is done here, by `ranges` that are not of this model alone."""

    def __init__(self, model: Any, feeds: Feeds, ranges: Ranges | None) -> None:
        super().__init__(model)
        nncf = _nncf()
        if not self.layers:
            self._fake = model
            return
        if ranges is not None:
            smooth(model, ranges)
        # The weights stay beside their quantisation until the model is written, so that a layer can be put back.
        # For the same reason biases are not corrected.
        advanced = nncf.AdvancedQuantizationParameters(
            backend_params={"compress_weights": False},
            disable_bias_correction=True,
            # CPUs without instructions for products of 8 bits add pairs of them in 16 bits, which overflow.
            overflow_fix=nncf.OverflowFix.ENABLE,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=STRENGTH if ranges is None else -1),
            **({} if ranges is None else _widest()),
        )
        with _quiet(), _named("gather statistics"):
            self._fake = nncf.quantize(
                model,
                nncf.Dataset(feeds),
                model_type=nncf.ModelType.TRANSFORMER,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(feeds),
                ignored_scope=self._others(),
                advanced_parameters=advanced,
            )
        _check(self._fake)

    def _made(self, floating: Collection[str]) -> Any:
        from openvino._offline_transformations import compress_quantize_weights_transformation

        model = self._fake.clone()
        for node in model.get_ordered_ops():
            if layer_of(node.get_friendly_name()) in floating:
                _put_back(node)
        compress_quantize_weights_transformation(model)
        _keep_ranks(model)
        return model


def _widest() -> dict[str, Any]:
    """Settings of NNCF by which activations keep the range of all that was seen. It takes the mean of the feeds' ranges else, which
    cuts off much of a decoder's: a step feeds a single token, and half of the tokens are larger than the mean."""
    estimators = importlib.import_module("nncf.quantization.range_estimator")
    return {"activations_range_estimator_params": estimators.RangeEstimatorParametersSet.MINMAX}


def _put_back(layer: Any) -> None:
    """Let a layer read what is in front of the quantisation of its inputs."""
    for port in layer.inputs()[:2]:
        source = port.get_source_output().get_node()
        if source.get_type_name() == _QUANTISE:
            port.replace_source_output(source.input_value(0))


def _keep_ranks(model: Any) -> None:
    """Let an index behind a layer take a slice of one, whose dimension is taken off then: where OpenVINO moves the scale of a
    product of 8 bits behind a single index, the dimension stays."""
    from openvino import opset13 as opset

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gather" or not _is_layers(node.input_value(0).get_node()):
            continue
        index, axis = node.input_value(1).get_node(), node.input_value(2).get_node()
        if index.get_type_name() == "Constant" and not len(node.input(1).get_shape()):
            users = list(node.output(0).get_target_inputs())
            sliced = opset.gather(node.input_value(0), opset.constant(index.data.reshape(1)), axis.output(0))
            single = opset.squeeze(sliced, axis.output(0))
            for port in users:
                port.replace_source_output(single.output(0))


def _is_layers(node: Any) -> bool:
    """Whether a value is that of a layer, with its bias or without."""
    if node.get_type_name() == "Add":
        sources = [value.get_node() for value in node.input_values()]
        return any(_is_layers(source) for source in sources if source.get_type_name() != "Add")
    return layer_of(node.get_friendly_name()) is not None


def _check(model: Any) -> None:
    """Raise unless all that is quantised are the inputs of layers."""
    stack = [node for node in model.get_ops() if node.get_type_name() == _QUANTISE]
    while stack:
        node = stack.pop()
        for output in node.outputs():
            for port in output.get_target_inputs():
                user = port.get_node()
                if user.get_type_name() in _MOVES:
                    stack.append(user)
                elif layer_of(user.get_friendly_name()) is None:
                    raise InputError(f"target openvino: NNCF quantised {user.get_friendly_name()}, which is no layer")


def _nncf() -> Any:
    # It reports its use to a server, unless it believes to be tested; it reads this when it is imported.
    os.environ.setdefault("NNCF_CI", "1")
    with _quiet():
        return importlib.import_module("nncf")


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # NNCF raises its own errors, OpenVINO's, and whatever it runs into.
        text = " ".join(str(error).split())
        raise InputError(f"target openvino: NNCF cannot {what}: {text or type(error).__name__}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's notes, and its bars, from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
