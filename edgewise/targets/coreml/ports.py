"""Inputs and outputs of a package, and what they stand for.

Core ML takes fewer names and types than a program has: names are of letters, digits and underscores, numbers are fp16,
fp32 or int32, and nothing is a scalar. The package says in its metadata what each port stands for, so that a session
takes and gives what the program does. Imports no torch; it only asks the program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgewise.targets.base import Cache

METADATA_KEY = "edgewise.ports"
"""Where a package keeps its ports; those of each of several functions under `key_of`."""


def key_of(function: str) -> str:
    """Where a package of several functions keeps the ports of one."""
    return f"{METADATA_KEY}.{function}"


@dataclass(frozen=True)
class Port:
    """One input or output: its name, shape and type (a numpy name) in the program, and its name and type in the package. `image`:
    the colours of an image, whose pixels it holds as whole numbers from 0 to 255."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    feature: str
    stored: str
    image: str = ""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the package, where a scalar is an array of one."""
        return self.shape or (1,)


def ports(
    exported: ExportedProgram,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    half: bool,
    images: Mapping[str, str] | None = None,
) -> tuple[list[Port], list[Port]]:
    """The ports of a program under these names. `half`: floating-point ports are fp16 in the package, and else fp32; `images`
    are inputs that take images, with their colours, and always fp32."""
    nodes = {node.name: node for node in exported.graph.nodes}
    signature = exported.graph_signature
    taken: set[str] = set()
    features: dict[str, str] = {}

    def port(node_name: str, name: str, kind: str) -> Port:
        value, image = nodes[node_name].meta["val"], (images or {}).get(name, "") if kind == "input" else ""
        dtype = str(value.dtype).removeprefix("torch.")
        stored = "int32" if not value.is_floating_point() else "float16" if half and not image else "float32"
        # What is given twice is one feature, as Core ML has no two names for a value.
        feature = features.setdefault(f"{kind} {node_name}", "") or _feature(name, taken)
        features[f"{kind} {node_name}"] = feature
        return Port(name, tuple(int(n) for n in value.shape), dtype, feature, stored, image)

    return (
        [port(str(n), name, "input") for n, name in zip(signature.user_inputs, input_names, strict=True)],
        [port(str(n), name, "output") for n, name in zip(signature.user_outputs, output_names, strict=True)],
    )


_RESERVED = {
    *("any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string", "bf16"),
    *("fp16", "fp32", "fp64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "state"),
}


def _feature(name: str, taken: set[str]) -> str:
    """A name that Core ML takes, as near to `name` as may be; added to `taken`."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if not re.match(r"[A-Za-z_]", plain) or plain in _RESERVED:
        plain = f"_{plain}"
    while plain in taken:
        plain += "_"
    taken.add(plain)
    return plain


def state_ports(exported: ExportedProgram, caches: Sequence[Cache]) -> list[Port]:
    """The ports of caches that a program keeps in buffers of their names. Core ML keeps half precision at every precision."""
    return [
        Port(cache.input, tuple(exported.state_dict[cache.input].shape), "float32", _feature(cache.input, set()), "float16")
        for cache in caches
    ]


def dump(inputs: Sequence[Port], outputs: Sequence[Port], states: Sequence[Port] = ()) -> str:
    """Ports as the package's metadata hold them."""
    document = {"inputs": [asdict(p) for p in inputs], "outputs": [asdict(p) for p in outputs]}
    if states:
        document["states"] = [asdict(p) for p in states]
    return json.dumps(document, sort_keys=True)


def parse(text: str) -> tuple[list[Port], list[Port], list[Port]]:
    """Inputs, outputs and states that `dump` wrote. Raises ValueError, KeyError or TypeError if it is anything else."""
    document = json.loads(text)
    made = []
    for ports in (document["inputs"], document["outputs"], document.get("states", [])):
        made.append([Port(**{**port, "shape": tuple(int(n) for n in port["shape"])}) for port in ports])
    return made[0], made[1], made[2]
