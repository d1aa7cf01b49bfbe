"""Write a Core ML package: a folder with a manifest, the model and its weights. The same model gives the same bytes.

coremltools names the parts of a package by random identifiers, and writes the date into the model.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewise.targets.coreml.ports import METADATA_KEY, Port, dump

_COLOUR_SPACES = {"grayscale": 10, "RGB": 20}
_DATA = "com.apple.CoreML"
_MODEL = "model.mlmodel"
_WEIGHTS = "weights"


def write_package(
    model: Any, inputs: Sequence[Port], outputs: Sequence[Port], package: Path, states: Sequence[Port] = ()
) -> list[Path]:
    """Write coremltools' model to the folder `package`; gives its files, the manifest first."""
    spec = model.get_spec()
    for feature in spec.description.input:
        port = next((one for one in inputs if one.feature == feature.name and one.image), None)
        if port is not None:
            feature.type.imageType.width, feature.type.imageType.height = port.shape[-1], port.shape[-2]
            feature.type.imageType.colorSpace = _COLOUR_SPACES[port.image]
    metadata = spec.description.metadata.userDefined
    for key in list(metadata):
        if key.startswith("com.github.apple.coremltools"):
            del metadata[key]
    metadata[METADATA_KEY] = dump(inputs, outputs, states)
    places = []
    for path in sorted(Path(model.weights_dir).iterdir()) if model.weights_dir else []:
        places.append(weights_folder(package) / path.name)
        places[-1].write_bytes(path.read_bytes())
    return write_rest(spec, package, places)


def weights_folder(package: Path) -> Path:
    """The folder of a package that holds its weights, which is made."""
    folder = package / "Data" / _DATA / _WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_rest(spec: Any, package: Path, weights: Sequence[Path]) -> list[Path]:
    """Write all of a package but its files of weights, which are there: the message `Model`, and the manifest. Gives all files, the
    manifest first."""
    data = package / "Data" / _DATA
    data.mkdir(parents=True, exist_ok=True)
    (data / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    entries = {_identifier(_MODEL): _entry(_MODEL, "CoreML Model Specification")}
    if weights:
        entries[_identifier(_WEIGHTS)] = _entry(_WEIGHTS, "CoreML Model Weights")
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": _identifier(_MODEL)}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", "utf-8")
    return [package / "Manifest.json", data / _MODEL, *weights]


def _entry(name: str, description: str) -> dict[str, str]:
    return {"author": _DATA, "description": description, "name": name, "path": f"{_DATA}/{name}"}


def _identifier(name: str) -> str:
    """An identifier in the form that Core ML has, which is random there."""
    return str(uuid.UUID(bytes=hashlib.sha256(f"edgewise {name}".encode()).digest()[:16], version=4)).upper()
