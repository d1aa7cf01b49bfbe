"""Networks and engines: what is asked of NVIDIA's parser and builder, whichever package they come in.

`tensorrt` (on a Jetson or a PC) and `tensorrt_rtx_bindings` (from PyPI) have the same classes. No GPU is needed to parse, nor, with
TensorRT-RTX, to build. Imports neither of them, nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.errors import InputError

Describe = Callable[[str, str], "str | None"]
"""Says where a node of an ONNX file comes from, by its name, or without one where all nodes of an op come from; None: not known."""

WAYS_ROUND: Mapping[str, str] = {
    "ScatterElements": "TensorRT scatters without a reduction: gather, or multiply with a one-hot matrix, instead",
    "ScatterND": "TensorRT scatters without a reduction: gather, or multiply with a one-hot matrix, instead",
    "NonZero": "its shape depends on data: choose a fixed number with topk, or multiply with a mask",
    "Unique": "its shape depends on data: compute it before or after the model",
    "DFT": "compute spectra before the model, as its processor does, or as a convolution with fixed kernels",
    "STFT": "compute spectra before the model, as its processor does, or as a convolution with fixed kernels",
    "TopK": "TensorRT takes at most 3840 of one axis: rank by comparison, or choose within groups",
    "Det": "TensorRT has no determinant: write it out for small matrices",
    "BitwiseAnd": "TensorRT has no bitwise ops on numbers: compare and use logical ops on booleans",
    "BitwiseOr": "TensorRT has no bitwise ops on numbers: compare and use logical ops on booleans",
    "BitwiseXor": "TensorRT has no bitwise ops on numbers: compare and use logical ops on booleans",
}
"""By ONNX op, how to say the same in a way that TensorRT takes."""
_LINT = "`edgewise lint MODEL --target tensorrt` names what TensorRT has no way for"


@dataclass(frozen=True)
class Network:
    """A parsed file. The parser holds the weights that the definition points at, and so must live as long."""

    trt: Any
    builder: Any
    definition: Any
    parser: Any
    log: Any

    @property
    def layers(self) -> int:
        return int(self.definition.num_layers)


def parse(trt: Any, path: Path, describe: Describe | None = None) -> Network:
    """Parse an ONNX file into a strongly typed network.

    Raises `InputError` with the parser's reason, the node, where it comes from and a way round, if the parser rejects the file.
    """
    log = logger(trt)
    builder = trt.Builder(log)
    # From TensorRT 11 on every network is strongly typed, and the flag is for programs written before.
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        raise InputError(_rejected(name_of(trt), path, errors, log.messages, describe))
    return Network(trt, builder, definition, parser, log)


def build(network: Network, config: Any, what: str, describe: Describe | None = None) -> bytes:
    """The engine of a network. Raises `InputError` with the builder's reason if it cannot be built."""
    trt, log = network.trt, network.log
    # TF32 rounds the operands of single-precision products to 10 bits, and indices count on all 24.
    config.clear_flag(trt.BuilderFlag.TF32)
    plan = network.builder.build_serialized_network(network.definition, config)
    if plan is None:
        reasons = "\n  ".join(dict.fromkeys(_plain(text) for text in log.messages)) or "it gave no reason"
        where = _mentioned(log.messages, describe)
        # The builder names layers of its own kinds; those that one op becomes bear its name.
        kinds = dict.fromkeys(kind for text in log.messages for kind in re.findall(r"\bI(\w+?)Layer\b", text))
        ways = [WAYS_ROUND[kind] for kind in kinds if kind in WAYS_ROUND] or [_LINT]
        raise InputError(f"{name_of(trt)} cannot build {what}:\n  {reasons}{where}\n    way round: {'; '.join(ways)}")
    return bytes(plan)


def name_of(trt: Any) -> str:
    """Name and version of the package that `trt` is."""
    product = "TensorRT-RTX" if "rtx" in trt.__name__ else "TensorRT"
    return f"{product} {trt.__version__}"


def logger(trt: Any) -> Any:
    """A logger that keeps the errors in `messages` and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "cudaError" not in message:
                self.messages.append(message)

    return Log()


_FRAME = re.compile(r"While parsing node|--- (Begin|End) node|In function")


def _rejected(who: str, path: Path, errors: list[Any], messages: list[str], describe: Describe | None) -> str:
    lines = []
    for error in errors:
        node, op = error.node_name(), error.node_operator()
        reason = _plain(error.desc())
        reason = "the parser has no such op" if reason == "false" else reason
        if not op:  # such errors name neither: the function that found them does
            found = re.match(r"import(\w+)$", error.func() or "")
            op = found.group(1) if found else ""
        origin = describe(node, op) if describe is not None else None
        what = (op or "the graph") + (f", {origin}" if origin else f" '{node}'" if node else "")
        lines.append(f"{what}: {reason}\n    way round: {WAYS_ROUND.get(op, _LINT)}")
    # What the parser logs before it gives up may name more: the file of weights that is not there, for one.
    said = dict.fromkeys(_plain(text) for text in messages if not _FRAME.search(text))
    lines += [text for text in said if text and not any(text in line for line in lines)]
    if not lines:
        lines = ["it gave no reason"]
    return f"{who} cannot read {path}:\n  " + "\n  ".join(lines)


def _mentioned(messages: list[str], describe: Describe | None) -> str:
    """Where the nodes that a message names come from."""
    if describe is None:
        return ""
    names = dict.fromkeys(name for text in messages for name in re.findall(r"[\w.:-]+/[\w.]+", text))
    return "".join(f"\n  {name} is {origin}" for name in names if (origin := describe(name, "")) is not None)


def _plain(text: str) -> str:
    """A message without the place in NVIDIA's sources."""
    text = re.sub(r"\bIn \w+ at /[^\s)]+", "", text)
    text = re.sub(r"^\S+\.cpp:\d+: (ERROR: )?\S*:?\d*( In function \w+:)?", "", text.strip())
    return " ".join(text.split()).replace(" )", ")")
